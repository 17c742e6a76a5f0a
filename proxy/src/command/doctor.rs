//! `tlsplice doctor`: what this host can offload, and what mends each gap.

use super::{Paint, show, show_json};
use crate::doctor::{Finding, Host, Standing, examine};
use crate::exit::{FINE, FOUND, Failure};
use crate::probe::Kernel;
use serde::Serialize;
use std::fmt::Write;

#[derive(Serialize)]
struct Report<'a> {
    fine: bool,
    findings: &'a [Finding],
    kernel: &'a Kernel,
}

/// # Errors
/// None but that JSON cannot be written.
pub fn doctor(json: bool) -> Result<u8, Failure> {
    // The probe first: it loads the modules whose drivers the host is then asked for.
    let kernel = Kernel::probe();
    let host = Host::read();
    let findings = examine(&host, &kernel);
    let fine = findings.iter().all(|finding| finding.standing != Standing::Gap);
    if json {
        show_json(&Report { fine, findings: &findings, kernel: &kernel })?;
    } else {
        show(&text(&findings, &Paint::stdout()));
    }
    Ok(if fine { FINE } else { FOUND })
}

fn text(findings: &[Finding], paint: &Paint) -> String {
    let mut text = String::new();
    for Finding { name, standing, found, mend } in findings {
        let mark = match standing {
            Standing::Ok => paint.green("ok  "),
            Standing::Note => paint.yellow("note"),
            Standing::Gap => paint.red("gap "),
        };
        // Writing to a String fails never.
        let _ = writeln!(text, "{mark}  {name:15} {found}");
        if let Some(mend) = mend {
            let _ = writeln!(text, "      {:15} mend: {mend}", "");
        }
    }
    text
}
