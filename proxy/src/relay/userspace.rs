//! The relay whose records userspace protects: before the door, and where there is none.
//!
//!   client ─▶ recv ─▶ open in place ─▶ send ─▶ upstream        upstream ─▶ recv ─▶ seal ─▶ send ─▶ client
//!
//! Reads are large, into the worker's buffers; what a socket does not take is kept by the connection, and nothing
//! else is: one that waits holds no buffer. When the connection is to go through the door, reads become exact, so
//! that the client's stream stands at the boundary of a record.

use super::{ClientEnd, Down, Ended, Link, Scratch, Spare, TURN_BYTES, Turn, Up, UpstreamEnd, Want, over, timed_out};
use super::{COPY_BYTES, HALF_OPEN_TIMEOUT};
use crate::observe::counters::End;
use crate::session::{self, RECORD_WIRE_BYTES, SealError, Session};
use crate::sys::socket::{self, Half};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// The longest leftover: a handshake message of 64 KiB in pieces, and a record. No client needs as much.
const LEFTOVER_BYTES: usize = (64 << 10) + RECORD_WIRE_BYTES;

/// When a connection goes through the door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    Shut,
    /// Once a direction has handed on this many bytes of plaintext.
    After(u64),
}

/// A connection relayed by userspace.
pub struct Userspace {
    pub link: Link,
    pub session: Session,
    /// Ciphertext that is not done with: of a record that is not complete yet, or of a handshake message in pieces.
    pub leftover: Vec<u8>,
    /// The leftover comes from the handshake, and may be complete records that nobody has opened.
    unopened: bool,
    /// Plaintext for the upstream that it did not take yet.
    pub to_upstream: Spare,
    /// Ciphertext for the client that it did not take yet.
    pub to_client: Spare,
    pub up: Up,
    pub down: Down,
    pub door: Door,
}

/// Where the relay stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Everything that the client has sent is opened, everything sealed is sent.
    AtDoor,
    Over(Ended),
}

impl Userspace {
    pub fn new(link: Link, session: Session, leftover: Vec<u8>, door: Door) -> Self {
        Self {
            link,
            session,
            unopened: !leftover.is_empty(),
            leftover,
            to_upstream: Spare::default(),
            to_client: Spare::default(),
            up: Up::Open,
            down: Down::Open,
            door,
        }
    }

