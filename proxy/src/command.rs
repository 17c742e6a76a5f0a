//! The commands, one file each. Each gives its exit code or the failure that has one.

pub mod check;
pub mod demo;
pub mod doctor;
pub mod grade;
pub mod metrics;
pub mod run;
pub mod top;

use crate::exit::Failure;
use std::io::{self, IsTerminal, Write};

/// Writes to stdout. A reader that has gone (`| head -1`) is no failure.
fn show(text: &str) {
    let _ = io::stdout().lock().write_all(text.as_bytes());
}

fn show_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Failure::Host(format!("write JSON: {e}")))?;
    show(&(text + "\n"));
    Ok(())
}

/// Colours, where a person looks on.
struct Paint {
    is_terminal: bool,
}

impl Paint {
    fn stdout() -> Self {
        Self { is_terminal: io::stdout().is_terminal() }
    }

    fn green(&self, text: &str) -> String {
        self.paint(32, text)
    }

    fn yellow(&self, text: &str) -> String {
        self.paint(33, text)
    }

    fn red(&self, text: &str) -> String {
        self.paint(31, text)
    }

    fn paint(&self, colour: u8, text: &str) -> String {
        if self.is_terminal { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// `tlsplice NAME` of the contract, which this version has not.
///
/// # Errors
/// Always `Usage`.
pub fn not_in_this_version(name: &str) -> Result<u8, Failure> {
    Err(Failure::Usage(format!("{name}: not in this version")))
}
