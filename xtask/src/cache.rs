//! The folder outside the tree that keeps what takes minutes to fetch or to build, and how things get there: made aside,
//! put in place by one rename, under a lock, so that a break leaves nothing half done and two commands do not do it twice.

use anyhow::{Context, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// `$XDG_CACHE_HOME/tlsplice`, or `~/.cache/tlsplice`.
pub fn root() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => {
            let home = std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set: set one of them")?;
            PathBuf::from(home).join(".cache")
        }
    };
    let root = base.join("tlsplice");
    fs::create_dir_all(&root).with_context(|| format!("create the cache folder {}", root.display()))?;
    Ok(root)
}

/// A folder of the cache, made if it is missing.
pub fn folder(name: &str) -> Result<PathBuf> {
    let path = root()?.join(name);
    fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
    Ok(path)
}

/// Held while something of the cache is made; let go when dropped, and by the system when the process dies.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the lock lives as long as the open file")] File);

/// Waits for the lock of that name.
pub fn lock(name: &str) -> Result<Lock> {
    let path = folder("locks")?.join(name);
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("{name}: another command is at it, waiting for it to finish");
        file.lock().with_context(|| format!("lock {}", path.display()))?;
    }
    Ok(Lock(file))
}

/// Puts a finished file or folder in its place, in the stead of what was there.
pub fn put_in_place(made: &Path, place: &Path) -> Result<()> {
    remove(place)?;
    fs::rename(made, place).with_context(|| format!("rename {} to {}", made.display(), place.display()))
}

/// Where something is made before it is put in its place: beside it.
pub fn aside(place: &Path) -> PathBuf {
    let mut name = place.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Removes a file or folder; that there is none is fine.
pub fn remove(path: &Path) -> Result<()> {
    let Ok(kind) = fs::symlink_metadata(path) else { return Ok(()) };
    let removed = if kind.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.with_context(|| format!("remove {}", path.display()))
}

/// Writes a file so that readers see the old content or the new, never a part.
pub fn write(path: &Path, content: &[u8]) -> Result<()> {
    let mut aside = aside(path).into_os_string();
    aside.push(std::process::id().to_string());
    let aside = PathBuf::from(aside);
    fs::write(&aside, content).with_context(|| format!("write {}", aside.display()))?;
    fs::rename(&aside, path).with_context(|| format!("rename to {}", path.display()))
}

/// Whether a file was written less than `limit` ago.
pub fn is_fresh(path: &Path, limit: Duration) -> bool {
    let age = fs::metadata(path).and_then(|m| m.modified()).map(|at| SystemTime::now().duration_since(at));
    matches!(age, Ok(Ok(age)) if age < limit)
}

/// A short name for a content: the same content, the same name. It guards against stale builds, not against malice.
pub fn fingerprint(parts: &[&[u8]]) -> String {
    // FNV-1a, 64 bits: stable across compilers, which the standard library's hasher does not promise to be.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        for byte in part.iter().chain(&[0]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_tell_contents_and_their_borders_apart() {
        assert_eq!(fingerprint(&[b"a", b"b"]), fingerprint(&[b"a", b"b"]));
        assert_ne!(fingerprint(&[b"ab", b""]), fingerprint(&[b"a", b"b"]));
    }
}
