//! An exchange's way down: heads and a body, from the upstream to the client.
//!
//!   upstream ─▶ answer ─▶ head, judged and written anew, with what came of the body ─▶ client
//!            └▶ body: sealed where it was received, or spliced │ chunks: taken apart, written anew ─▶ client

use super::chunk::{self, Decoder};
use super::downstream::PROMISED_PARTS;
use super::exchange::{Download, Exchange, Left, Outcome};
use super::framing::Body;
use super::head::Scanner;
use super::near::HEAD_READ_BYTES;
use super::refusal::Refusal;
use super::response::{Asked, Kind, Response};
use crate::observe::counters::End;
use crate::relay::user_tls::Sealed;
use crate::relay::{COPY_BYTES, Ended, Scratch, TURN_BYTES, Turn};
use crate::sys::socket;
use std::task::{Context, Poll};

/// Interim responses to one request: a 100 and a few hints. More is an upstream that never answers.
const INTERIM_RESPONSES: u32 = 16;

impl Exchange {
    pub(super) fn turn_down(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<Turn, Outcome> {
        let mut budget = TURN_BYTES;
        loop {
            if !self.near.downstream.flush(cx).map_err(Outcome::Ended)? {
                return Ok(Turn::Wait);
            }
            if matches!(self.download, Download::Head) && self.understand(scratch)? {
                continue;
            }
            let waits = !self.upstream.readable && !self.near.downstream.is_in_flight();
            if waits || matches!(self.download, Download::Done | Download::Switched) {
                self.near.downstream.rest();
                return Ok(Turn::Wait);
            }
            // Reads on the way to the door become exact, and what is sealed must have gone out.
            if self.near.is_at_door() {
                return Ok(Turn::Wait);
            }
            if budget == 0 {
                return Ok(Turn::Again);
            }
            let moved = match &mut self.download {
                Download::Head => Poll::Ready(self.read_answer(scratch)?),
                Download::Body(Left::Chunked(_)) => Poll::Ready(self.copy_chunks(scratch)?),
                Download::Body(_) => self.forward(cx, scratch)?,
                Download::Done | Download::Switched => Poll::Ready(None),
            };
            let Poll::Ready(Some(moved)) = moved else {
                self.near.downstream.rest();
                return Ok(Turn::Wait);
            };
            budget = budget.saturating_sub(moved.max(1));
        }
    }

    /// Receives from the upstream into memory. `Ok(None)`: nothing is there. `Ok(Some(0))`: its FIN, or worse.
    fn recv(&mut self, scratch: &mut Scratch, max: usize) -> Option<Result<usize, ()>> {
        match socket::recv(self.upstream.fd(), &mut scratch.received[..max]) {
            Ok(n) => {
                self.upstream.received(n);
                self.upstream.readable = n == max;
                Some(Ok(n))
            }
            Err(e) if socket::is_again(&e) => {
                self.upstream.readable = false;
                None
            }
            Err(_) => Some(Err(())),
        }
    }

    fn read_answer(&mut self, scratch: &mut Scratch) -> Result<Option<usize>, Outcome> {
        match self.recv(scratch, HEAD_READ_BYTES) {
            None => Ok(None),
            Some(Ok(n)) if n > 0 => {
                self.answer.extend_from_slice(&scratch.received[..n]);
                Ok(Some(n))
            }
            Some(_) if self.reused && self.answer.is_empty() && self.interim == 0 && self.up_bytes == 0 => {
                Err(Outcome::Stale)
            }
            Some(_) if self.answer.is_empty() => {
                Err(Outcome::Refused(Refusal::bad_gateway("the upstream closed without a response")))
            }
            Some(_) => Err(Outcome::Refused(Refusal::bad_gateway("the upstream closed within a response head"))),
        }
    }

    /// Takes a head off the front of the answer. False: it is not complete.
    fn understand(&mut self, scratch: &mut Scratch) -> Result<bool, Outcome> {
        let refused = |refusal: Refusal| Outcome::Refused(refusal.of_upstream());
        let Some(extent) = self.scanner.scan(&self.answer, self.config.http.head_bytes).map_err(refused)? else {
            return Ok(false);
        };
        let is_key_short = self.near.downstream.is_key_short(PROMISED_PARTS);
        let client = self.near.downstream.client();
        let asked = Asked {
            to_head: self.request.is_head(),
            minor: self.request.minor,
            upgrade: self.request.upgrade.as_deref(),
            keep_alive: self.request.keep_alive
                && (self.near.gone.is_none() || !self.near.inbox.is_empty())
                && !client.watch.is_draining()
                && !is_key_short,
            hsts: &self.config.http.hsts,
        };
        let Response { status, kind, head, connection } =
            Response::parse(&self.answer[extent.start..extent.end], &asked).map_err(refused)?;
        self.answer.drain(..extent.end);
        self.scanner = Scanner::response();
        let mut out = head;
        match kind {
            Kind::Interim => {
                self.interim += 1;
                if self.interim > INTERIM_RESPONSES {
                    return Err(refused(Refusal::bad_gateway("more interim responses than one request can have")));
                }
            }
            Kind::Switched => {
                self.status = Some(status);
                self.near.downstream.client().watch.allow(self.config.limits.idle_timeout);
                self.download = Download::Switched;
                out.append(&mut self.answer);
            }
            Kind::Final { body, keep_client, keep_upstream } => {
                self.status = Some(status);
                (self.keep_client, self.keep_upstream) = (keep_client, keep_upstream);
                self.near.downstream.client().watch.allow(self.config.limits.idle_timeout);
                self.download = match body {
                    Body::None => Download::Done,
                    Body::Length(_) | Body::Chunked | Body::UntilClose => {
                        Download::Body(Left::of(body, self.config.http.head_bytes, &connection))
                    }
                };
                self.take_answer(&mut out)?;
            }
        }
        if !out.is_empty() {
            self.near.downstream.send(scratch, &out).map_err(Outcome::Ended)?;
        }
        Ok(true)
    }

    /// Appends what of the body came with its head, so that a small response is one record.
    fn take_answer(&mut self, out: &mut Vec<u8>) -> Result<(), Outcome> {
        let Download::Body(left) = &mut self.download else { return Ok(()) };
        let taken = match left {
            Left::Length(left) => {
                let len = usize::try_from(*left).unwrap_or(usize::MAX).min(self.answer.len());
                *left -= len as u64;
                out.extend_from_slice(&self.answer[..len]);
                self.down_bytes += len as u64;
                len
            }
            Left::UntilClose => {
                out.extend_from_slice(&self.answer);
                self.down_bytes += self.answer.len() as u64;
                self.answer.len()
            }
            Left::Chunked(decoder) => {
                let minor = self.request.minor;
                // Nothing of it has been passed on, so that the client can still be told.
                let fed = transcode(decoder, &self.answer, minor, out, &mut self.down_bytes);
                let fed = fed.map_err(|refusal| Outcome::Refused(refusal.of_upstream()))?;
                if fed.done {
                    self.download = Download::Done;
                }
                fed.consumed
            }
            Left::Nothing | Left::Abandoned => 0,
        };
        self.answer.drain(..taken);
        if self.answer.is_empty() {
            self.answer = Vec::new();
        }
        if matches!(self.download, Download::Body(Left::Length(0))) {
            self.download = Download::Done;
        }
        Ok(())
    }

    fn copy_chunks(&mut self, scratch: &mut Scratch) -> Result<Option<usize>, Outcome> {
        let n = match self.recv(scratch, COPY_BYTES) {
            None => return Ok(None),
            // The last chunk is missing: the client must not take this for all of it.
            Some(Ok(0) | Err(())) => return Err(Outcome::Ended(Ended::abort(End::UpstreamTruncated))),
            Some(Ok(n)) => n,
        };
        let Download::Body(Left::Chunked(decoder)) = &mut self.download else { return Ok(None) };
        let mut out = Vec::with_capacity(n + 64);
        let minor = self.request.minor;
        let fed = transcode(decoder, &scratch.received[..n], minor, &mut out, &mut self.down_bytes);
        let fed = fed.map_err(|_| Outcome::Ended(Ended::abort(End::BadResponse)))?;
        if fed.done {
            self.download = Download::Done;
            // Kept for what it means: the upstream has said too much.
            self.answer.extend_from_slice(&scratch.received[fed.consumed..n]);
        }
        if !out.is_empty() {
            self.near.downstream.send(scratch, &out).map_err(Outcome::Ended)?;
        }
        Ok(Some(n))
    }

    fn forward(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<Poll<Option<usize>>, Outcome> {
        let max = match &self.download {
            Download::Body(Left::Length(left)) => *left,
            _ => u64::MAX,
        };
        let Poll::Ready(sealed) = self.near.downstream.forward(cx, &mut self.upstream, scratch, max) else {
            return Ok(Poll::Pending);
        };
        let until_close = matches!(self.download, Download::Body(Left::UntilClose));
        match sealed.map_err(Outcome::Ended)? {
            Sealed::Bytes(n) => {
                self.down_bytes += n as u64;
                if let Download::Body(Left::Length(left)) = &mut self.download {
                    *left -= n as u64;
                    if *left == 0 {
                        self.download = Download::Done;
                    }
                }
                Ok(Poll::Ready(Some(n)))
            }
            Sealed::Nothing => Ok(Poll::Ready(None)),
            // A drain on the ring may have been told of the upstream's reset already, and will tell us.
            Sealed::Eof if until_close && self.up.is_sending() => Ok(Poll::Pending),
            Sealed::Eof if until_close && !self.cut_short => {
                self.download = Download::Done;
                Ok(Poll::Ready(Some(0)))
            }
            Sealed::Eof if !self.cut_short => Err(Outcome::Ended(Ended::abort(End::UpstreamTruncated))),
            Sealed::Eof | Sealed::Broken => Err(Outcome::Ended(Ended::abort(End::UpstreamReset))),
        }
    }
}

/// Takes chunks apart and writes them anew, or only what they carry for a client that knows none.
fn transcode(
    decoder: &mut Decoder,
    bytes: &[u8],
    minor: u8,
    out: &mut Vec<u8>,
    count: &mut u64,
) -> Result<chunk::Fed, Refusal> {
    let fed = decoder.feed(bytes, |data| {
        *count += data.len() as u64;
        if minor == 0 {
            out.extend_from_slice(data);
        } else {
            chunk::encode(data, out);
        }
    })?;
    if fed.done && minor == 1 {
        chunk::finish(decoder.trailers(), out);
    }
    Ok(fed)
}
