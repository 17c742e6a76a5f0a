//! Fuzzes whatever reads bytes of others: libFuzzer on the targets in `tests/fuzz`, one after the other, sharing the time.
//!
//!   cargo-fuzz build ─▶ target, corpus of the tree + what earlier runs found ─▶ figures, or a crash and its input
//!
//! What a run finds stays below cargo's target folder; `--keep` puts the inputs that reach anything new into the tree. The
//! stable compiler does, with its own switch for what is unstable: no second toolchain is needed.

use crate::cache;
use crate::first_process::{Crates, target_folder, workspace};
use crate::process::{self, Ended};
use crate::progress::{self, Progress};
use crate::setup::{self, Group};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Fuzz what reads bytes of others, and fail on a crash.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Of tests/fuzz/fuzz_targets; none: all of them.
    targets: Vec<String>,
    /// For all of them together.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Put what reaches anything new into the tree's corpus, minimised.
    #[arg(long)]
    keep: bool,
}

/// Far beyond what a slow machine takes.
const BUILD_LIMIT: Duration = Duration::from_secs(2 * 3600);
/// What libFuzzer may take beyond its time: for the corpus at the start, and for an input at the end.
const OVERTIME: Duration = Duration::from_secs(900);
/// One input that takes longer is reported as a crash.
const INPUT_SECONDS: u32 = 20;
/// Longer inputs find nothing that these do not.
const INPUT_BYTES: u32 = 8192;

/// What one target came to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    executions: u64,
    /// Edges of the program, instrumented ones.
    coverage: u64,
    /// Inputs that are kept because they reach something of their own.
    corpus: u64,
    crash: Option<String>,
}

/// `cargo xtask fuzz`.
pub fn command(options: &Options) -> Result<i32> {
    setup::make_sure(&[Group::Build])?;
    let all = targets()?;
    let targets = if options.targets.is_empty() { all.clone() } else { options.targets.clone() };
    if let Some(unknown) = targets.iter().find(|target| !all.contains(target)) {
        bail!("{unknown}: the targets are {}", all.join(", "));
    }
    let fuzzer = Fuzzer { program: setup::cargo_fuzz()?, minutes: options.minutes };
    fuzzer.build()?;
    let seconds = (options.minutes * 60 / targets.len() as u64).max(1);
    let mut rows = Vec::new();
    let mut crashes = Vec::new();
    for target in &targets {
        let figures = fuzzer.run(target, seconds)?;
        if let Some(crash) = &figures.crash {
            crashes.push(format!("{target}: {crash}"));
        } else if options.keep {
            fuzzer.keep(target)?;
        }
        progress::note(&format!("{target}: {figures:?}"));
        rows.push((target.clone(), figures));
    }
    for line in shown(&rows, seconds) {
        progress::line(&line);
    }
    ensure!(crashes.is_empty(), "{}", crashes.join("\n"));
    Ok(0)
}

/// The targets, by the files that they are.
fn targets() -> Result<Vec<String>> {
    let folder = place().join("fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let paths = entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "rs"));
    let mut names: Vec<String> =
        paths.filter_map(|path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned())).collect();
    names.sort();
    Ok(names)
}

fn place() -> PathBuf {
    workspace().join("tests/fuzz")
}

/// The corpus that is in the tree.
fn corpus(target: &str) -> PathBuf {
    place().join("corpus").join(target)
}

/// What runs have found, made if it is missing.
fn found(target: &str) -> Result<PathBuf> {
    let folder = target_folder().join("xtask/fuzz").join(target);
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    Ok(folder)
}

struct Fuzzer {
    program: PathBuf,
    minutes: u64,
}

impl Fuzzer {
    fn cargo_fuzz(&self, arguments: &[&str]) -> Command {
        let mut command = process::bound_to_us(&self.program);
        command.args(arguments).args(["--fuzz-dir"]).arg(place()).current_dir(workspace());
        // The sanitizer is unstable; this lets the stable compiler have it.
        command.env("RUSTC_BOOTSTRAP", "1").env("CARGO_TARGET_DIR", target_folder().join("xtask/fuzz-build"));
        command
    }

    fn build(&self) -> Result<()> {
        let mut said = Vec::new();
        let mut crates = Crates::new(format!("building the fuzz targets, for {} minutes of work", self.minutes));
        let ended = process::watch(&mut self.cargo_fuzz(&["build"]), BUILD_LIMIT, |line| {
            if !crates.count(line) {
                said.push(line.to_owned());
            }
        })?;
        ensure!(
            matches!(ended, Ended::Exited(status) if status.success()),
            "the fuzz targets do not build:\n{}",
            process::tail(&said.join("\n"))
        );
        Ok(())
    }

