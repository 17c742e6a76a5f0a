//! The test binary: built once, static, then run as the same file on the host, in user-mode Linux and in every guest.
//!
//!   cargo build ─▶ private copies ─▶ run on one kernel ─▶ its lines, as they come ─▶ Report
//!
//! What it prints is an interface: `ok NAME`, `FAILED NAME`, `again NAME: WHY` for a test that failed and is run once more,
//! and one line `SUMMARY {json}` at the end. A run without that line has failed, whatever its exit status.

use crate::cache;
use crate::first_process::{self, Profile};
use crate::progress::{self, Colour};
use anyhow::{Context, Result};
use serde_json::Value;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Crates with tests inside.
pub const UNIT_TESTED: &[&str] = &["tlsplice", "tlsplice-bench", "tlsplice-tests", "xtask"];

/// The two programs.
#[derive(Clone, Debug)]
pub struct Binaries {
    pub tlsplice: PathBuf,
    pub suite: PathBuf,
}

impl Binaries {
    /// Builds both and copies them to a folder, where a later build does not pull them from under running tests.
    pub fn build(into: &Path) -> Result<Self> {
        // With all packages whose unit tests run, so that both builds take the same features of every dependency.
        let packages = UNIT_TESTED.iter().flat_map(|package| ["--package", package]);
        let arguments: Vec<_> = packages.chain(["--bin", "tlsplice", "--bin", "tlsplice-suite"]).collect();
        let built = first_process::static_build(Profile::Suite, &arguments)?;
        let copy = |name: &str| {
            let (from, to) = (built.join(name), into.join(name));
            fs::copy(&from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
            anyhow::Ok(to)
        };
        Ok(Self { tlsplice: copy("tlsplice")?, suite: copy("tlsplice-suite")? })
    }
}

/// A folder for one command's binaries and scratch files, removed at its end. Everybody may write into it, because tests
/// run programs as other users.
#[derive(Debug)]
pub struct Workplace(PathBuf);

impl Workplace {
    pub fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("tlsplice-test-{}", std::process::id()));
        cache::remove(&path)?;
        let workplace = Self(path);
        workplace.folder("bin")?;
        Ok(workplace)
    }

    /// A folder inside.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt;
        let path = self.0.join(name);
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o1777)).context("open a scratch folder to everybody")?;
        Ok(path)
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Where logs are kept: below cargo's target folder, one file for each kernel, of the last run.
pub fn log_path(kernel: &str, what: &str) -> Result<PathBuf> {
    let folder = first_process::target_folder().join("xtask");
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    Ok(folder.join(format!("{kernel}.{what}.log")))
}

/// The environment that the test binary is given, beside what the system needs.
pub fn environment(kernel: &str, offload: Offload, tlsplice: &Path, tmp: &Path) -> Vec<(OsString, OsString)> {
    let offload = match offload {
        Offload::Off => "off",
        Offload::Require => "require",
    };
    vec![
        ("TLSPLICE_BIN".into(), tlsplice.into()),
        ("TLSPLICE_KERNEL".into(), kernel.into()),
        ("TLSPLICE_OFFLOAD".into(), offload.into()),
        ("TLSPLICE_TMP".into(), tmp.into()),
    ]
}

/// Whether this kernel offloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    Off,
    Require,
}

impl Offload {
    /// As the host has it. The module is loaded if it can be: the kernel does so itself only for a privileged socket.
    pub fn of_this_host() -> Self {
        let ulp = || fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp").unwrap_or_default();
        let has_tls = |ulp: String| ulp.split_whitespace().any(|name| name == "tls");
        if has_tls(ulp()) {
            return Self::Require;
        }
        if let Some(modprobe) = crate::process::find("modprobe") {
            let _ = Command::new(modprobe).args(["--quiet", "tls"]).output();
        }
        if has_tls(ulp()) { Self::Require } else { Self::Off }
    }
}

/// What a run on one kernel came to.
#[derive(Debug, Default)]
pub struct Report {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
    pub offloaded: u64,
    pub spliced_bytes: u64,
    pub failures: Vec<String>,
    /// What failed and was run once more, with the reason: tests, or a whole guest. One that failed again is a failure too.
    pub again: Vec<String>,
    /// Why the run as a whole is worth nothing.
    pub problem: Option<String>,
    pub took: Duration,
}

/// Takes a run's lines, shows them with the kernel's name, keeps them in a log, and counts.
#[derive(Debug)]
pub struct Listener {
    kernel: String,
    log: File,
    log_path: PathBuf,
    show: fn(&str),
    report: Report,
    /// Passed and failed by now, and when the test binary was started last.
    verdicts: (u64, u64),
    before: (u64, u64),
    summed_up: bool,
    /// All tests were asked for, so none at all is a failure.
    unfiltered: bool,
    started: Instant,
}

impl Listener {
    /// For a run with these arguments.
    pub fn new(kernel: &str, arguments: &[OsString]) -> Result<Self> {
        Self::showing(kernel, arguments.is_empty(), progress::line)
    }

    fn showing(kernel: &str, unfiltered: bool, show: fn(&str)) -> Result<Self> {
        let log_path = log_path(kernel, "tests")?;
        let log = File::create(&log_path).with_context(|| format!("create {}", log_path.display()))?;
        let (kernel, report) = (kernel.to_owned(), Report::default());
        Ok(Self {
            kernel,
            log,
            log_path,
            show,
            report,
            verdicts: (0, 0),
            before: (0, 0),
            summed_up: false,
            unfiltered,
            started: Instant::now(),
        })
    }

