//! The command line of `tlsplice`.

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use tlsplice::command;

const CONFIG_FILE: &str = "/etc/tlsplice/tlsplice.toml";

/// A TLS terminator that hands the record layer to the kernel and splices the rest.
#[derive(Parser)]
#[command(version, after_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the terminator in the foreground (systemd: Type=notify-reload)
    Run {
        /// The configuration; SIGHUP reads it again
        #[arg(long, value_name = "FILE", default_value = CONFIG_FILE)]
        config: PathBuf,
    },
}

const AFTER_HELP: &str = "\
Exit codes: 0 fine, 1 a check found something, 2 usage or configuration, 3 the host refuses";

fn main() -> ExitCode {
    let ended = match Arguments::parse().command {
        Command::Run { config } => command::run::run(&config),
    };
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.report(),
    }
}
