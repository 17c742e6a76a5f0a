//! Staples: one for each chain, from the file beside it or from its responder.
//!
//!   file beside the chain ─good?─▶ staple            past half of its life ─▶ responder ─▶ verified ─▶ file, for the fleet
//!                         └─no─▶ responder, with back-off
//!
//! Whatever is not good and current is not stapled. A certificate without a responder misses nothing: that is normal.
//! Runs on the control thread; files are read and written on threads of their own.

use super::start::Terminator;
use super::upkeep::jittered;
use crate::config::Ocsp;
use crate::tls::certificates::{Certificates, Served};
use crate::tls::judge::Shape;
use crate::tls::ocsp::{self, Staple};
use crate::tls::source::STAPLE_ENDING;
use crate::tls::x509::Seen;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::task::JoinHandle;

/// One question, from the name's look-up to the last byte.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_MAX_BYTES: usize = 64 << 10;
/// The longest wait before a responder that fails is asked again: ten minutes by default.
const RETRY_MAX_POLLS: u32 = 60;
const RETRY_FIRST_POLLS: u32 = 3;
/// A staple that ends within so many polls is not stapled any more.
const MARGIN_POLLS: u32 = 2;

/// What is known of one certificate's staple.
#[derive(Default)]
struct Known {
    staple: Option<Staple>,
    failures: u32,
    not_before: Option<Instant>,
    said: Option<String>,
}

/// By the leaf's serial and key.
type Id = Vec<u8>;

/// All of them.
#[derive(Default)]
pub(super) struct Staples(HashMap<Id, Known>);

/// One certificate to look after.
pub(super) struct Item {
    id: Id,
    leaf: Seen,
    issuer: Seen,
    file: PathBuf,
    held: Option<Staple>,
    /// The responder may be asked.
    may_fetch: bool,
}

/// What came of it.
pub(super) struct Checked {
    id: Id,
    staple: Option<Staple>,
    fetched: Option<Result<(), String>>,
}

