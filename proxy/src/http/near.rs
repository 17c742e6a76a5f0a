//! The client's side of a connection in mode "http": its plaintext, what was read ahead of it, and how it ended.
//!
//!   client ─▶ receive ─▶ inbox (a head in parts, pipelined requests) ─▶ read_head ─▶ …
//!
//! The inbox is bounded and given back when it is empty: a connection between two requests holds none.

use super::downstream::Downstream;
use super::head::{Extent, Scanner};
use super::refusal::{Refusal, Status};
use crate::observe::counters::End;
use crate::relay::user_tls::{Received, Then};
use crate::relay::userspace::Door;
use crate::relay::{Ended, Scratch, TURN_BYTES, Want};
use crate::ring::Look;
use crate::watch::Verdict;
use std::future::poll_fn;
use std::ops::Range;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// Bytes read at once where a head is expected, and read ahead while a response is on its way.
pub const HEAD_READ_BYTES: usize = 16 << 10;

/// See the module.
pub struct Near {
    pub downstream: Downstream,
    /// Plaintext that was received and that nobody has taken yet.
    pub inbox: Vec<u8>,
    /// The client sends no more.
    pub gone: Option<Gone>,
    pub door: Door,
}

/// How the client's stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    Clean,
    /// Without a close_notify. What had come whole before it is answered all the same.
    Truncated,
    /// It goes on under a key that this kernel cannot take.
    NoRekey,
}

/// Why there is no next request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoRequest {
    /// The client has none, or has had its time, or we drain.
    Over(End),
    /// It sent what is none.
    Refused(Refusal),
    Ended(Ended),
}

/// How long a head may take. Nothing that comes meanwhile renews either time.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Until its first byte.
    pub idle: Duration,
    /// From then to its end.
    pub head: Duration,
    /// Bytes.
    pub limit: usize,
    /// A drain ends the wait: the connection has had a request already.
    pub ends_in_drain: bool,
}

impl Near {
    pub fn new(downstream: Downstream, door: Door) -> Self {
        Self { downstream, inbox: Vec::new(), gone: None, door }
    }

    /// The kernel shall take over: reads become exact.
    pub fn wants_door(&self) -> bool {
        matches!(self.downstream, Downstream::User(_)) && self.downstream.client().wants_door(self.door)
    }

    pub fn is_at_door(&self) -> bool {
        self.wants_door() && self.gone.is_none() && self.downstream.is_at_boundary()
    }

    /// Notes how the stream stands behind what was received.
    pub fn note(&mut self, then: Then) -> Result<(), Ended> {
        match then {
            Then::Open => {}
            Then::Closed => self.gone = Some(Gone::Clean),
            Then::Truncated => self.gone = Some(Gone::Truncated),
            Then::NoRekey => self.gone = Some(Gone::NoRekey),
            Then::Refused(ended) => return Err(ended),
        }
        Ok(())
    }

    /// Receives about `max` bytes; plaintext lies in the scratch's pieces. `None`: nothing is there. What comes is no
    /// reason to wait longer: whoever has waited for it says so to the watch.
    pub fn receive(&mut self, scratch: &mut Scratch, max: usize) -> Result<Option<Received>, Ended> {
        if self.gone.is_some() {
            return Ok(None);
        }
        let exact = self.wants_door();
        let received = self.downstream.receive(scratch, max, exact)?;
        if let Some(received) = &received {
            let is_kernel = matches!(self.downstream, Downstream::Kernel(_));
            let client = self.downstream.client_mut();
            client.worker.counters.up_copied.add(received.bytes as u64);
            // The kernel's side has counted it there already.
            client.moved_up += if is_kernel { 0 } else { received.bytes as u64 };
            self.note(received.then)?;
        }
        Ok(received)
    }

    /// Keeps pieces for later.
    pub fn keep(&mut self, received: &[u8], pieces: &[Range<usize>]) {
        for piece in pieces {
            self.inbox.extend_from_slice(&received[piece.clone()]);
        }
    }

    /// Drops what was taken from the front of the inbox.
    pub fn take(&mut self, bytes: usize) {
        self.inbox.drain(..bytes);
        if self.inbox.is_empty() {
            self.inbox = Vec::new();
        }
    }

