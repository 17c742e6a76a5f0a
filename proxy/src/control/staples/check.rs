//! One check of all staples: files are read, responders asked, some at a time, and each of these ends in time.
//!
//!   Item ─▶ file ─▶ the newer of it and what is held ─past half of its life─▶ responder ─newer?─▶ file ─▶ Checked
//!
//! This module decides nothing that lasts: when to ask again and what is served is the caller's.

use super::{Id, newer, now};
use crate::tls::ocsp::{self, Staple};
use crate::tls::x509::Seen;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// One question, from the name's look-up to the last byte.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// Reading or writing one file; on a share that is well it takes milliseconds.
const FILE_TIMEOUT: Duration = Duration::from_secs(5);
/// Certificates that are looked after at once, and so threads that a share which hangs can hold.
const CHECKS_AT_ONCE: usize = 16;
const ANSWER_MAX_BYTES: usize = 64 << 10;

/// One certificate to look after.
pub(super) struct Item {
    pub(super) id: Id,
    pub(super) leaf: Seen,
    pub(super) issuer: Seen,
    pub(super) file: PathBuf,
    pub(super) held: Option<Staple>,
    /// The responder may be asked.
    pub(super) may_fetch: bool,
}

/// What came of it.
pub(in crate::control) struct Checked {
    pub(super) id: Id,
    pub(super) staple: Option<Staple>,
    pub(super) asked: Asked,
}

/// What the responder had.
pub(super) enum Asked {
    Nobody,
    /// A staple that is newer than any before.
    Newer,
    /// Nothing of use, and why.
    InVain(String),
}

/// Calls on files, each on a thread of its own and for a limited time. While one hangs no other begins: a share hangs as a
/// whole, and would take a thread at every check.
#[derive(Clone, Default)]
pub(super) struct Files {
    hanging: Arc<AtomicUsize>,
}

impl Files {
    async fn call<T: Send + 'static>(&self, call: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        let hangs = || io::Error::new(io::ErrorKind::TimedOut, "the share hangs");
        if self.hanging.load(Ordering::Relaxed) > 0 {
            return Err(hangs());
        }
        let mut calling = tokio::task::spawn_blocking(call);
        if let Ok(called) = tokio::time::timeout(FILE_TIMEOUT, &mut calling).await {
            return called.unwrap_or_else(|e| Err(io::Error::other(e)));
        }
        let hanging = Arc::clone(&self.hanging);
        if hanging.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!("ocsp: a file beside a chain takes long, the share hangs");
        }
        tokio::spawn(async move {
            let _ = calling.await;
            hanging.fetch_sub(1, Ordering::Relaxed);
        });
        Err(hangs())
    }
}

pub(super) async fn check(items: Vec<Item>, files: Files) -> Vec<Checked> {
    let turns = Arc::new(Semaphore::new(CHECKS_AT_ONCE));
    let mut checks = JoinSet::new();
    for item in items {
        let (turns, files) = (Arc::clone(&turns), files.clone());
        checks.spawn(async move {
            let _turn = turns.acquire().await;
            check_one(item, &files).await
        });
    }
    let mut checked = Vec::with_capacity(checks.len());
    while let Some(one) = checks.join_next().await {
        checked.extend(one);
    }
    checked
}

async fn check_one(item: Item, files: &Files) -> Checked {
    let Item { id, leaf, issuer, file, held, may_fetch } = item;
    let path = file.clone();
    let read = files.call(move || read(&path)).await.ok();
    let from_file = read.and_then(|answer| ocsp::verify(&answer, &leaf, &issuer, now()).ok());
    // What another node, or the operator, has put there may be fresher than what is held.
    let best = newer(from_file, held.filter(|held| held.next_update > now()));
    let is_fresh = best.as_ref().is_some_and(|staple| now() < staple.half_life());
    let Some(responder) = leaf.ocsp_responder.clone().filter(|_| may_fetch && !is_fresh) else {
        return Checked { id, staple: best, asked: Asked::Nobody };
    };
    let answer = match ocsp::request(&leaf, &issuer) {
        Some(request) => fetch(&responder, request).await,
        None => Err("the issuer's key cannot be read".to_owned()),
    };
    let about = |why: &dyn std::fmt::Display| format!("{responder} about {}: {why}", leaf.name());
    let verified = answer.and_then(|answer| ocsp::verify(&answer, &leaf, &issuer, now()).map_err(|why| about(&why)));
    match verified {
        Ok(staple) if best.as_ref().is_none_or(|best| best.times() < staple.times()) => {
            let bytes = staple.der.clone();
            if let Err(error) = files.call(move || write(&file, &bytes)).await {
                tracing::info!(%error, "ocsp: the staple is kept in this process alone");
            }
            Checked { id, staple: Some(staple), asked: Asked::Newer }
        }
        Ok(_) => Checked { id, staple: best, asked: Asked::InVain(about(&"its answer is no newer than what is held")) },
        Err(reason) => Checked { id, staple: best, asked: Asked::InVain(reason) },
    }
}

