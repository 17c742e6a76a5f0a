//! Builds, tests and demonstrates tlsplice. Each command is a file of its own; what they share lies beside them.

mod apt;
mod bench;
mod bzimage;
mod cache;
mod ci;
mod demo;
mod ebpf;
mod first_process;
mod fuzz;
mod image;
mod insn;
mod judges;
mod kernels;
mod peers;
mod process;
mod progress;
mod qemu;
#[allow(dead_code, reason = "the guest reads what is written here")]
mod request;
mod rootfs;
mod setup;
mod side_by_side;
mod suite;
mod table;
mod test;
mod uml;
mod uml_build;
mod uml_source;
mod unsafe_places;
mod vm;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Builds, tests and demonstrates tlsplice.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Setup(setup::Options),
    Demo(demo::Options),
    Bench(bench::Options),
    Fuzz(fuzz::Options),
    Insn(insn::Options),
    Test(test::Options),
    Vm(vm::Options),
    Uml(uml::Options),
    Ci(ci::Options),
}

fn main() -> ExitCode {
    match perform(Cli::parse().command) {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<i32> {
    match task {
        Task::Setup(options) => setup::command(&options),
        Task::Demo(options) => demo::command(&options),
        Task::Bench(options) => bench::command(&options),
        Task::Fuzz(options) => fuzz::command(&options),
        Task::Insn(options) => insn::command(&options),
        Task::Test(options) => test::command(&options),
        Task::Vm(options) => vm::command(&options),
        Task::Uml(options) => uml::command(&options),
        Task::Ci(options) => ci::command(&options),
    }
}
