//! `tlsplice run`: the terminator.

use crate::control;
use crate::control::start::{Terminator, read_certificates, read_config};
use crate::exit::{FINE, Failure};
use std::path::Path;

/// Serves by the file until a signal ends it.
///
/// # Errors
/// `Usage`: the file or its certificates. `Host`: what the host refuses.
pub fn run(file: &Path) -> Result<u8, Failure> {
    // A reload has to find it whatever happens to the working directory.
    let file = std::path::absolute(file).map_err(|e| Failure::Usage(format!("{}: {e}", file.display())))?;
    let config = read_config(&file)?;
    let loaded = read_certificates(&config)?;
    let terminator = Terminator::start(config, loaded, Some(file))?;
    let runtime = control::runtime()?;
    runtime.block_on(terminator.run(std::future::pending::<()>()))?;
    // Nothing is waited for: a thread that hangs on a file system would hold up the end.
    runtime.shutdown_background();
    Ok(FINE)
}
