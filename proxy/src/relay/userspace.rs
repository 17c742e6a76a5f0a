//! The relay whose records userspace protects: before the door, and where there is none.
//!
//!   client ─▶ recv ─▶ open in place ─▶ send ─▶ upstream        upstream ─▶ recv ─▶ seal in place ─▶ send ─▶ client
//!
//! Reads are large, into the worker's buffers, and records are opened and sealed where they lie (`user_tls`): no byte is
//! copied but what a socket does not take, which the connection keeps. One that waits holds no buffer. When the
//! connection is to go through the door, reads become exact, so that the client's stream stands at the boundary of a record.

use super::turns::{InTurns, Turns};
use super::user_tls::{Received, Sealed, Then, UserTls};
use super::{COPY_RECORDS, HALF_OPEN_TIMEOUT};
use super::{Down, Ended, Scratch, Spare, TURN_BYTES, Turn, Up, Want, hand_on, over, timed_out};
use crate::observe::counters::End;
use crate::protect::PLAIN_BYTES;
use crate::ring::{Look, Sock};
use std::io;
use std::task::{Context, Poll, ready};

/// When a connection goes through the door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    Shut,
    /// Once a direction has handed on this many bytes of plaintext.
    After(u64),
}

/// A connection relayed by userspace.
pub struct Userspace {
    pub tls: UserTls,
    pub upstream: Sock,
    /// Plaintext for the upstream that it did not take yet.
    pub to_upstream: Spare,
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
    pub fn new(tls: UserTls, upstream: Sock, door: Door) -> Self {
        Self { tls, upstream, to_upstream: Spare::default(), up: Up::Open, down: Down::Open, door }
    }

