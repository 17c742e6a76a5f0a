//! Builds tlsplice and the bench, fetches the peers, and measures: on this machine, or in user-mode Linux, where kernel TLS is.
//!
//!   build ─▶ peers (newest of Debian's, in the cache) ─▶ tlsplice-bench run ─▶ table, JSON, HTML in target/xtask/bench
//!
//! What `tlsplice-bench` does beside that (`compare`, `report`, `show`, `load`, `upstream`) is passed on to it as it is.

use crate::first_process::{cargo, target_folder, workspace};
use crate::setup::{self, Group};
use crate::{peers, process, uml};
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// Commands of `tlsplice-bench` that measure nothing here.
const PASSED_ON: [&str; 5] = ["compare", "report", "show", "load", "upstream"];
/// Memory of user-mode Linux: what uploads have sealed before they begin lies there.
const UML_MEMORY: &str = "6G";
/// User-mode Linux is ended after so long.
const UML_LIMIT_S: u64 = 3600;

/// Measure tlsplice beside its peers. Options of `tlsplice-bench run` follow; or one of its other commands.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Where to measure.
    #[arg(long, value_enum, default_value = "host")]
    kernel: Place,
    /// Options such as --quick, --limit, --peers tlsplice,nginx-http; or compare, report, show, load, upstream.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Place {
    /// This machine.
    Host,
    /// User-mode Linux, with kernel TLS.
    Uml,
}

/// `cargo xtask bench`.
pub fn command(options: &Options) -> Result<i32> {
    setup::make_sure(&[Group::Build])?;
    let first = options.arguments.first().and_then(|word| word.to_str()).unwrap_or_default();
    if PASSED_ON.contains(&first) {
        let bench = build(&["tlsplice-bench"])?.join("tlsplice-bench");
        return status(Command::new(bench).args(&options.arguments));
    }
    let built = build(&["tlsplice", "tlsplice-bench"])?;
    let (bench, tlsplice) = (built.join("tlsplice-bench"), built.join("tlsplice"));
    let mut words: Vec<OsString> = vec![bench.clone().into(), "run".into()];
    let has = |option: &str| {
        let text = options.arguments.iter().map(|word| word.to_string_lossy());
        text.into_iter().any(|word| word == option || word.starts_with(&format!("{option}=")))
    };
    // What was said comes last and wins; what was not said is given.
    if !has("--tlsplice") {
        words.extend(["--tlsplice".into(), tlsplice.into()]);
    }
    if !has("--peers-root") && (!has("--peers") || names_another(&options.arguments)) {
        words.extend(["--peers-root".into(), peers::newest()?.into()]);
    }
    let place = match options.kernel {
        Place::Host => "host",
        Place::Uml => "uml",
    };
    let stem = results()?.join(format!("{place}{}", if has("--curve") { "-curve" } else { "" }));
    for (option, extension) in [("--json", "json"), ("--html", "html")] {
        if !has(option) {
            words.extend([option.into(), stem.with_extension(extension).into()]);
        }
    }
    words.extend(["--commit".into(), commit().into()]);
    match options.kernel {
        Place::Host => {
            words.extend(options.arguments.clone());
            status(Command::new(&words[0]).args(&words[1..]))
        }
        Place::Uml => {
            let native = process::text(Command::new(&bench).arg("call-cost"))?;
            words.extend(["--native-call-ns".into(), native.trim().into()]);
            words.extend(options.arguments.clone());
            uml::command(&uml::Options {
                mem: UML_MEMORY.into(),
                cpu: "auto".into(),
                timeout: UML_LIMIT_S,
                env: Vec::new(),
                command: words,
            })
        }
    }
}

/// Whether any peer beside tlsplice is asked for.
fn names_another(arguments: &[OsString]) -> bool {
    let mut words = arguments.iter().map(|word| word.to_string_lossy());
    let names = words.clone().find_map(|word| Some(word.strip_prefix("--peers=")?.to_owned()));
    let names = names.or_else(|| words.by_ref().skip_while(|word| word != "--peers").nth(1).map(Into::into));
    names.is_some_and(|names| names.split(',').any(|name| !name.starts_with("tlsplice")))
}

fn build(programs: &[&str]) -> Result<PathBuf> {
    let mut build = Command::new(cargo());
    build.args(["build", "--release"]).current_dir(workspace());
    for program in programs {
        build.args(["--package", program, "--bin", program]);
    }
    process::run(&mut build)?;
    Ok(target_folder().join("release"))
}

fn status(command: &mut Command) -> Result<i32> {
    let status = command.status().with_context(|| format!("start {}", process::shown(command)))?;
    Ok(status.code().unwrap_or(1))
}

/// Where results go that nobody asked to keep.
pub fn results() -> Result<PathBuf> {
    let folder = target_folder().join("xtask/bench");
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    Ok(folder)
}

/// The commit that is measured, with a mark if the tree has more than it.
fn commit() -> String {
    let git = |arguments: &[&str]| process::text(Command::new("git").args(arguments).current_dir(workspace()));
    let Ok(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".into() };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_ok_and(|text| !text.trim().is_empty());
    format!("{}{}", commit.trim(), if changed { " and changes" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_fetched_only_for_those_who_ask() {
        let asks = |words: &[&str]| names_another(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert!(!asks(&["--quick", "--peers", "tlsplice,tlsplice-http", "--limit"]));
        assert!(!asks(&["--peers=tlsplice"]));
        assert!(asks(&["--peers", "tlsplice,hitch"]));
        assert!(asks(&["--peers=nginx-http", "--quick"]));
    }
}
