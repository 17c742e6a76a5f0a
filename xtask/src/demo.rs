//! Builds the release program and shows it: a certificate made on the spot, a built-in page, on loopback.

use crate::first_process::{cargo, workspace};
use crate::setup::{self, Group};
use anyhow::{Context, Result};
use clap::Args;
use std::ffi::OsString;
use std::process::Command;

/// Build tlsplice and let it show itself.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Arguments of `tlsplice demo`, such as --once.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// `cargo xtask demo`.
pub fn command(options: &Options) -> Result<i32> {
    setup::make_sure(&[Group::Build])?;
    let mut cargo = Command::new(cargo());
    cargo.args(["run", "--release", "--package", "tlsplice", "--bin", "tlsplice", "--", "demo"]);
    let status = cargo.args(&options.arguments).current_dir(workspace()).status().context("start cargo run")?;
    Ok(status.code().unwrap_or(1))
}