    /// Receives into the inbox until it holds `limit` bytes. True: something came, or the stream ended.
    pub fn read_ahead(&mut self, scratch: &mut Scratch, limit: usize) -> Result<bool, Ended> {
        if self.inbox.len() >= limit {
            return Ok(false);
        }
        let Some(_) = self.receive(scratch, HEAD_READ_BYTES)? else { return Ok(false) };
        self.keep(&scratch.received, &scratch.pieces);
        Ok(true)
    }

    /// Waits for the next request's head, which then lies at the front of the inbox, and before that for the client to
    /// take what it has been answered: one that takes nothing is asked for nothing more.
    pub async fn read_head(&mut self, patience: Patience) -> Result<Extent, NoRequest> {
        let mut scanner = Scanner::request();
        let mut has_begun = false;
        let mut budget = TURN_BYTES;
        let watch = self.downstream.client().watch.clone();
        watch.forgive();
        watch.allow(patience.idle);
        poll_fn(|cx| {
            loop {
                if budget == 0 {
                    ready!(self.downstream.client_mut().poll_next_turn(cx));
                    budget = TURN_BYTES;
                }
                let sent = self.downstream.flush(cx).map_err(NoRequest::Ended)?;
                if sent {
                    self.downstream.rest();
                    if let Some(extent) = scanner.scan(&self.inbox, patience.limit).map_err(NoRequest::Refused)? {
                        return Poll::Ready(Ok(extent));
                    }
                    if let Some(over) = self.no_head(&scanner, patience.ends_in_drain && watch.is_draining()) {
                        return Poll::Ready(Err(over));
                    }
                    if !scanner.is_idle() && !std::mem::replace(&mut has_begun, true) {
                        watch.allow(patience.head);
                    }
                }
                match self.poll_more(cx, sent, has_begun) {
                    Poll::Pending => return Poll::Pending,
                    // Whatever it was: records without data come in reads that are as long.
                    Poll::Ready(Ok(())) => budget = budget.saturating_sub(HEAD_READ_BYTES),
                    Poll::Ready(Err(Waited::Ended(ended))) => return Poll::Ready(Err(NoRequest::Ended(ended))),
                    Poll::Ready(Err(Waited::Verdict(Verdict::Cut))) => {
                        return Poll::Ready(Err(NoRequest::Ended(Ended::abort(End::Drained))));
                    }
                    Poll::Ready(Err(Waited::Verdict(Verdict::TimedOut))) => {
                        let over =
                            if scanner.is_idle() { NoRequest::Over(End::Idle) } else { NoRequest::Refused(TOO_SLOW) };
                        return Poll::Ready(Err(over));
                    }
                }
            }
        })
        .await
    }

    /// No further byte of a head will come, or is wanted.
    fn no_head(&self, scanner: &Scanner, draining: bool) -> Option<NoRequest> {
        match (self.gone, scanner.is_idle()) {
            (Some(Gone::NoRekey), _) => Some(NoRequest::Over(End::NoRekey)),
            (Some(Gone::Clean | Gone::Truncated), false) => Some(NoRequest::Ended(Ended::abort(End::ClientTruncated))),
            (Some(Gone::Clean), true) => Some(NoRequest::Over(End::Clean)),
            (Some(Gone::Truncated), true) => Some(NoRequest::Over(End::ClientTruncated)),
            (None, idle) => (idle && draining).then_some(NoRequest::Over(End::Clean)),
        }
    }

    /// Receives what is there, or waits; until all is `sent`, for room.
    fn poll_more(&mut self, cx: &mut Context<'_>, sent: bool, has_begun: bool) -> Poll<Result<(), Waited>> {
        let worker = self.downstream.client().worker.clone();
        if sent && self.read_ahead(&mut worker.scratch.borrow_mut(), usize::MAX).map_err(Waited::Ended)? {
            return Poll::Ready(Ok(()));
        }
        let sock = &self.downstream.client().sock;
        let want = Want {
            client_read: sent && !sock.readable,
            client_write: !sent && !sock.writable && !self.downstream.is_in_flight(),
            client_takes: !has_begun,
            ..Want::default()
        };
        ready!(self.downstream.poll_ready(cx, None, want, Look::All)).map_err(Waited::Verdict)?;
        Poll::Ready(Ok(()))
    }
}

const TOO_SLOW: Refusal = Refusal::new(Status::RequestTimeout, "the head took longer than http.head_timeout");

enum Waited {
    Ended(Ended),
    Verdict(Verdict),
}
