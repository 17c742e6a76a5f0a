//! Mode "redirect": a listener without TLS that sends everybody to https, and answers ACME's challenges.
//!
//!   read_head ─▶ Request ─▶ /.well-known/acme-challenge/TOKEN ─▶ the file, or 404       anything else ─▶ 308
//!
//! Nothing reaches an upstream from here. A request with a body is answered without it, and closes.

use super::framing::Body;
use super::near::{Near, NoRequest, Patience};
use super::refusal::{Refusal, page};
use super::request::Request;
use super::serve::{closed, finish};
use super::target;
use crate::close::Closed;
use crate::config::Http;
use crate::observe::access::{Entry, Peer};
use crate::observe::counters::End;
use std::future::poll_fn;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const CHALLENGES: &str = "/.well-known/acme-challenge/";
/// A token is base64url (RFC 8555 section 8.3), so it names no other folder; this is longer than any in use.
const TOKEN_BYTES: usize = 128;
/// A key authorization is a token, a dot and a thumbprint.
const CHALLENGE_BYTES: u64 = 4096;

/// Answers requests until the connection is over.
pub async fn serve(near: Near, peer: Peer, http: &Http) -> Closed {
    let mut near = Box::new(near);
    let Http { head_timeout, keep_alive, head_bytes, .. } = *http;
    let mut patience = Patience { idle: head_timeout, head: head_timeout, limit: head_bytes, ends_in_drain: false };
    loop {
        let extent = match Box::pin(near.read_head(patience)).await {
            Ok(extent) => extent,
            Err(NoRequest::Over(how)) => return finish(near, how).await,
            Err(NoRequest::Ended(ended)) => return closed(*near, None, ended),
            Err(NoRequest::Refused(refusal)) => return refuse(near, Entry::new(None), refusal, false, peer).await,
        };
        let request = Request::parse(&near.inbox[extent.start..extent.end], peer.ip());
        near.take(extent.end);
        let request = match request {
            Ok(request) => request,
            Err(refusal) => return refuse(near, Entry::new(None), refusal, false, peer).await,
        };
        let mut entry = Entry::new(Some(&request));
        let keep = request.keep_alive && request.body == Body::None && !near.downstream.client().watch.is_draining();
        let (status, text) = match answer(&request, http, keep).await {
            Ok(answer) => answer,
            Err(refusal) => return refuse(near, entry, refusal, request.is_head(), peer).await,
        };
        let worker = near.downstream.client().worker.clone();
        (entry.status, entry.down_bytes) = (Some(status), text.len() as u64);
        entry.log(peer, &worker.counters, End::Clean);
        let sent = near.downstream.send(&mut worker.scratch.borrow_mut(), &text);
        if sent.is_err() || !keep {
            return finish(near, End::Clean).await;
        }
        (patience.idle, patience.ends_in_drain) = (keep_alive, true);
        if !near.inbox.is_empty() || near.downstream.is_readable() {
            // No upstream makes it wait: without this, a client that pipelines would hold the worker.
            poll_fn(|cx| near.downstream.client_mut().poll_next_turn(cx)).await;
        }
    }
}

async fn answer(request: &Request, http: &Http, keep: bool) -> Result<(u16, Vec<u8>), Refusal> {
    if let (Some(folder), Some(token)) = (&http.acme_challenge, request.path().strip_prefix(CHALLENGES)) {
        return Ok(match challenge(folder, token).await {
            Some(body) => (200, response("200 OK", "", &body, request, keep)),
            None => (404, response("404 Not Found", "", b"404 Not Found\n", request, keep)),
        });
    }
    // Behind https is another port, the one that a browser takes by itself.
    let host = target::without_port(&request.host);
    if host.is_empty() || request.target == "*" {
        return Err(Refusal::bad_request("nothing to redirect to"));
    }
    let location = format!("Location: https://{host}{}\r\n", request.target);
    Ok((308, response("308 Permanent Redirect", &location, b"308 Permanent Redirect\n", request, keep)))
}

/// The file's content; read on another thread, since the folder may be on a file system that makes one wait.
async fn challenge(folder: &Path, token: &str) -> Option<Vec<u8>> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if token.is_empty() || token.len() > TOKEN_BYTES || !token.bytes().all(legal) {
        return None;
    }
    let file = folder.join(token);
    tokio::task::spawn_blocking(move || read(&file).ok()).await.ok().flatten()
}

fn read(file: &PathBuf) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    std::fs::File::open(file)?.take(CHALLENGE_BYTES).read_to_end(&mut content)?;
    Ok(content)
}

fn response(status: &str, fields: &str, body: &[u8], request: &Request, keep: bool) -> Vec<u8> {
    let date = httpdate::fmt_http_date(SystemTime::now());
    let close = if keep { "" } else { "Connection: close\r\n" };
    let len = body.len();
    let mut text = format!(
        "HTTP/1.1 {status}\r\nDate: {date}\r\n{fields}Content-Type: text/plain; charset=utf-8\r\n\
         Content-Length: {len}\r\n{close}\r\n"
    )
    .into_bytes();
    if !request.is_head() {
        text.extend_from_slice(body);
    }
    text
}

async fn refuse(mut near: Box<Near>, mut entry: Entry, refusal: Refusal, to_head: bool, peer: Peer) -> Closed {
    // HSTS is not for a connection without TLS (RFC 6797 section 7.2).
    let text = page(refusal.status, entry.id, None, to_head);
    (entry.status, entry.refused) = (Some(refusal.status.code()), Some(refusal));
    let worker = near.downstream.client().worker.clone();
    entry.log(peer, &worker.counters, End::Refused);
    let how = match near.downstream.send(&mut worker.scratch.borrow_mut(), &text) {
        Ok(()) => End::Refused,
        Err(ended) => ended.how,
    };
    finish(near, how).await
}
