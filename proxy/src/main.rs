//! The command line of `tlsplice`.

use clap::{Parser, Subcommand};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use tlsplice::command;
use tlsplice::command::grade::Target;
use tlsplice::observe::ebpf::PINS;

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
    /// Run the terminator in the foreground (systemd: Type=notify)
    Run {
        /// The configuration; SIGHUP reads it and the certificates again
        #[arg(long, value_name = "FILE", default_value = CONFIG_FILE)]
        config: PathBuf,
    },
    /// Parse the configuration, load the certificates, say what this host would offload
    Check {
        #[arg(long, value_name = "FILE", default_value = CONFIG_FILE)]
        config: PathBuf,
        /// For machines
        #[arg(long)]
        json: bool,
    },
    /// Say what this host can offload; for each gap, one line that mends it
    Doctor {
        /// For machines
        #[arg(long)]
        json: bool,
    },
    /// Serve a built-in page on loopback, with a certificate made on the spot
    Demo {
        /// Fetch the page, tell what was negotiated and whether it was offloaded, and end
        #[arg(long)]
        once: bool,
        #[arg(long, value_name = "PORT", default_value_t = 8443, value_parser = clap::value_parser!(u16).range(1..))]
        port: u16,
    },
    /// The A+ report, and why not, by SSL Labs' rating guide: of a configuration, or of a live host
    Grade {
        #[arg(long, value_name = "FILE", default_value = CONFIG_FILE)]
        config: PathBuf,
        /// Grade this host instead
        #[arg(long, value_name = "HOST:PORT", conflicts_with = "config")]
        connect: Option<String>,
        /// The name to ask the host for
        #[arg(long, value_name = "NAME", requires = "connect")]
        sni: Option<String>,
        /// Roots to trust beside this host's own (PEM)
        #[arg(long, value_name = "FILE")]
        ca: Vec<PathBuf>,
        /// For machines
        #[arg(long)]
        json: bool,
    },
    /// One scrape, read from the pinned eBPF maps, whether a tlsplice runs or not
    Metrics {
        /// Where they are pinned: `metrics.pins` of the configuration
        #[arg(long, value_name = "FOLDER", default_value = PINS)]
        pins: PathBuf,
        /// OpenMetrics instead of the Prometheus text format
        #[arg(long)]
        openmetrics: bool,
    },
    /// The same, live, for a person
    Top {
        /// Tells where the maps are pinned and where the admin endpoint is
        #[arg(long, value_name = "FILE", default_value = CONFIG_FILE)]
        config: PathBuf,
        /// Instead of what the configuration says
        #[arg(long, value_name = "FOLDER")]
        pins: Option<PathBuf>,
        /// Instead of what the configuration says
        #[arg(long, value_name = "IP:PORT")]
        admin: Option<SocketAddr>,
        /// Print the tables once, with rates over a second, and end
        #[arg(long)]
        once: bool,
    },
}

/// Whatever the command will take once it is there.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
struct Later {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _arguments: Vec<String>,
}

const AFTER_HELP: &str = "\
Examples:
  tlsplice demo                                  see it work, then: curl -k https://127.0.0.1:8443/
  tlsplice doctor                                what this host offers, and what mends it
  tlsplice check --config tlsplice.toml          before a reload
  tlsplice grade --connect example.com:443       what SSL Labs would say
  tlsplice metrics                               what the kernel has counted so far
  tlsplice run --config tlsplice.toml            in the foreground; SIGHUP reloads, SIGTERM drains

Exit codes:
  0  fine
  1  a check found something
  2  usage or configuration
  3  the host refuses: permission, a port in use, no kernel TLS though it is required";

fn main() -> ExitCode {
    let ended = match Arguments::parse().command {
        Command::Run { config } => command::run::run(&config),
        Command::Check { config, json } => command::check::check(&config, json),
        Command::Doctor { json } => command::doctor::doctor(json),
        Command::Demo { once, port } => command::demo::demo(port, once),
        Command::Grade { config, connect, sni, ca, json } => {
            let target = match &connect {
                Some(to) => Target::Host { to, sni: sni.as_deref() },
                None => Target::Configuration(&config),
            };
            command::grade::grade(&target, &ca, json)
        }
        Command::Metrics { pins, openmetrics } => command::metrics::metrics(&pins, openmetrics),
        Command::Top { config, pins, admin, once } => {
            command::top::top(&command::top::Wanted { config: &config, pins, admin, once })
        }
    };
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.report(),
    }
}