    /// One line of output.
    pub fn take(&mut self, line: &str) {
        let _ = writeln!(self.log, "{line}");
        let colour = match line.split_once(' ') {
            Some(("ok", _)) => {
                self.verdicts.0 += 1;
                Some(Colour::Green)
            }
            Some(("FAILED", name)) => {
                self.verdicts.1 += 1;
                self.report.failures.push(name.to_owned());
                Some(Colour::Red)
            }
            Some(("again", name)) => {
                self.report.again.push(name.to_owned());
                Some(Colour::Red)
            }
            Some(("SUMMARY", json)) => {
                self.sum_up(json);
                return;
            }
            _ => None,
        };
        let shown = colour.map_or_else(|| line.to_owned(), |colour| progress::coloured(line, colour));
        (self.show)(&format!("[{}] {shown}", self.kernel));
    }

    fn sum_up(&mut self, json: &str) {
        let Ok(summary) = serde_json::from_str::<Value>(json) else {
            self.report.problem = Some(format!("its summary is no JSON: {json}"));
            return;
        };
        let number = |key: &str| summary.get(key).and_then(Value::as_u64);
        let counts = (number("passed"), number("failed"));
        let (Some(passed), Some(failed)) = counts else {
            self.report.problem = Some(format!("its summary lacks passed or failed: {json}"));
            return;
        };
        (self.report.passed, self.report.failed) = (self.before.0 + passed, self.before.1 + failed);
        self.report.offloaded = number("offloaded").unwrap_or(0);
        self.report.spliced_bytes = number("spliced_bytes").unwrap_or(0);
        self.summed_up = true;
    }

    /// The test binary was broken off by something that is no fault of its own, and is to go on. Gives how many tests are done.
    pub fn broken_off(&mut self, why: &str) -> u64 {
        self.before = self.verdicts;
        self.report.again.push(why.to_owned());
        self.before.0 + self.before.1
    }

    /// The run is over. `problem` is what the surroundings say: a panic, a time-out, an exit status.
    pub fn finish(mut self, exit: &Exit) -> Report {
        self.report.took = self.started.elapsed();
        let problem = match exit {
            Exit::Status(0) if !self.summed_up => Some("it ended without a summary".to_owned()),
            Exit::Status(0) if self.report.failed > self.before.1 => {
                Some("it exited 0 in spite of failures".to_owned())
            }
            Exit::Status(0) if self.unfiltered && self.report.passed == 0 => Some("it ran no test".to_owned()),
            Exit::Status(0) => None,
            Exit::Status(_) if self.summed_up && self.report.failed > 0 => None,
            Exit::Status(code) => Some(format!("it exited {code}")),
            Exit::Trouble(reason) => Some(reason.clone()),
        };
        if let Some(problem) = problem {
            self.report.problem.get_or_insert(problem);
        }
        if self.report.failed > 0 || self.report.problem.is_some() {
            let problem = self.report.problem.as_deref().unwrap_or("tests failed");
            progress::note(&format!(
                "[{}] {problem}; all that was printed is in {}",
                self.kernel,
                self.log_path.display()
            ));
        }
        self.report
    }
}

/// How a run ended, as its surroundings saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    Status(i32),
    Trouble(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(lines: &[&str], exit: &Exit) -> Report {
        let mut listener = Listener::showing("self-test", true, |_| {}).unwrap();
        lines.iter().for_each(|line| listener.take(line));
        listener.finish(exit)
    }

    #[test]
    fn a_run_counts_as_its_summary_says() {
        let summary = r#"SUMMARY {"kernel":"6.1","passed":2,"failed":0,"offloaded":7,"spliced_bytes":9}"#;
        let report = report(&["ok a", "again c: late", "ok c", summary], &Exit::Status(0));
        assert_eq!((report.passed, report.failed), (2, 0));
        assert_eq!((report.offloaded, report.spliced_bytes), (7, 9));
        assert_eq!(report.again, ["c: late"]);
        assert_eq!(report.problem, None);
    }

    #[test]
    fn a_run_that_goes_on_after_a_break_has_the_sum_of_both() {
        let mut listener = Listener::showing("self-test", true, |_| {}).unwrap();
        ["ok a (1.0)", "FAILED b: late (2.0)", "note: c: half"].iter().for_each(|line| listener.take(line));
        assert_eq!(listener.broken_off("the guest: it went down"), 2);
        [r#"SUMMARY {"passed":1,"failed":0}"#].iter().for_each(|line| listener.take(line));
        let report = listener.finish(&Exit::Status(0));
        assert_eq!((report.passed, report.failed, report.problem), (2, 1, None));
        assert_eq!(report.again, ["the guest: it went down"]);
    }

    #[test]
    fn a_run_that_breaks_off_or_runs_nothing_has_failed() {
        assert!(report(&["ok a"], &Exit::Status(0)).problem.is_some());
        assert!(report(&["ok a"], &Exit::Trouble("panic".into())).problem.is_some());
        let nothing = r#"SUMMARY {"passed":0,"failed":0}"#;
        assert!(report(&[nothing], &Exit::Status(0)).problem.is_some());
        let liar = r#"SUMMARY {"passed":1,"failed":1}"#;
        assert!(report(&[liar], &Exit::Status(0)).problem.is_some());
        assert!(report(&["FAILED b", liar], &Exit::Status(1)).problem.is_none());
    }
}