/// A regular file, which is asked before it is opened: a FIFO would block there.
pub(super) fn read(file: &Path) -> io::Result<Vec<u8>> {
    if !fs::metadata(file)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "is no regular file"));
    }
    let mut answer = Vec::new();
    File::open(file)?.take(ANSWER_MAX_BYTES as u64).read_to_end(&mut answer)?;
    Ok(answer)
}

/// Beside the chain, whole or not at all.
fn write(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary = file.with_file_name(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_file(&temporary);
    let put = || {
        let mut new = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&temporary)?;
        new.write_all(bytes)?;
        new.sync_all()?;
        fs::rename(&temporary, file)
    };
    put().inspect_err(|_| drop(fs::remove_file(&temporary)))
}

/// Asks a responder by POST (RFC 6960 appendix A.1).
async fn fetch(url: &str, request: Vec<u8>) -> Result<Vec<u8>, String> {
    let said = |what: &str, e: &dyn std::fmt::Display| format!("{url}: {what}: {e}");
    let fetched = tokio::time::timeout(FETCH_TIMEOUT, async {
        let uri: hyper::Uri = url.parse().map_err(|e| said("address", &e))?;
        let host = uri.host().ok_or_else(|| format!("{url}: names no host"))?;
        let plain = host.trim_start_matches('[').trim_end_matches(']');
        let stream = tokio::net::TcpStream::connect((plain, uri.port_u16().unwrap_or(80)))
            .await
            .map_err(|e| said("connect", &e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream))
            .await
            .map_err(|e| said("connect", &e))?;
        let serving = tokio::spawn(connection);
        let authority = uri.authority().map_or(host, |authority| authority.as_str());
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let request = hyper::Request::post(path)
            .header(hyper::header::HOST, authority)
            .header(hyper::header::CONTENT_TYPE, "application/ocsp-request")
            .body(Full::new(Bytes::from(request)))
            .map_err(|e| said("request", &e))?;
        let answered = async {
            let response = sender.send_request(request).await.map_err(|e| said("request", &e))?;
            if !response.status().is_success() {
                return Err(format!("{url}: answers {}", response.status()));
            }
            let body = Limited::new(response.into_body(), ANSWER_MAX_BYTES).collect().await;
            body.map(|body| body.to_bytes().to_vec()).map_err(|e| said("answer", &e))
        };
        let answer = answered.await;
        serving.abort();
        answer
    });
    fetched.await.unwrap_or_else(|_| Err(format!("{url}: no answer within {} s", FETCH_TIMEOUT.as_secs())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[tokio::test]
    async fn a_call_that_hangs_is_left_and_no_other_begins_until_it_is_back() {
        let files = Files::default();
        let (share, hanging) = mpsc::channel::<()>();
        let left = files.call(move || hanging.recv().map_err(io::Error::other)).await;
        assert_eq!(left.expect_err("it hangs").kind(), io::ErrorKind::TimedOut);
        let (begun, other) = mpsc::channel::<()>();
        assert!(files.call(move || begun.send(()).map_err(io::Error::other)).await.is_err());
        assert!(other.recv().is_err(), "another call has begun");
        share.send(()).expect("somebody hangs");
        while files.hanging.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(files.call(|| Ok(7)).await.ok(), Some(7));
    }

    #[test]
    fn a_fifo_beside_a_chain_is_not_opened() {
        let folder = tempfile::tempdir().expect("a folder");
        let fifo = folder.path().join("a.pem.ocsp");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.is_ok_and(|status| status.success()));
        assert_eq!(read(&fifo).expect_err("it would block").kind(), io::ErrorKind::InvalidInput);
    }
}