    fn run(&self, target: &str, seconds: u64) -> Result<Figures> {
        let mut command = self.cargo_fuzz(&["run", target]);
        // The first folder is the one that libFuzzer writes to.
        command.arg(found(target)?).arg(corpus(target)).arg("--").args([
            format!("-max_total_time={seconds}"),
            format!("-timeout={INPUT_SECONDS}"),
            format!("-max_len={INPUT_BYTES}"),
            "-print_final_stats=1".to_owned(),
        ]);
        let mut progress = Progress::new(format!("fuzzing {target} for {seconds} s"), 0, "executions");
        let mut figures = Figures::default();
        let mut said = Vec::new();
        let ended = process::watch(&mut command, Duration::from_secs(seconds) + OVERTIME, |line| {
            figures.take(line);
            progress.at(figures.executions);
            said.push(line.to_owned());
        })?;
        match ended {
            Ended::Exited(status) if status.success() => progress.finish(),
            Ended::Exited(_) => {
                progress::note(&process::tail(&said.join("\n")));
                figures.crash.get_or_insert_with(|| "it ended without a word".to_owned());
            }
            Ended::TimedOut => figures.crash = Some("it did not end when its time was up".to_owned()),
        }
        Ok(figures)
    }

    /// The smallest set of inputs, of the tree and of all runs, that together reach every edge that any of them reaches.
    fn keep(&self, target: &str) -> Result<()> {
        let (kept, found) = (corpus(target), found(target)?);
        let aside = cache::aside(&found);
        cache::remove(&aside)?;
        fs::create_dir_all(&aside).with_context(|| format!("create {}", aside.display()))?;
        let mut command = self.cargo_fuzz(&["run", target]);
        command.arg(&aside).arg(&kept).arg(&found).args(["--", "-set_cover_merge=1", "-use_counters=0"]);
        process::output(&mut command).with_context(|| format!("minimise the corpus of {target}"))?;
        cache::remove(&kept)?;
        copy(&aside, &kept)?;
        cache::remove(&aside)
    }
}

/// Another file system, so no rename.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))?.flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).with_context(|| format!("copy to {}", to.display()))?;
    }
    Ok(())
}

impl Figures {
    /// One of libFuzzer's lines: `#8192 NEW cov: 310 ft: 421 corp: 30/2Kb …`, its statistics, or where a crash's input is.
    fn take(&mut self, line: &str) {
        // A slow input is said and no failure; one that takes beyond the limit is written as a timeout.
        if let Some((_, path)) = line.split_once("Test unit written to ")
            && !path.contains("/slow-unit-")
        {
            self.crash = Some(path.trim().to_owned());
        }
        if let Some(count) = line.strip_prefix("stat::number_of_executed_units:").and_then(|n| n.trim().parse().ok()) {
            self.executions = count;
        }
        let Some(rest) = line.strip_prefix('#') else { return };
        let words: Vec<&str> = rest.split_whitespace().collect();
        let behind = |name: &str| {
            let at = words.iter().position(|word| *word == name)?;
            words.get(at + 1)?.split('/').next()?.parse().ok()
        };
        if let (Some(coverage), Some(executions)) = (behind("cov:"), words.first().and_then(|n| n.parse().ok())) {
            (self.coverage, self.executions) = (coverage, executions);
            self.corpus = behind("corp:").unwrap_or(self.corpus);
        }
    }
}

fn shown(rows: &[(String, Figures)], seconds: u64) -> Vec<String> {
    let mut lines =
        vec![format!("{:10} {:>8} {:>12} {:>9} {:>7}  crash", "target", "seconds", "executions", "coverage", "corpus")];
    for (target, Figures { executions, coverage, corpus, crash }) in rows {
        let crash = crash.as_deref().unwrap_or("none");
        lines.push(format!("{target:10} {seconds:8} {executions:12} {coverage:9} {corpus:7}  {crash}"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_what_libfuzzer_prints() {
        let mut figures = Figures::default();
        for line in [
            "INFO: Seed: 1",
            "#2\tINITED cov: 11 ft: 12 corp: 1/1b exec/s: 0 rss: 40Mb",
            "#8192\tNEW    cov: 310 ft: 421 corp: 30/2Kb lim: 80 exec/s: 4096 rss: 60Mb L: 8/80 MS: 1 ChangeBit-",
            "stat::number_of_executed_units: 9000",
        ] {
            figures.take(line);
        }
        assert_eq!(figures, Figures { executions: 9000, coverage: 310, corpus: 30, crash: None });
        figures.take("artifact_prefix='a/'; Test unit written to a/slow-unit-1");
        assert_eq!(figures.crash, None, "a busy machine is no crash");
        figures.take("artifact_prefix='a/'; Test unit written to a/crash-1");
        assert_eq!(figures.crash.as_deref(), Some("a/crash-1"));
    }
}
