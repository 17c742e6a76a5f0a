//! `tlsplice check`: would `run` take this file, and what would be offloaded on this host.

use super::{Paint, show, show_json};
use crate::config::{Config, Invalid, Mode, Offload, OffloadAfter, ServerAddress};
use crate::control::start::{missing_directions, refuse_if_required};
use crate::exit::{FINE, FOUND, Failure, USAGE};
use crate::probe::Kernel;
use crate::tls::certificates::{Certificates, Fault, Faults};
use crate::tls::grade;
use crate::tls::policy;
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;

/// What the check has to say; `--json` prints it as it is.
#[derive(Serialize, Default)]
struct Report {
    file: String,
    fine: bool,
    problems: Vec<Problem>,
    /// What is odd and yet served.
    warnings: Vec<Problem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    grade: Option<grade::Report>,
    certificates: Vec<Certificate>,
    suites: Vec<&'static str>,
    listeners: Vec<Listener>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offload: Option<OffloadReport>,
}

#[derive(Serialize)]
struct Problem {
    file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    column: Option<usize>,
    message: String,
}

#[derive(Serialize)]
struct Certificate {
    names: Vec<String>,
    key: String,
    chain_length: usize,
    not_after: String,
    certificate_file: String,
    key_file: String,
}

#[derive(Serialize)]
struct Listener {
    address: String,
    mode: &'static str,
    offload: &'static str,
    offload_after: String,
    upstream: String,
    servers: Vec<String>,
}

#[derive(Serialize)]
struct OffloadReport {
    kernel: String,
    /// Why nothing can be offloaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    none_because: Option<String>,
    /// Suites that stay in userspace, with the direction that the kernel lacks.
    userspace: Vec<String>,
    rekey: bool,
}

/// Exit code 0 or 1, and 2 if the file asks for what this version has not.
///
/// # Errors
/// `Usage`: there is no file to check.
pub fn check(file: &Path, json: bool) -> Result<u8, Failure> {
    let text = std::fs::read_to_string(file)
        .map_err(|e| Failure::Usage(format!("{}: cannot be read: {e}", file.display())))?;
    let mut report = Report { file: file.display().to_string(), ..Report::default() };
    let mut not_built = false;
    match Config::parse(file, &text) {
        Ok(config) => report.examine(&config),
        Err(invalid) => {
            not_built = invalid.asks_for_what_is_not_built();
            report.invalid(&invalid);
        }
    }
    report.fine = report.problems.is_empty();
    if json {
        show_json(&report)?;
    } else {
        show(&report.text(&Paint::stdout()));
    }
    Ok(match (report.fine, not_built) {
        (true, _) => FINE,
        (false, true) => USAGE,
        (false, false) => FOUND,
    })
}

impl Report {
    fn invalid(&mut self, invalid: &Invalid) {
        self.problems.extend(invalid.problems().iter().map(|problem| Problem {
            file: self.file.clone(),
            line: Some(problem.line),
            column: Some(problem.column),
            message: problem.message.clone(),
        }));
    }

    fn faults(&mut self, faults: &Faults) {
        self.problems.extend(faults.list().iter().map(Problem::of));
    }

    fn examine(&mut self, config: &Config) {
        match Certificates::load(&config.tls) {
            Ok(certificates) => {
                self.certificates = certificates.served().iter().map(Certificate::of).collect();
                self.warnings = certificates.warnings().iter().map(Problem::of).collect();
                let report = grade::configuration::grade(config, &certificates, &[]);
                self.grade = Some(report);
            }
            Err(faults) => self.faults(&faults),
        }
        self.suites = policy::suites_of(&config.tls).iter().map(|suite| policy::suite_name(suite.suite())).collect();
        self.listeners = config.listeners.iter().map(|listener| Listener::of(listener)).collect();
        let kernel = Kernel::probe();
        if let Err(failure) = refuse_if_required(config, &kernel) {
            self.problems.push(Problem {
                file: self.file.clone(),
                line: None,
                column: None,
                message: failure.to_string(),
            });
        }
        self.offload = Some(OffloadReport {
            userspace: if kernel.no_ulp.is_none() { missing_directions(&kernel) } else { Vec::new() },
            kernel: kernel.release,
            none_because: kernel.no_ulp,
            rekey: kernel.rekey,
        });
    }

