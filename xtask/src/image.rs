//! A guest's files as one archive, the initramfs: programs with the libraries they need, and whatever is put beside them.
//!
//! The format is cpio's "newc" (Documentation/driver-api/early-userspace/buffer-format.rst), uncompressed: 100 MB cost about
//! a second at boot, decompressing them under emulation costs more.

use crate::process;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Types of entries, in the bits that `stat` has them in.
const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
/// Top folders that are links into `/usr`, as on every current system.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// The files, by their place in the guest.
#[derive(Debug, Default)]
pub struct Image {
    entries: BTreeMap<PathBuf, Entry>,
}

#[derive(Debug)]
enum Entry {
    Folder { mode: u32 },
    File { content: Vec<u8>, mode: u32 },
    Link { target: PathBuf },
}

impl Image {
    /// Nothing but the folders that every system has.
    pub fn new() -> Self {
        let mut image = Self::default();
        for top in MERGED {
            image.folder(Path::new("/usr").join(top), 0o755);
            image.entries.insert(Path::new("/").join(top), Entry::Link { target: Path::new("usr").join(top) });
        }
        for folder in ["/proc", "/sys", "/dev", "/run", "/etc", "/root", "/var/log", "/var/lib"] {
            image.folder(folder, 0o755);
        }
        image.folder("/tmp", 0o1777);
        image
    }

    /// A folder, and those above it.
    pub fn folder(&mut self, path: impl AsRef<Path>, mode: u32) {
        let path = usr_merged(path.as_ref());
        self.parents(&path);
        self.entries.entry(path).or_insert(Entry::Folder { mode });
    }

    /// A file with this content.
    pub fn content(&mut self, path: impl AsRef<Path>, content: impl Into<Vec<u8>>, mode: u32) {
        let path = usr_merged(path.as_ref());
        self.parents(&path);
        self.entries.insert(path, Entry::File { content: content.into(), mode });
    }

    /// A symbolic link, unless something is there already.
    pub fn link(&mut self, path: impl AsRef<Path>, target: impl Into<PathBuf>) {
        let path = usr_merged(path.as_ref());
        self.parents(&path);
        self.entries.entry(path).or_insert_with(|| Entry::Link { target: target.into() });
    }

    /// A file of the host's, with its permissions.
    pub fn file(&mut self, path: impl AsRef<Path>, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        let mode = fs::metadata(from).with_context(|| format!("read {}", from.display()))?.permissions().mode();
        self.content(path, content, mode & 0o7777);
        Ok(())
    }

    /// A program or library of the host's, with all libraries that it needs, where its loader looks for them.
    pub fn program(&mut self, path: impl AsRef<Path>, from: &Path) -> Result<()> {
        self.file(path, from)?;
        let libraries = libraries(from)?;
        for library in libraries {
            if !self.entries.contains_key(&usr_merged(&library)) {
                self.file(&library, &library)?;
            }
        }
        Ok(())
    }

    fn parents(&mut self, path: &Path) {
        for parent in path.ancestors().skip(1).filter(|parent| parent.parent().is_some()) {
            self.entries.entry(parent.into()).or_insert(Entry::Folder { mode: 0o755 });
        }
    }

    /// Writes the archive.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut bytes = Vec::new();
        for (inode, (name, entry)) in (1..).zip(&self.entries) {
            let name = name.strip_prefix("/").unwrap_or(name).as_os_str().as_bytes();
            match entry {
                Entry::Folder { mode } => put(&mut bytes, inode, name, FOLDER | mode, b""),
                Entry::File { content, mode } => put(&mut bytes, inode, name, FILE | mode, content),
                Entry::Link { target } => put(&mut bytes, inode, name, LINK | 0o777, target.as_os_str().as_bytes()),
            }
        }
        put(&mut bytes, 0, b"TRAILER!!!", 0, b"");
        let mut file = fs::File::create(path).with_context(|| format!("create {}", path.display()))?;
        file.write_all(&bytes).with_context(|| format!("write {}", path.display()))
    }
}

/// One entry: a header of eight-digit fields, the name, the content, both filled up to four bytes.
fn put(bytes: &mut Vec<u8>, inode: u32, name: &[u8], mode: u32, content: &[u8]) {
    let links = if mode & FOLDER == FOLDER { 2 } else { 1 };
    let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
    // inode, mode, owner, group, links, time, size, device (two), device that it is (two), name's size, checksum
    let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
    bytes.extend_from_slice(b"070701");
    for field in fields {
        bytes.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    bytes.extend_from_slice(name);
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// `/lib/x` as `/usr/lib/x`: the links among the top folders are ours to follow, a kernel that unpacks does not like them.
fn usr_merged(path: &Path) -> PathBuf {
    let top = path.components().nth(1).and_then(|c| c.as_os_str().to_str());
    match (top, path.strip_prefix("/")) {
        (Some(top), Ok(rest)) if MERGED.contains(&top) && path.components().count() > 2 => Path::new("/usr").join(rest),
        _ => path.to_owned(),
    }
}

/// The libraries and the loader that a dynamic program needs; none for a static one.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let Ok(text) = process::text(Command::new("ldd").arg(program)) else {
        return Ok(Vec::new()); // "not a dynamic executable"
    };
    let mut libraries = Vec::new();
    for line in text.lines().map(str::trim) {
        ensure!(!line.ends_with("not found"), "{} needs a library that is not here: {line}", program.display());
        // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)", or "/lib64/ld-linux-x86-64.so.2 (0x…)"
        let place = line.split_once("=> ").map_or(line, |(_, place)| place);
        let place = place.split_whitespace().next().unwrap_or_default();
        if place.starts_with('/') {
            libraries.push(PathBuf::from(place));
        }
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_cpio_reads() {
        let mut image = Image::new();
        image.content("/bin/hello", b"#!/bin/sh\n".to_vec(), 0o755);
        image.link("/etc/mtab", "/proc/mounts");
        let path = std::env::temp_dir().join(format!("xtask-image-{}", std::process::id()));
        image.write(&path).unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("{what} is missing"));
        assert!(at("usr/bin\0") < at("usr/bin/hello\0"), "a folder comes before what lies in it");
        assert!(text.contains("etc/mtab\0") && text.contains("/proc/mounts"));
        assert!(text.trim_end_matches('\0').ends_with("TRAILER!!!"));
    }

    #[test]
    fn libraries_lie_where_the_merged_folders_point() {
        assert_eq!(usr_merged(Path::new("/lib64/ld.so")), Path::new("/usr/lib64/ld.so"));
        assert_eq!(usr_merged(Path::new("/lib")), Path::new("/lib"));
        assert_eq!(usr_merged(Path::new("/etc/passwd")), Path::new("/etc/passwd"));
    }
}
