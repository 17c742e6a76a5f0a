//! What has to be clean beside the tests: format, lints, licences and sources of dependencies, and where `unsafe` occurs.

use crate::first_process::{cargo, workspace};
use crate::setup::{self, Group};
use crate::{process, progress, unsafe_places};
use anyhow::{Result, bail};
use clap::Args;
use std::io::IsTerminal;
use std::process::Command;

/// Check format, lints, dependencies, and where unsafe code is.
#[derive(Args, Clone, Debug)]
pub struct Options {}

/// A check's name and what it does.
type Check = (&'static str, fn() -> Result<()>);

/// `cargo xtask ci`: runs every check, then says which have failed.
pub fn command(_: &Options) -> Result<i32> {
    setup::make_sure(&[Group::Build, Group::Lint])?;
    let checks: [Check; 4] = [
        ("unsafe code only where it may be", || unsafe_places::check(&workspace())),
        ("format", format),
        ("lints", lints),
        ("licences, sources and versions of dependencies", dependencies),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        progress::note(&format!("checking: {name}"));
        if let Err(error) = check() {
            progress::note(&format!("FAILED: {name}: {error:#}"));
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("not clean: {}", failed.join("; "));
    }
    println!("all checks are clean");
    Ok(0)
}

fn cargo_run(arguments: &[&str]) -> Result<()> {
    process::run(Command::new(cargo()).args(arguments).current_dir(workspace()))
}

/// The fuzz targets are a workspace of their own, and nothing else here builds them.
const FUZZ_MANIFEST: &str = "tests/fuzz/Cargo.toml";

fn lints() -> Result<()> {
    cargo_run(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    cargo_run(&["clippy", "--manifest-path", FUZZ_MANIFEST, "--target-dir", "target", "--", "-D", "warnings"])
}

/// rustfmt colours its differences wherever they go, unless it is told not to.
fn format() -> Result<()> {
    let colour = if std::io::stdout().is_terminal() { "--color=always" } else { "--color=never" };
    cargo_run(&["fmt", "--all", "--check", "--", colour])?;
    cargo_run(&["fmt", "--manifest-path", FUZZ_MANIFEST, "--check", "--", colour])
}

/// cargo-deny, without its database of advisories, which has to be fetched.
fn dependencies() -> Result<()> {
    let mut deny = Command::new(setup::cargo_deny()?);
    deny.args(["--all-features", "check", "bans", "licenses", "sources"]).current_dir(workspace());
    process::run(&mut deny)
}
