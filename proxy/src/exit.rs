//! How a command ends: the exit codes of the contract, and the words that go with them.

use std::process::ExitCode;

/// Exit code 0.
pub const FINE: u8 = 0;
/// Exit code of a check that found something.
pub const FOUND: u8 = 1;
/// Exit code of a wrong command line or configuration.
pub const USAGE: u8 = 2;
/// Exit code where the host refuses: permission, a port in use, no kTLS though it is required.
pub const HOST: u8 = 3;

/// Why a command cannot go on. What it displays is for people, and names what mends it.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A check found something.
    #[error("{0}")]
    Found(String),
    /// The command line or the configuration is wrong.
    #[error("{0}")]
    Usage(String),
    /// The host refuses.
    #[error("{0}")]
    Host(String),
}

impl Failure {
    pub fn code(&self) -> u8 {
        match self {
            Self::Found(_) => FOUND,
            Self::Usage(_) => USAGE,
            Self::Host(_) => HOST,
        }
    }

    /// Tells the person who called, and gives what `main` returns.
    pub fn report(&self) -> ExitCode {
        eprintln!("tlsplice: {self}");
        ExitCode::from(self.code())
    }
}
