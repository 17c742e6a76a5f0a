//! `tlsplice grade`: what SSL Labs would say, of a configuration or of a live host, and the line that mends it.

use super::{Paint, show, show_json};
use crate::control::start::{read_certificates, read_config};
use crate::exit::{FINE, FOUND, Failure};
use crate::tls::grade::live::Host;
use crate::tls::grade::{Grade, Report, configuration, grade as graded};
use crate::tls::pem;
use serde::Serialize;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// What is graded.
pub enum Target<'a> {
    Configuration(&'a Path),
    Host { to: &'a str, sni: Option<&'a str> },
}

#[derive(Serialize)]
struct Said<'a> {
    target: String,
    #[serde(flatten)]
    report: &'a Report,
}

/// Exit code 0 for an A+, also for one on a condition; else 1.
///
/// # Errors
/// `Usage`: the configuration or a file of roots. `Host`: nobody answers.
pub fn grade(target: &Target<'_>, authorities: &[PathBuf], json: bool) -> Result<u8, Failure> {
    let mut roots = Vec::new();
    for file in authorities {
        let read = pem::certificates(file).map_err(|e| Failure::Usage(format!("{}: {e}", file.display())))?;
        roots.extend(read);
    }
    let (target, report) = match target {
        Target::Configuration(file) => {
            let config = read_config(file)?;
            let certificates = read_certificates(&config)?.certificates;
            (file.display().to_string(), configuration::grade(&config, &certificates, &roots))
        }
        Target::Host { to, sni } => {
            let host = Host::find(to, *sni).map_err(Failure::Host)?;
            ((*to).to_owned(), graded(&host.facts(&roots).map_err(Failure::Host)?))
        }
    };
    if json {
        show_json(&Said { target, report: &report })?;
    } else {
        show(&text(&target, &report, &Paint::stdout()));
    }
    Ok(if report.grade == Grade::APlus { FINE } else { FOUND })
}

fn text(target: &str, report: &Report, paint: &Paint) -> String {
    let mut text = String::new();
    // Writing to a String fails never.
    let Report { protocol_score, key_exchange_score, cipher_score, score, .. } = report;
    let _ = writeln!(text, "protocol     {protocol_score}");
    let _ = writeln!(text, "key exchange {key_exchange_score}");
    let _ = writeln!(text, "cipher       {cipher_score}");
    let _ = writeln!(text, "score        {score}");
    for reason in &report.reasons {
        let at_most = paint.red(&format!("at most {}", reason.at_most));
        let _ = writeln!(text, "{at_most}: {}; mend: {}", reason.reason, reason.mend);
    }
    for note in &report.notes {
        let _ = writeln!(text, "note: {note}");
    }
    let _ = writeln!(text, "{target}: {}", sentence(report, paint));
    text
}

/// The grade in one line.
pub(super) fn sentence(report: &Report, paint: &Paint) -> String {
    let condition = report.condition.map_or(String::new(), |condition| format!(" {condition}"));
    let grade = format!("{}{condition}", report.grade);
    if report.grade == Grade::APlus { paint.green(&grade) } else { paint.red(&grade) }
}