    /// Relays until the door or the end.
    pub fn run(&mut self) -> Run<'_> {
        Run(self)
    }

    fn wants_door(&self) -> bool {
        match self.door {
            Door::Shut => false,
            Door::After(bytes) => self.link.moved_up.max(self.link.moved_down) >= bytes,
        }
    }

    fn at_door(&self) -> bool {
        self.wants_door() && self.leftover.is_empty() && self.to_client.is_empty() && !self.session.owes_reply
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Stop> {
        let worker = self.link.worker.clone();
        loop {
            let mut scratch = worker.scratch.borrow_mut();
            let turns = self.turn_up(&mut scratch).and_then(|up| Ok((up, self.turn_down(&mut scratch)?)));
            drop(scratch);
            let (up, down) = match turns {
                Ok(turns) => turns,
                Err(ended) => return Poll::Ready(Stop::Over(ended)),
            };
            if let Some(ended) = self.over() {
                return Poll::Ready(Stop::Over(ended));
            }
            if self.at_door() {
                return Poll::Ready(Stop::AtDoor);
            }
            if up == Turn::Again || down == Turn::Again {
                ready!(self.link.poll_next_turn(cx));
                continue;
            }
            if let Err(verdict) = ready!(self.link.poll_ready(cx, self.want())) {
                return Poll::Ready(Stop::Over(timed_out(self.up, self.down, verdict)));
            }
        }
    }

    fn over(&self) -> Option<Ended> {
        if self.down == Down::Broken && self.to_client.is_empty() {
            return Some(Ended::abort(End::UpstreamReset));
        }
        over(self.up, self.down)
    }

    fn want(&self) -> Want {
        Want {
            client_read: self.up == Up::Open && self.to_upstream.is_empty() && !self.link.client.readable,
            upstream_write: !self.to_upstream.is_empty() && !self.link.upstream.writable,
            upstream_read: self.down == Down::Open && self.to_client.is_empty() && !self.link.upstream.readable,
            client_write: !self.to_client.is_empty() && !self.link.client.writable,
        }
    }

    // ---- client to upstream

    fn turn_up(&mut self, scratch: &mut Scratch) -> Result<Turn, Ended> {
        let mut budget = TURN_BYTES;
        loop {
            if matches!(self.up, Up::Finished | Up::Broken(_)) {
                return Ok(Turn::Wait);
            }
            if !self.flush_up() {
                return Ok(Turn::Wait);
            }
            if self.up == Up::Closing {
                // An upstream that is gone already has no need of our FIN.
                let _ = socket::shutdown(self.link.upstream.fd(), Half::Write);
                self.up = Up::Finished;
                return Ok(Turn::Wait);
            }
            if self.at_door() {
                return Ok(Turn::Wait);
            }
            let Some(received) = self.receive(scratch)? else { return Ok(Turn::Wait) };
            let moved = self.open(scratch, received)?;
            budget = budget.saturating_sub(moved.max(1));
            if budget == 0 {
                return Ok(Turn::Again);
            }
        }
    }

    /// True when nothing is left to send.
    fn flush_up(&mut self) -> bool {
        match self.to_upstream.flush(&mut self.link.upstream) {
            Ok(done) => done,
            Err(_) => {
                self.give_up_upload();
                false
            }
        }
    }

    /// The upstream takes no more: it may still have an answer, so only this direction ends.
    fn give_up_upload(&mut self) {
        self.to_upstream.clear();
        self.up = Up::Broken(End::UpstreamReset);
        self.link.watch.allow_at_most(HALF_OPEN_TIMEOUT);
    }

    /// Reads behind the leftover; gives the length of both together. `None`: nothing to read.
    fn receive(&mut self, scratch: &mut Scratch) -> Result<Option<usize>, Ended> {
        let kept = self.leftover.len();
        if !self.unopened && !self.link.client.readable {
            return Ok(None);
        }
        scratch.received[..kept].copy_from_slice(&self.leftover);
        if std::mem::take(&mut self.unopened) {
            self.leftover.clear();
            return Ok(Some(kept));
        }
        let max = if self.wants_door() { session::missing_bytes(&self.leftover) } else { COPY_BYTES };
        let max = max.min(scratch.received.len() - kept);
        match socket::recv(self.link.client.fd(), &mut scratch.received[kept..kept + max]) {
            Ok(0) => {
                self.up = Up::Broken(End::ClientTruncated);
                self.link.watch.allow_at_most(HALF_OPEN_TIMEOUT);
                Ok(None)
            }
            Ok(n) => {
                self.link.client.readable = n == max;
                self.leftover.clear();
                Ok(Some(kept + n))
            }
            Err(e) if socket::is_again(&e) => {
                self.link.client.readable = false;
                Ok(None)
            }
            Err(_) => Err(Ended::abort(End::ClientReset)),
        }
    }

    /// Opens what was received and hands the plaintext on; gives its length.
    fn open(&mut self, scratch: &mut Scratch, received: usize) -> Result<usize, Ended> {
        scratch.plain.clear();
        let mut out = Vec::new();
        let fed = self.session.feed(&mut scratch.received[..received], &mut scratch.plain, &mut out);
        let rest = &scratch.received[fed.consumed..received];
        if rest.len() > LEFTOVER_BYTES {
            return Err(Ended::abort(End::BadRecord));
        }
        self.leftover = if rest.is_empty() { Vec::new() } else { rest.to_vec() };
        self.link.watch.touch();
        let moved = scratch.plain.len();
        if self.to_upstream.send(&mut self.link.upstream, &scratch.plain).is_err() {
            self.give_up_upload();
        }
        self.link.moved_up += moved as u64;
        self.link.worker.counters.up_copied.add(moved as u64);
        if !out.is_empty() && self.to_client.send(&mut self.link.client, &out).is_err() {
            return Err(Ended::abort(End::ClientReset));
        }
        if let Some(error) = fed.error {
            return Err(self.refuse(how(&error)));
        }
        if fed.renegotiation {
            return Err(self.refuse_politely(End::Renegotiation));
        }
        if fed.closed {
            self.leftover = Vec::new();
            self.up = if self.up == Up::Open { Up::Closing } else { self.up };
        }
        Ok(moved)
    }

    /// Ends the connection after an alert, which is on its way: `close` sends what is left of it, then FIN.
    fn refuse(&mut self, how: End) -> Ended {
        Ended { how, client: ClientEnd::Discard, upstream: UpstreamEnd::Reset }
    }

    /// As `refuse`, with a close_notify.
    fn refuse_politely(&mut self, how: End) -> Ended {
        self.queue_close_notify();
        self.refuse(how)
    }

    fn queue_close_notify(&mut self) {
        let mut out = Vec::new();
        self.session.close(&mut out);
        self.to_client.push(&out);
    }

    // ---- upstream to client

    fn turn_down(&mut self, scratch: &mut Scratch) -> Result<Turn, Ended> {
        let mut budget = TURN_BYTES;
        loop {
            if self.down == Down::Finished {
                return Ok(Turn::Wait);
            }
            match self.to_client.flush(&mut self.link.client) {
                Ok(true) => {}
                Ok(false) => return Ok(Turn::Wait),
                // The client has said its last word and did not wait for ours.
                Err(_) if self.up == Up::Finished && self.down == Down::Notified => self.to_client.clear(),
                Err(_) => return Err(Ended::abort(End::ClientReset)),
            }
            match self.down {
                Down::Open => {}
                Down::Closing => {
                    self.queue_close_notify();
                    self.down = Down::Notified;
                    continue;
                }
                Down::Notified => {
                    let _ = socket::shutdown(self.link.client.fd(), Half::Write);
                    self.down = Down::Finished;
                    self.link.watch.allow_at_most(HALF_OPEN_TIMEOUT);
                    return Ok(Turn::Wait);
                }
                Down::Broken | Down::Finished => return Ok(Turn::Wait),
            }
            // A reply may be owed, and goes out with data alone: then the door waits and data flows.
            if !self.link.upstream.readable || self.at_door() {
                return Ok(Turn::Wait);
            }
            let moved = match socket::recv(self.link.upstream.fd(), &mut scratch.received[..COPY_BYTES]) {
                Ok(0) => {
                    self.down = Down::Closing;
                    continue;
                }
                Ok(n) => n,
                Err(e) if socket::is_again(&e) => {
                    self.link.upstream.readable = false;
                    return Ok(Turn::Wait);
                }
                Err(_) => {
                    self.down = Down::Broken;
                    return Ok(Turn::Wait);
                }
            };
            self.link.upstream.readable = moved == COPY_BYTES;
            self.seal(scratch, moved)?;
            budget = budget.saturating_sub(moved);
            if budget == 0 {
                return Ok(Turn::Again);
            }
        }
    }

    fn seal(&mut self, scratch: &mut Scratch, plain: usize) -> Result<(), Ended> {
        let sealed = match self.session.seal(&scratch.received[..plain], &mut scratch.sealed) {
            Ok(n) => n,
            Err(SealError::KeyExhausted) => return Err(self.refuse_politely(End::KeyExhausted)),
            Err(SealError::Room(_)) => return Err(Ended::abort(End::Internal)),
        };
        let gone = |_| Ended::abort(End::ClientReset);
        self.to_client.send(&mut self.link.client, &scratch.sealed[..sealed]).map_err(gone)?;
        self.link.watch.touch();
        self.link.moved_down += plain as u64;
        self.link.worker.counters.down_copied.add(plain as u64);
        Ok(())
    }
}

/// The future of one relay, up to the door or the end.
pub struct Run<'a>(&'a mut Userspace);

impl Future for Run<'_> {
    type Output = Stop;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Stop> {
        self.0.poll(cx)
    }
}

/// What an error of rustls means for the count of ends.
pub fn how(error: &rustls::Error) -> End {
    use rustls::{Error, PeerMisbehaved};
    match error {
        Error::DecryptError => End::BadRecordMac,
        Error::PeerMisbehaved(PeerMisbehaved::TooManyKeyUpdateRequests) => End::KeyUpdateStorm,
        Error::PeerMisbehaved(PeerMisbehaved::TooManyRenegotiationRequests) => End::Renegotiation,
        Error::AlertReceived(_) => End::ClientAlert,
        Error::InappropriateMessage { .. } | Error::InappropriateHandshakeMessage { .. } => End::UnexpectedMessage,
        // rustls' enum is open: what it may grow is a record that we cannot use.
        _ => End::BadRecord,
    }
}
