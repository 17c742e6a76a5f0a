//! One request and its response, both ways at once.
//!
//!             ┌ head ─▶ body (counted, or chunks taken apart and written anew) ─▶ upstream
//!   client ───┤
//!             └ ◀─ head ◀─ … 1xx … ◀─ body (counted, chunks, until close) ◀────── upstream
//!
//! Counted bodies and those until close are not looked at: userspace seals them where they were received, behind the
//! door they are spliced. Everything else goes through memory, in pieces of at most 128 KiB. A response may come before
//! its request is complete. A body that is cut short is never passed on as a whole one: its reader gets a reset.

use super::chunk::{self, Decoder};
use super::downstream::Downstream;
use super::framing::Body;
use super::head::Scanner;
use super::near::{HEAD_READ_BYTES, Near};
use super::refusal::{Refusal, Status};
use super::request::Request;
use super::response::{Asked, Kind, Response};
use crate::observe::counters::End;
use crate::protect::PLAIN_BYTES;
use crate::relay::flow::{Drained, Flow, Splicer};
use crate::relay::user_tls::Sealed;
use crate::relay::{COPY_BYTES, Client, Ended, Scratch, Spare, TURN_BYTES, Turn, Want};
use crate::ring::Sock;
use crate::sys::socket;
use crate::watch::Verdict;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// Interim responses to one request: a 100 and a few hints. More is an upstream that never answers.
const INTERIM_RESPONSES: u32 = 16;

/// What an exchange needs of the configuration.
#[derive(Debug, Clone)]
pub struct Rules {
    pub head_bytes: usize,
    pub hsts: String,
    pub response_timeout: Duration,
    pub idle_timeout: Duration,
}

/// See the module.
pub struct Exchange {
    pub near: Near,
    pub upstream: Sock,
    pub request: Request,
    pub rules: Rules,
    /// The upstream's connection has carried a request before.
    reused: bool,
    upload: Left,
    up: Flow,
    /// What the upstream has said and nobody has understood yet.
    answer: Vec<u8>,
    scanner: Scanner,
    download: Download,
    interim: u32,
    /// Of the final response, once its head is out.
    pub status: Option<u16>,
    keep_client: bool,
    keep_upstream: bool,
    pub up_bytes: u64,
    pub down_bytes: u64,
}

/// What is left of a body.
enum Left {
    Nothing,
    Length(u64),
    Chunked(Box<Decoder>),
    UntilClose,
    /// The upstream takes no more, or what came was no body.
    Abandoned,
}

enum Download {
    Head,
    Body(Left),
    /// Complete; for chunks in HTTP/1.0 or a body until close, so is the connection.
    Done,
    Switched,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The response is complete and sent.
    Complete {
        keep_client: bool,
        keep_upstream: bool,
    },
    /// The connection is another protocol's now.
    Switched,
    /// Nothing of a response was sent, and this is why.
    Refused(Refusal),
    /// An old connection was closed by the upstream before it said a word: a new one may do.
    Stale,
    /// The client stands at the door.
    AtDoor,
    Ended(Ended),
}

impl Left {
    fn of(body: Body, head_bytes: usize) -> Self {
        match body {
            Body::None => Self::Nothing,
            Body::Length(length) => Self::Length(length),
            Body::Chunked => Self::Chunked(Box::new(Decoder::new(head_bytes))),
            Body::UntilClose => Self::UntilClose,
        }
    }
}

impl Exchange {
    /// The request's head is sent first.
    pub fn new(near: Near, upstream: Sock, reused: bool, request: Request, rules: Rules) -> Self {
        let mut head = Spare::default();
        head.push(&request.head);
        let splicer = match &near.downstream {
            Downstream::Kernel(behind) => behind.tls.splicer(),
            Downstream::User(_) | Downstream::Plain(_) => Splicer::Inline,
        };
        let watch = &near.downstream.client().watch;
        watch.forgive();
        watch.allow(rules.response_timeout);
        Self {
            upload: Left::of(request.body, rules.head_bytes),
            up: Flow::new(splicer, head),
            near,
            upstream,
            request,
            rules,
            reused,
            answer: Vec::new(),
            scanner: Scanner::response(),
            download: Download::Head,
            interim: 0,
            status: None,
            keep_client: false,
            keep_upstream: false,
            up_bytes: 0,
            down_bytes: 0,
        }
    }

