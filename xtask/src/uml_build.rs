//! User-mode Linux, as the cache has it.

use crate::cache;
use anyhow::{Result, bail};
use std::path::PathBuf;

/// The kernel as a program.
pub fn obtain() -> Result<PathBuf> {
    let folder = cache::folder("uml")?;
    let built = std::fs::read_dir(&folder)?.flatten().map(|entry| entry.path().join("linux"));
    match built.filter(|linux| linux.exists()).max() {
        Some(linux) => Ok(linux),
        None => bail!("{} holds no user-mode Linux", folder.display()),
    }
}