    /// Relays until the door or the end.
    pub fn run(&mut self) -> InTurns<'_, Self> {
        InTurns::new(self)
    }

    fn wants_door(&self) -> bool {
        self.tls.client.wants_door(self.door)
    }

    /// A client that has ended its stream stays: what it sends behind the end is no record of the kernel's, and would
    /// stop the sending side too.
    fn at_door(&self) -> bool {
        self.wants_door() && self.up == Up::Open && self.tls.is_at_boundary()
    }

    fn over(&self) -> Option<Ended> {
        if self.down == Down::Open && self.tls.client.sock.is_reset() {
            return Some(Ended::abort(End::ClientReset));
        }
        if self.down == Down::Broken && self.tls.to_client.is_empty() {
            return Some(Ended::abort(End::UpstreamReset));
        }
        over(self.up, self.down)
    }

    fn want(&self) -> Want {
        let (client, blocked) = (&self.tls.client.sock, self.tls.is_blocked());
        Want {
            client_read: self.up == Up::Open && self.to_upstream.is_empty() && !client.readable,
            upstream_write: !self.to_upstream.is_empty() && !self.upstream.writable,
            upstream_read: self.down == Down::Open && !blocked && !self.upstream.readable,
            client_write: blocked && !client.writable,
            client_reset: self.up != Up::Open && self.down == Down::Open,
            client_takes: true,
        }
    }

    // ---- client to upstream

    fn turn_up(&mut self, scratch: &mut Scratch) -> Result<Turn, Ended> {
        let mut budget = TURN_BYTES;
        loop {
            if matches!(self.up, Up::Finished | Up::Broken(_) | Up::Reset) || !self.flush_up() {
                return Ok(Turn::Wait);
            }
            if self.up == Up::Closing {
                self.upstream.finish();
                self.up = Up::Finished;
                return Ok(Turn::Wait);
            }
            if self.at_door() {
                return Ok(Turn::Wait);
            }
            let exact = self.wants_door();
            let Some(received) = self.tls.receive(scratch, usize::MAX, exact)? else { return Ok(Turn::Wait) };
            self.take(scratch, received)?;
            budget = budget.saturating_sub(received.bytes.max(PLAIN_BYTES / 16));
            if budget == 0 {
                return Ok(Turn::Again);
            }
        }
    }

    /// Hands on what was received, then notes how the stream stands behind it.
    fn take(&mut self, scratch: &Scratch, received: Received) -> Result<(), Ended> {
        if let Err(e) = hand_on(&self.upstream, &scratch.received, &scratch.pieces, &mut self.to_upstream) {
            self.give_up_upload(&e);
        }
        self.tls.handed_on(self.to_upstream.is_empty());
        self.tls.client.moved_up += received.bytes as u64;
        self.tls.client.worker.counters.up_copied.add(received.bytes as u64);
        match received.then {
            Then::Open => {}
            Then::Closed if self.up != Up::Open => {}
            Then::Closed => self.up = Up::Closing,
            Then::Truncated => {
                self.up = Up::Broken(End::ClientTruncated);
                self.tls.client.watch.allow_at_most(HALF_OPEN_TIMEOUT);
            }
            Then::NoRekey => self.up = Up::Broken(End::NoRekey),
            Then::Refused(ended) => return Err(ended),
        }
        Ok(())
    }

    /// True when nothing is left to send.
    fn flush_up(&mut self) -> bool {
        let before = self.to_upstream.len();
        let flushed = self.to_upstream.flush(&mut self.upstream);
        if self.to_upstream.len() < before {
            self.tls.client.watch.touch();
        }
        match flushed {
            Ok(done) => done,
            Err(e) => {
                self.give_up_upload(&e);
                false
            }
        }
    }

    /// The upstream takes no more: it may still have an answer, so only this direction ends.
    fn give_up_upload(&mut self, error: &io::Error) {
        self.to_upstream.clear();
        self.up = Up::untaken(error);
        self.tls.client.watch.allow_at_most(HALF_OPEN_TIMEOUT);
    }

    // ---- upstream to client

    fn turn_down(&mut self, scratch: &mut Scratch) -> Result<Turn, Ended> {
        let mut budget = TURN_BYTES;
        loop {
            if self.down == Down::Finished {
                return Ok(Turn::Wait);
            }
            match self.tls.flush() {
                Ok(true) => {}
                Ok(false) => return Ok(Turn::Wait),
                // The client has said its last word and did not wait for ours.
                Err(_) if self.up == Up::Finished && self.down == Down::Notified => self.tls.to_client.clear(),
                Err(_) => return Err(Ended::abort(End::ClientReset)),
            }
            match self.down {
                Down::Open => {}
                Down::Closing => {
                    self.tls.queue_close_notify();
                    self.down = Down::Notified;
                    continue;
                }
                Down::Notified => {
                    self.tls.client.sock.finish();
                    self.down = Down::Finished;
                    self.tls.client.watch.allow_at_most(HALF_OPEN_TIMEOUT);
                    return Ok(Turn::Wait);
                }
                Down::Broken | Down::Finished => return Ok(Turn::Wait),
            }
            if self.tls.owes_key_update() {
                self.tls.queue_key_update()?;
                continue;
            }
            if !self.upstream.readable || self.at_door() {
                return Ok(Turn::Wait);
            }
            if self.tls.keys.is_used_up(COPY_RECORDS) {
                self.key_used_up()?;
                continue;
            }
            match self.tls.seal_from(&mut self.upstream, scratch, u64::MAX)? {
                Sealed::Bytes(moved) => budget = budget.saturating_sub(moved),
                Sealed::Eof if self.up != Up::Reset => self.down = Down::Closing,
                Sealed::Nothing => return Ok(Turn::Wait),
                Sealed::Eof | Sealed::Broken => {
                    self.down = Down::Broken;
                    return Ok(Turn::Wait);
                }
            }
            if budget == 0 {
                return Ok(Turn::Again);
            }
        }
    }

    fn key_used_up(&mut self) -> Result<(), Ended> {
        if !self.tls.keys.ring.is_tls12() {
            return self.tls.queue_key_update();
        }
        // TLS 1.2 has no other key: the stream ends here, by a close_notify.
        self.up = Up::Broken(End::KeyExhausted);
        self.down = Down::Closing;
        Ok(())
    }
}

impl Turns for Userspace {
    type End = Stop;

    fn is_in_flight(&self) -> bool {
        false
    }

    fn turns(&mut self, _: &mut Context<'_>) -> Result<Turn, Stop> {
        let worker = self.tls.client.worker.clone();
        let mut scratch = worker.scratch.borrow_mut();
        let up = self.turn_up(&mut scratch).map_err(Stop::Over)?;
        let turn = up.or(self.turn_down(&mut scratch).map_err(Stop::Over)?);
        if let Some(ended) = self.over() {
            return Err(Stop::Over(ended));
        }
        if self.at_door() { Err(Stop::AtDoor) } else { Ok(turn) }
    }

    fn poll_next_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.tls.client.poll_next_turn(cx)
    }

    fn poll_sockets(&mut self, cx: &mut Context<'_>, look: Look) -> Poll<Option<Stop>> {
        let want = self.want();
        let ready = ready!(self.tls.client.poll_ready(cx, Some(&mut self.upstream), want, look));
        Poll::Ready(ready.err().map(|verdict| Stop::Over(timed_out(self.up, self.down, verdict))))
    }
}
