//! Every certificate file's bytes, read in one go, with a hash that says whether anything has changed.
//!
//!   paths ─▶ folders (one level, hidden files and staples left out) ─▶ bytes and modes ─▶ Source { files, faults, hash }
//!
//! What is judged and served is what was hashed: nothing is read twice. Times and notifications play no part, since
//! network file systems get both wrong.

use super::certificates::Fault;
use super::pem;
use aws_lc_rs::digest::{Context, SHA256};
use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// The ending of a staple's file, which lies beside its chain.
pub const STAPLE_ENDING: &str = "ocsp";
/// Names the paths that a last good copy was made from.
const SOURCES: &str = ".sources";
const CURRENT: &str = "current";

/// One file.
pub(super) struct File {
    pub(super) path: PathBuf,
    /// The configuration names this very file, so it has to hold something.
    pub(super) named: bool,
    pub(super) text: Zeroizing<Vec<u8>>,
    pub(super) mode: u32,
}

/// See the module.
pub struct Source {
    pub(super) files: Vec<File>,
    pub(super) faults: Vec<Fault>,
    pub(super) paths: Vec<PathBuf>,
    pub hash: [u8; 32],
}

impl Source {
    /// Reads everything that `paths` name. What cannot be read is among the faults.
    pub fn read(paths: &[PathBuf]) -> Self {
        let mut source = Self { files: Vec::new(), faults: Vec::new(), paths: paths.to_vec(), hash: [0; 32] };
        for path in paths {
            source.read_path(path);
        }
        source.hash = source.hashed();
        source
    }

    /// Where what was read lies.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    fn fault(&mut self, file: &Path, message: String) {
        self.faults.push(Fault { file: file.to_path_buf(), message });
    }

    fn read_path(&mut self, path: &Path) {
        if !path.is_dir() {
            return self.read_file(path.to_path_buf(), true);
        }
        let listed = fs::read_dir(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let mut files: Vec<PathBuf> = match listed {
            Ok(entries) => entries.into_iter().map(|entry| entry.path()).collect(),
            Err(error) => return self.fault(path, pem::unreadable(path, &error)),
        };
        // The order of a folder is that of its names, on every file system.
        files.sort();
        for file in files.into_iter().filter(|file| !is_left_out(file) && !file.is_dir() && is_there(file)) {
            self.read_file(file, false);
        }
    }

    fn read_file(&mut self, path: PathBuf, named: bool) {
        // FIFOs and sockets in a folder are none of ours.
        if !named && fs::metadata(&path).is_ok_and(|found| !found.is_file()) {
            return;
        }
        match pem::read(&path) {
            Ok((text, mode)) => self.files.push(File { path, named, text, mode }),
            Err(message) => self.fault(&path, message),
        }
    }

    fn hashed(&self) -> [u8; 32] {
        let mut context = Context::new(&SHA256);
        for file in &self.files {
            let path = file.path.as_os_str().as_bytes();
            for length in [path.len(), file.text.len()] {
                context.update(&(length as u64).to_be_bytes());
            }
            context.update(&file.mode.to_be_bytes());
            context.update(path);
            context.update(&file.text);
        }
        for fault in &self.faults {
            context.update(fault.message.as_bytes());
        }
        let mut hash = [0; 32];
        hash.copy_from_slice(context.finish().as_ref());
        hash
    }

    /// Keeps a copy on a local disk: a folder for each content, and a link that is swapped when it is complete.
    ///
    /// # Errors
    /// The call that failed, with its path.
    pub fn keep(&self, folder: &Path) -> io::Result<()> {
        let name = self.hash.iter().take(8).fold(String::from("set-"), |name, byte| format!("{name}{byte:02x}"));
        let place = folder.join(&name);
        if fs::read_link(folder.join(CURRENT)).is_ok_and(|link| link == Path::new(&name)) && place.is_dir() {
            return Ok(());
        }
        let at = |path: &Path, e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let private = || {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700);
            builder
        };
        private().create(folder).map_err(|e| at(folder, e))?;
        let _ = fs::remove_dir_all(&place);
        private().create(&place).map_err(|e| at(&place, e))?;
        let write = |name: &str, bytes: &[u8]| {
            let path = place.join(name);
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
            file.set_permissions(Permissions::from_mode(0o600))?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        for (index, file) in self.files.iter().enumerate() {
            write(&format!("{index:04}.pem"), &file.text).map_err(|e| at(&place, e))?;
        }
        write(SOURCES, &sources(&self.paths)).map_err(|e| at(&place, e))?;
        let link = folder.join(".current");
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(&name, &link).map_err(|e| at(&link, e))?;
        fs::rename(&link, folder.join(CURRENT)).map_err(|e| at(&link, e))?;
        fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| at(folder, e))?;
        // What was kept before is a key less on the disk.
        for old in fs::read_dir(folder).into_iter().flatten().flatten() {
            if old.file_name().to_string_lossy().starts_with("set-") && old.file_name() != name.as_str() {
                let _ = fs::remove_dir_all(old.path());
            }
        }
        Ok(())
    }

    /// The copy that `keep` made of these paths, if there is one.
    pub fn kept(folder: &Path, paths: &[PathBuf]) -> Option<Self> {
        let place = folder.join(CURRENT);
        if fs::read(place.join(SOURCES)).ok()? != sources(paths) {
            return None;
        }
        Some(Self::read(&[place.canonicalize().ok()?]))
    }
}

fn sources(paths: &[PathBuf]) -> Vec<u8> {
    paths.iter().flat_map(|path| [path.as_os_str().as_bytes(), b"\n"].concat()).collect()
}

/// Hidden files, staples, and what an editor or a copy has not finished.
fn is_left_out(path: &Path) -> bool {
    let hidden = path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"."));
    hidden || path.extension().is_some_and(|ending| ending == STAPLE_ENDING || ending == "tmp")
}

/// A link whose target is gone is a fault; a file that went between listing and reading was replaced.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_follows_content_and_names_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let paths = [folder.path().to_path_buf()];
        fs::write(folder.path().join("a"), "one").expect("written");
        let first = Source::read(&paths).hash;
        fs::write(folder.path().join("a"), "one").expect("written");
        fs::write(folder.path().join("a.ocsp"), "a staple").expect("written");
        fs::write(folder.path().join(".b"), "hidden").expect("written");
        assert_eq!(Source::read(&paths).hash, first);
        fs::write(folder.path().join("a"), "two").expect("written");
        assert_ne!(Source::read(&paths).hash, first);
    }

    #[test]
    fn a_copy_is_kept_for_its_paths_alone_and_replaces_the_one_before() {
        let (folder, kept) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let paths = [folder.path().to_path_buf()];
        for text in ["one", "two"] {
            fs::write(folder.path().join("a"), text).expect("written");
            Source::read(&paths).keep(kept.path()).expect("kept");
        }
        let copy = Source::kept(kept.path(), &paths).expect("kept");
        assert_eq!(copy.files.iter().map(|file| file.text.to_vec()).collect::<Vec<_>>(), [b"two".to_vec()]);
        assert!(Source::kept(kept.path(), &["/elsewhere".into()]).is_none());
        let sets = fs::read_dir(kept.path()).expect("there").flatten();
        assert_eq!(sets.filter(|entry| entry.file_name().to_string_lossy().starts_with("set-")).count(), 1);
    }
}