fn id(leaf: &Seen) -> Id {
    [leaf.serial.as_slice(), &leaf.key_info].concat()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The certificate that issued the leaf, if it is in the chain.
fn issuer(served: &Served) -> Option<&Seen> {
    Shape::of(&served.chain).path.get(1).map(|place| &served.chain[*place])
}

fn staple_file(chain: &Path) -> PathBuf {
    let mut name = chain.as_os_str().to_owned();
    name.push(".");
    name.push(STAPLE_ENDING);
    PathBuf::from(name)
}

/// Staples from the files alone, for the start.
pub(super) fn from_files(certificates: Certificates, mode: Ocsp) -> Certificates {
    if mode == Ocsp::Off {
        return certificates;
    }
    let staples: Vec<_> = certificates
        .served()
        .iter()
        .map(|served| {
            let answer = fs::read(staple_file(&served.certificate_file)).ok()?;
            ocsp::verify(&answer, served.chain.first()?, issuer(served)?, now()).ok().map(|staple| staple.der)
        })
        .collect();
    certificates.with_staples(&staples)
}

impl Terminator {
    /// Looks after all staples, without holding anything up.
    pub(super) fn check_staples(&self) -> JoinHandle<Vec<Checked>> {
        let mode = self.config.tls.ocsp;
        let items = self.certificates.served().iter().filter(|_| mode != Ocsp::Off).filter_map(|served| {
            let leaf = served.chain.first()?.clone();
            let known = self.staples.0.get(&id(&leaf));
            let waits = known.and_then(|known| known.not_before).is_some_and(|time| Instant::now() < time);
            Some(Item {
                id: id(&leaf),
                issuer: issuer(served)?.clone(),
                file: staple_file(&served.certificate_file),
                held: known.and_then(|known| known.staple.clone()),
                may_fetch: mode == Ocsp::Auto && !waits,
                leaf,
            })
        });
        let items: Vec<Item> = items.collect();
        tokio::spawn(check(items))
    }

    /// Serves what has changed.
    pub(super) fn checked_staples(&mut self, checked: Vec<Checked>) {
        if self.config.tls.ocsp == Ocsp::Off {
            // They were asked for before a reload that wants none.
            return;
        }
        let poll = self.config.tls.poll;
        let margin = (poll * MARGIN_POLLS).as_secs();
        for Checked { id, staple, fetched } in checked {
            let known = self.staples.0.entry(id).or_default();
            known.staple = staple.filter(|staple| staple.next_update > now() + margin);
            match fetched {
                Some(Ok(())) => {
                    (known.failures, known.not_before, known.said) = (0, None, None);
                    tracing::info!("ocsp: a fresh staple");
                }
                Some(Err(reason)) => {
                    known.failures += 1;
                    let polls = RETRY_FIRST_POLLS.saturating_mul(2_u32.saturating_pow(known.failures.min(20)));
                    let wait = poll * polls.min(RETRY_MAX_POLLS);
                    known.not_before = Some(Instant::now() + jittered(wait));
                    if known.said.as_ref() != Some(&reason) {
                        tracing::warn!(reason, has_staple = known.staple.is_some(), "ocsp: no fresh staple");
                        known.said = Some(reason);
                    }
                }
                None => {}
            }
        }
        self.serve_staples();
    }

    /// Gives the workers the staples that are good now, if that changes anything.
    fn serve_staples(&mut self) {
        let wanted: Vec<Option<Vec<u8>>> =
            self.certificates.served().iter().map(|served| self.staple_of(served)).collect();
        let served = self.certificates.served().iter().map(|served| &served.certified.ocsp);
        if served.eq(wanted.iter()) {
            return;
        }
        let stapled = wanted.iter().flatten().count();
        let certificates = self.certificates.clone().with_staples(&wanted);
        match self.serve(certificates) {
            Ok(()) => tracing::info!(stapled, of = wanted.len(), "ocsp: staples have changed"),
            Err(error) => tracing::error!(%error, "ocsp: staples could not be served"),
        }
    }

    fn staple_of(&self, served: &Served) -> Option<Vec<u8>> {
        let known = self.staples.0.get(&id(served.chain.first()?))?;
        known.staple.as_ref().map(|staple| staple.der.clone())
    }

    /// The staples that are known, put to certificates that were read anew.
    pub(super) fn stapled(&self, certificates: Certificates, mode: Ocsp) -> Certificates {
        if mode == Ocsp::Off {
            return certificates;
        }
        let staples: Vec<_> = certificates.served().iter().map(|served| self.staple_of(served)).collect();
        if staples.iter().all(Option::is_none) {
            return from_files(certificates, mode);
        }
        certificates.with_staples(&staples)
    }
}

async fn check(items: Vec<Item>) -> Vec<Checked> {
    let mut checked = Vec::with_capacity(items.len());
    for item in items {
        checked.push(check_one(item).await);
    }
    checked
}

async fn check_one(item: Item) -> Checked {
    let Item { id, leaf, issuer, file, held, may_fetch } = item;
    let path = file.clone();
    let read = tokio::task::spawn_blocking(move || fs::read(path).ok()).await.ok().flatten();
    let from_file = read.and_then(|answer| ocsp::verify(&answer, &leaf, &issuer, now()).ok());
    // What another node, or the operator, has put there may be fresher than what is held.
    let held = held.filter(|held| held.next_update > now());
    let best = match (held, from_file) {
        (Some(held), Some(file)) if file.next_update <= held.next_update => Some(held),
        (held, file) => file.or(held),
    };
    let is_fresh = best.as_ref().is_some_and(|staple| now() < staple.half_life());
    let Some(responder) = leaf.ocsp_responder.clone().filter(|_| may_fetch && !is_fresh) else {
        return Checked { id, staple: best, fetched: None };
    };
    let answer = match ocsp::request(&leaf, &issuer) {
        Some(request) => fetch(&responder, request).await,
        None => Err("the issuer's key cannot be read".to_owned()),
    };
    let verified = answer.and_then(|answer| {
        ocsp::verify(&answer, &leaf, &issuer, now()).map_err(|why| format!("{responder} about {}: {why}", leaf.name()))
    });
    match verified {
        Ok(staple) => {
            let bytes = staple.der.clone();
            let written = tokio::task::spawn_blocking(move || write(&file, &bytes)).await;
            if let Ok(Err(error)) = written {
                tracing::info!(%error, "ocsp: the staple is kept in this process alone");
            }
            Checked { id, staple: Some(staple), fetched: Some(Ok(())) }
        }
        Err(reason) => Checked { id, staple: best, fetched: Some(Err(reason)) },
    }
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
