//! One PEM file: its certificates and private keys, and whether its permissions will do for a key.
//!
//! `read` knows the file system, `parse` does not.

use rustls::pki_types::pem::{PemObject, SectionKind};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs1KeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use zeroize::{Zeroize, Zeroizing};

/// A chain is some kilobytes, and a bundle of every public root is 250 KiB: what is larger is no PEM file of ours.
const FILE_MAX_BYTES: u64 = 1 << 20;
/// Read or write by the group or by others.
const OTHERS_MODE: u32 = 0o066;

/// What one file holds, in its order.
pub(super) struct PemFile {
    pub(super) certificates: Vec<CertificateDer<'static>>,
    pub(super) keys: Vec<Key>,
}

/// A private key; its bytes are overwritten when it is dropped.
pub(super) struct Key(PrivateKeyDer<'static>);

impl Key {
    pub(super) fn new(der: PrivateKeyDer<'static>) -> Self {
        Self(der)
    }

    pub(super) fn der(&self) -> &PrivateKeyDer<'static> {
        &self.0
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// The sections of a file's text. One without any of interest comes back empty.
///
/// # Errors
/// What is wrong with it and what mends it, without the path.
pub(super) fn parse(path: &Path, text: &[u8], mode: u32) -> Result<PemFile, String> {
    let mut file = PemFile { certificates: Vec::new(), keys: Vec::new() };
    for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(text) {
        let (kind, der) = section.map_err(|e| format!("is no sound PEM: {e}"))?;
        match kind {
            SectionKind::Certificate => file.certificates.push(CertificateDer::from(der)),
            SectionKind::PrivateKey => file.keys.push(Key(PrivatePkcs8KeyDer::from(der).into())),
            SectionKind::RsaPrivateKey => file.keys.push(Key(PrivatePkcs1KeyDer::from(der).into())),
            SectionKind::EcPrivateKey => file.keys.push(Key(PrivateSec1KeyDer::from(der).into())),
            // Public keys, requests and revocation lists may lie in the same folder. The enum is not ours.
            _ => {}
        }
    }
    if contains(text, b"-----BEGIN ENCRYPTED PRIVATE KEY-----") || contains(text, b"Proc-Type: 4,ENCRYPTED") {
        return Err(format!(
            "its private key is encrypted, and nobody is there to type a password: openssl pkey -in {} -out PLAIN.key",
            path.display()
        ));
    }
    if !file.keys.is_empty() && mode & OTHERS_MODE != 0 {
        return Err(format!(
            "holds a private key and has mode {:04o}: others may read or write it: chmod 600 {}",
            mode & 0o7777,
            path.display()
        ));
    }
    Ok(file)
}

/// Certificates of a file that need no key: roots to trust, or a chain to look at.
///
/// # Errors
/// It cannot be read, or is no sound PEM.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let (text, _) = read(path)?;
    CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>().map_err(|e| format!("is no sound PEM: {e}"))
}

/// The bytes of a regular file, and its mode. A handle that the file server has forgotten (ESTALE) is taken anew.
pub(super) fn read(path: &Path) -> Result<(Zeroizing<Vec<u8>>, u32), String> {
    read_once(path).or_else(|e| if is_stale(&e) { read_once(path) } else { Err(e) }).map_err(|e| e.0)
}

struct Unread(String, Option<i32>);

fn is_stale(error: &Unread) -> bool {
    error.1 == Some(libc::ESTALE)
}

fn read_once(path: &Path) -> Result<(Zeroizing<Vec<u8>>, u32), Unread> {
    let unread = |e: io::Error| Unread(unreadable(path, &e), e.raw_os_error());
    read_small(path, unread)
}

fn read_small(path: &Path, unread: impl Fn(io::Error) -> Unread) -> Result<(Zeroizing<Vec<u8>>, u32), Unread> {
    // Before it is opened: a FIFO would block there.
    let found = path.metadata().map_err(&unread)?;
    if !found.is_file() {
        return Err(Unread("is no regular file".to_owned(), None));
    }
    let file = File::open(path).map_err(&unread)?;
    let metadata = file.metadata().map_err(&unread)?;
    if metadata.len() > FILE_MAX_BYTES {
        let why = format!("has {} bytes: a PEM file of at most {FILE_MAX_BYTES} is expected", metadata.len());
        return Err(Unread(why, None));
    }
    // Room for all of it at once, so that no copy of a key is left behind by a growing buffer.
    let mut text = Zeroizing::new(Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0) + 1));
    file.take(FILE_MAX_BYTES).read_to_end(&mut text).map_err(&unread)?;
    Ok((text, metadata.permissions().mode()))
}

pub(super) fn unreadable(path: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => format!(
            "cannot be read by this user: {error}: chown it to the user that tlsplice runs as, and see that the \
             folders above let it pass (namei -l {})",
            path.display()
        ),
        // Every other kind has no mend of its own.
        _ => format!("cannot be read: {error}"),
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}