    /// Goes on until there is an outcome; behind `AtDoor` it can go on again.
    pub fn run(&mut self) -> Run<'_> {
        Run(self)
    }

    /// Takes the client through the door in the middle of a body.
    pub fn through_the_door(self) -> Result<Self, Box<(Client, Sock, Ended)>> {
        let Near { downstream, inbox, gone, .. } = self.near;
        match downstream.through_the_door() {
            Ok(downstream) => {
                let near = Near { downstream, inbox, gone, door: crate::relay::userspace::Door::Shut };
                Ok(Self { near, ..self })
            }
            Err(failed) => {
                let (client, ended) = *failed;
                Err(Box::new((client, self.upstream, ended)))
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Outcome> {
        let worker = self.near.downstream.client().worker.clone();
        loop {
            let turns = {
                let mut scratch = worker.scratch.borrow_mut();
                self.turn_up(cx, &mut scratch).and_then(|up| Ok((up, self.turn_down(cx, &mut scratch)?)))
            };
            let (up, down) = match turns {
                Ok(turns) => turns,
                Err(outcome) => return Poll::Ready(outcome),
            };
            if let Some(outcome) = self.outcome() {
                return Poll::Ready(outcome);
            }
            if self.near.is_at_door() {
                return Poll::Ready(Outcome::AtDoor);
            }
            if up == Turn::Again || down == Turn::Again {
                ready!(self.near.downstream.client_mut().poll_next_turn(cx));
                continue;
            }
            let want = self.want();
            if let Err(verdict) = ready!(self.near.poll_ready(cx, Some(&mut self.upstream), want)) {
                return Poll::Ready(self.timed_out(verdict));
            }
        }
    }

    fn upload_is_over(&self) -> bool {
        matches!(self.upload, Left::Nothing | Left::Abandoned)
    }

    /// All of the request has gone to the upstream, or no more of it will.
    fn has_uploaded(&self) -> bool {
        self.upload_is_over() && (self.up.fills() || matches!(self.upload, Left::Abandoned))
    }

    /// The upstream has all of the request, or the kernel has it for it.
    pub fn is_sent(&self) -> bool {
        matches!(self.upload, Left::Nothing) && self.up.fills()
    }

    fn outcome(&self) -> Option<Outcome> {
        if self.near.downstream.is_blocked() {
            return None;
        }
        let is_whole = self.is_sent();
        match self.download {
            Download::Done if !self.keep_client || self.has_uploaded() => Some(Outcome::Complete {
                keep_client: self.keep_client && is_whole,
                // Bytes behind a response are no answer to the next request.
                keep_upstream: self.keep_upstream && is_whole && self.answer.is_empty(),
            }),
            Download::Switched if self.has_uploaded() => Some(Outcome::Switched),
            Download::Done | Download::Switched | Download::Head | Download::Body(_) => None,
        }
    }

    fn timed_out(&self, verdict: Verdict) -> Outcome {
        if verdict == Verdict::Cut {
            return Outcome::Ended(Ended::abort(End::Drained));
        }
        match self.download {
            Download::Head if !self.upload_is_over() && self.up.fills() => {
                Outcome::Refused(Refusal::new(Status::RequestTimeout, "the client sends no more of its body"))
            }
            Download::Head => {
                Outcome::Refused(Refusal::new(Status::GatewayTimeout, "no response within http.response_timeout"))
            }
            Download::Body(_) | Download::Done | Download::Switched => Outcome::Ended(Ended::abort(End::Idle)),
        }
    }

    fn want(&self) -> Want {
        let (near, client) = (&self.near, &self.near.downstream.client().sock);
        let takes_body = !self.upload_is_over() && self.up.fills() && !self.up.is_in_flight() && near.inbox.is_empty();
        let reads_ahead = self.upload_is_over() && near.inbox.len() < HEAD_READ_BYTES;
        let blocked = near.downstream.is_blocked();
        let down_in_flight = near.downstream.is_in_flight();
        let reads_answer = matches!(self.download, Download::Head | Download::Body(_));
        Want {
            client_read: (takes_body || reads_ahead) && near.gone.is_none() && !client.readable,
            upstream_write: !self.has_uploaded()
                && !self.up.fills()
                && !self.up.is_in_flight()
                && !self.upstream.writable,
            upstream_read: reads_answer && !blocked && !down_in_flight && !self.upstream.readable,
            client_write: blocked && !down_in_flight && !client.writable,
        }
    }

    // ---- client to upstream

    fn turn_up(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<Turn, Outcome> {
        let mut budget = TURN_BYTES;
        loop {
            if !self.up.fills() && !matches!(self.upload, Left::Abandoned) && !self.drain_up(cx) {
                return Ok(Turn::Wait);
            }
            if self.upload_is_over() {
                self.up.rest();
                if !self.near.read_ahead(scratch, HEAD_READ_BYTES).map_err(Outcome::Ended)? {
                    return Ok(Turn::Wait);
                }
                budget = budget.saturating_sub(PLAIN_BYTES / 16);
            } else if budget == 0 {
            } else if !self.near.inbox.is_empty() {
                self.take_inbox()?;
                continue;
            } else if self.near.gone.is_some() {
                // A request without its end: nobody may take it for a whole one.
                return Err(Outcome::Ended(Ended::abort(End::ClientTruncated)));
            } else if !self.near.downstream.is_readable() && !self.up.is_in_flight() {
                self.up.rest();
                return Ok(Turn::Wait);
            } else {
                let Poll::Ready(moved) = self.fill_up(cx, scratch)? else { return Ok(Turn::Wait) };
                budget = budget.saturating_sub(moved.max(PLAIN_BYTES / 16));
            }
            if budget == 0 {
                return Ok(Turn::Again);
            }
        }
    }

    /// True when all has gone to the upstream.
    fn drain_up(&mut self, cx: &mut Context<'_>) -> bool {
        let counters = &self.near.downstream.client().worker.counters;
        match self.up.drain(cx, &mut self.upstream, |n| counters.up_spliced.add(n as u64)) {
            Ok(drained) => drained == Drained::Empty,
            Err(_) => {
                self.abandon();
                false
            }
        }
    }

    /// The upstream takes no more: it may still have an answer.
    fn abandon(&mut self) {
        self.upload = Left::Abandoned;
        self.up.rest();
    }

    fn fill_up(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<Poll<usize>, Outcome> {
        if let (Downstream::Kernel(behind), Left::Length(left)) = (&mut self.near.downstream, &mut self.upload)
            // No record is cut by the end of the body, which not every kernel's splice survives.
            && (*left >= PLAIN_BYTES as u64 || self.up.in_pipe() > 0 || self.up.is_in_flight())
        {
            if *left < PLAIN_BYTES as u64 && !self.up.is_in_flight() {
                self.up.turn_to_drain();
                return Ok(Poll::Ready(0));
            }
            let max = usize::try_from(*left).unwrap_or(usize::MAX);
            let Poll::Ready(received) = behind.fill_up(cx, &mut self.up, scratch, max) else {
                return Ok(Poll::Pending);
            };
            let received = received.map_err(Outcome::Ended)?;
            *left -= received.bytes as u64;
            self.up_bytes += received.bytes as u64;
            if *left == 0 {
                self.upload = Left::Nothing;
                self.up.turn_to_drain();
            }
            self.near.note(received.then).map_err(Outcome::Ended)?;
            return Ok(Poll::Ready(received.bytes));
        }
        let Some(received) = self.near.receive(scratch, COPY_BYTES).map_err(Outcome::Ended)? else {
            return Ok(Poll::Ready(0));
        };
        self.take_pieces(scratch)?;
        Ok(Poll::Ready(received.bytes))
    }

    /// Hands on what of the pieces belongs to the body, from where it lies; the rest is the next request's.
    fn take_pieces(&mut self, scratch: &mut Scratch) -> Result<(), Outcome> {
        let Left::Length(left) = &mut self.upload else {
            self.near.keep(&scratch.received, &scratch.pieces);
            return Ok(());
        };
        let mut ours = 0;
        for (n, piece) in scratch.pieces.iter_mut().enumerate() {
            let len = usize::try_from(*left).unwrap_or(usize::MAX).min(piece.len());
            *left -= len as u64;
            self.up_bytes += len as u64;
            if len < piece.len() {
                self.near.inbox.extend_from_slice(&scratch.received[piece.start + len..piece.end]);
            }
            piece.end = piece.start + len;
            ours = if len > 0 { n + 1 } else { ours };
        }
        let is_over = *left == 0;
        if self.up.hand_on(&self.upstream, &scratch.received, &scratch.pieces[..ours]).is_err() {
            self.abandon();
        } else if is_over {
            self.upload = Left::Nothing;
        }
        Ok(())
    }

    /// Takes the body's part of what was read ahead.
    fn take_inbox(&mut self) -> Result<(), Outcome> {
        match &mut self.upload {
            Left::Length(left) => {
                let len = usize::try_from(*left).unwrap_or(usize::MAX).min(self.near.inbox.len());
                *left -= len as u64;
                let is_over = *left == 0;
                self.up_bytes += len as u64;
                self.up.copy(&self.near.inbox[..len]);
                self.near.take(len);
                if is_over {
                    self.upload = Left::Nothing;
                }
            }
            Left::Chunked(decoder) => {
                let mut out = Vec::new();
                let before = self.up_bytes;
                let mut bytes = 0;
                let fed = decoder.feed(&self.near.inbox, |data| {
                    bytes += data.len() as u64;
                    chunk::encode(data, &mut out);
                });
                self.up_bytes = before + bytes;
                let fed = match fed {
                    Ok(fed) => fed,
                    Err(refusal) => return Err(self.refuse_body(refusal)),
                };
                if fed.done {
                    chunk::finish(decoder.trailers(), &mut out);
                    self.upload = Left::Nothing;
                }
                self.near.take(fed.consumed);
                self.up.copy(&out);
            }
            Left::Nothing | Left::UntilClose | Left::Abandoned => {}
        }
        Ok(())
    }

    /// A body that is none: the upstream never gets its end.
    fn refuse_body(&mut self, refusal: Refusal) -> Outcome {
        match self.download {
            Download::Head => Outcome::Refused(refusal),
            Download::Body(_) | Download::Done | Download::Switched => Outcome::Ended(Ended::abort(End::BadRequest)),
        }
    }

    // ---- upstream to client

    fn turn_down(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<Turn, Outcome> {
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
            let Poll::Ready(Some(moved)) = moved else { return Ok(Turn::Wait) };
            budget = budget.saturating_sub(moved.max(1));
        }
    }

    /// Receives from the upstream into memory. `Ok(None)`: nothing is there. `Ok(Some(0))`: its FIN, or worse.
    fn recv(&mut self, scratch: &mut Scratch, max: usize) -> Option<Result<usize, ()>> {
        match socket::recv(self.upstream.fd(), &mut scratch.received[..max]) {
            Ok(n) => {
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
        let Some(extent) = self.scanner.scan(&self.answer, self.rules.head_bytes).map_err(refused)? else {
            return Ok(false);
        };
        let client = self.near.downstream.client();
        let asked = Asked {
            to_head: self.request.is_head(),
            minor: self.request.minor,
            upgrade: self.request.upgrade.as_deref(),
            keep_alive: self.request.keep_alive
                && (self.near.gone.is_none() || !self.near.inbox.is_empty())
                && !client.watch.is_draining(),
            hsts: &self.rules.hsts,
        };
        let Response { status, kind, head } =
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
                self.download = Download::Switched;
                out.append(&mut self.answer);
            }
            Kind::Final { body, keep_client, keep_upstream } => {
                self.status = Some(status);
                (self.keep_client, self.keep_upstream) = (keep_client, keep_upstream);
                self.near.downstream.client().watch.allow(self.rules.idle_timeout);
                self.download = match body {
                    Body::None => Download::Done,
                    Body::Length(_) | Body::Chunked | Body::UntilClose => {
                        Download::Body(Left::of(body, self.rules.head_bytes))
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
            Sealed::Eof if until_close => {
                self.download = Download::Done;
                Ok(Poll::Ready(Some(0)))
            }
            Sealed::Eof => Err(Outcome::Ended(Ended::abort(End::UpstreamTruncated))),
            Sealed::Broken => Err(Outcome::Ended(Ended::abort(End::UpstreamReset))),
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

/// The future of one exchange.
pub struct Run<'a>(&'a mut Exchange);

impl Future for Run<'_> {
    type Output = Outcome;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        self.0.poll(cx)
    }
}