    fn text(&self, paint: &Paint) -> String {
        let mut text = String::new();
        // Writing to a String fails never.
        for Certificate { names, key, chain_length, not_after, certificate_file, key_file } in &self.certificates {
            let names = names.join(", ");
            let _ = writeln!(text, "certificate  {names}: {key}, chain of {chain_length}, until {not_after}");
            let _ = writeln!(text, "             {certificate_file}, key {key_file}");
        }
        for Listener { address, mode, offload, offload_after, upstream, servers } in &self.listeners {
            if *mode == "redirect" {
                let _ = writeln!(text, "listener     {address} -> https (mode redirect)");
                continue;
            }
            let servers = servers.join(", ");
            let _ = writeln!(
                text,
                "listener     {address} -> {upstream} ({servers}), mode {mode}, offload {offload} after {offload_after}"
            );
        }
        if let Some(offload) = &self.offload {
            let _ = writeln!(text, "offload      {}", offload.sentence());
        }
        if let Some(report) = &self.grade {
            let _ = writeln!(text, "grade        {}", super::grade::sentence(report, paint));
            for reason in &report.reasons {
                let _ =
                    writeln!(text, "             at most {}: {}; mend: {}", reason.at_most, reason.reason, reason.mend);
            }
        }
        for Problem { file, message, .. } in &self.warnings {
            let _ = writeln!(text, "{}: {message}", paint.yellow(file));
        }
        for Problem { file, line, column, message } in &self.problems {
            let place = match (line, column) {
                (Some(line), Some(column)) => format!("{file}:{line}:{column}"),
                (None, _) | (_, None) => file.clone(),
            };
            let _ = writeln!(text, "{}: {message}", paint.red(&place));
        }
        let verdict = match self.problems.len() {
            0 => paint.green("fine"),
            1 => paint.red("1 problem"),
            n => paint.red(&format!("{n} problems")),
        };
        let _ = writeln!(text, "{}: {verdict}", self.file);
        text
    }
}

impl Problem {
    fn of(fault: &Fault) -> Self {
        Self { file: fault.file.display().to_string(), line: None, column: None, message: fault.message.clone() }
    }
}

impl Certificate {
    fn of(served: &crate::tls::certificates::Served) -> Self {
        Self {
            names: served.names.clone(),
            key: served.key_kind.clone(),
            chain_length: served.chain.len(),
            not_after: served.not_after.clone(),
            certificate_file: served.certificate_file.display().to_string(),
            key_file: served.key_file.display().to_string(),
        }
    }
}

impl Listener {
    fn of(listener: &crate::config::Listener) -> Self {
        let server = |address: &ServerAddress| match address {
            ServerAddress::Tcp(address) => address.to_string(),
            ServerAddress::Unix(path) => format!("unix:{}", path.display()),
        };
        Self {
            address: listener.address.to_string(),
            offload: match listener.offload {
                Offload::Auto => "auto",
                Offload::Require => "require",
                Offload::Off => "off",
            },
            offload_after: match listener.offload_after {
                OffloadAfter::Auto => "auto".to_owned(),
                OffloadAfter::Bytes(bytes) => format!("{bytes} bytes"),
            },
            mode: match listener.mode {
                Mode::Tcp(_) => "tcp",
                Mode::Http(_) => "http",
                Mode::Redirect => "redirect",
            },
            upstream: listener.upstream().map(|u| u.name.clone()).unwrap_or_default(),
            servers: listener.upstream().map(|u| u.servers.iter().map(server).collect()).unwrap_or_default(),
        }
    }
}

impl OffloadReport {
    fn sentence(&self) -> String {
        let Self { kernel, none_because, userspace, rekey } = self;
        if let Some(why) = none_because {
            return format!("nothing on this kernel ({kernel}): {why}; `tlsplice doctor` says what mends it");
        }
        let suites = match userspace.as_slice() {
            [] => "every suite, both directions".to_owned(),
            some => format!("all but {}", some.join(", ")),
        };
        let rekey = if *rekey { "keys can be renewed" } else { "keys cannot be renewed" };
        format!("{suites}; {rekey} (kernel {kernel})")
    }
}
