//! The relay behind the door: the kernel opens and seals the records, pipes carry the bytes, or a copy where that costs less.
//!
//!   client (TLS_RX) ─▶ splice ─▶ pipe ─▶ splice ─▶ upstream      upstream ─▶ splice ─▶ pipe ─▶ splice ─▶ (TLS_TX) client
//!                 └──▶ recv ─▶ send ─────────────▶                        └──▶ recv ─▶ send ─────────────▶
//!
//! What TLS asks for beside data is in `kernel_tls`; here are the two directions, their pipes and their ends.

use super::flow::{Drained, Flow, Splicer};
use super::kernel_tls::KernelTls;
use super::turns::{InTurns, Turns};
use super::user_tls::{Received, Sealed, Then};
use super::{ClientEnd, Down, Ended, Scratch, Spare, Turn, Up, Want, over, timed_out};
use super::{HALF_OPEN_TIMEOUT, NO_REKEY_QUIET, TURN_BYTES};
use crate::observe::counters::End;
use crate::protect::PLAIN_BYTES;
use crate::ring::{Look, Sock};
use crate::watch::Verdict;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// A connection whose record layer is the kernel's.
pub struct Kernel {
    pub tls: KernelTls,
    pub upstream: Sock,
    up_flow: Flow,
    down_flow: Flow,
    up: Up,
    down: Down,
}

impl Kernel {
    /// `to_upstream` is plaintext that the userspace relay has opened and not handed on.
    pub fn new(tls: KernelTls, mut upstream: Sock, to_upstream: Spare, up: Up, down: Down) -> Self {
        let splicer = tls.splicer();
        if splicer == Splicer::Ring {
            // The ring's threads read it: an edge would wake this one for nothing.
            upstream.read_by_level();
        }
        Self {
            tls,
            upstream,
            up_flow: Flow::new(splicer, to_upstream),
            down_flow: Flow::new(splicer, Spare::default()),
            up,
            down,
        }
    }

    /// Relays to the end.
    pub async fn run(&mut self) -> Ended {
        let ended = InTurns::new(self).await;
        self.tls.reset_low_water();
        ended
    }

    fn over(&self) -> Option<Ended> {
        if self.down == Down::Open && self.tls.client.sock.is_reset() {
            return Some(Ended::abort(End::ClientReset));
        }
        if self.down == Down::Broken && self.down_flow.is_empty() {
            return Some(Ended::abort(End::UpstreamReset));
        }
        over(self.up, self.down)
    }

    fn timed_out(&mut self, verdict: Verdict) -> Option<Ended> {
        let no_rekey = matches!(self.up, Up::Broken(End::NoRekey));
        if verdict == Verdict::TimedOut && no_rekey && self.down == Down::Open {
            // The download has been silent: it is drained, and ends like one that the upstream has ended.
            self.tls.client.watch.forgive();
            self.tls.client.watch.allow(HALF_OPEN_TIMEOUT);
            self.down = Down::Closing;
            return None;
        }
        let mut ended = timed_out(self.up, self.down, verdict);
        if no_rekey && ended.client == ClientEnd::Discard {
            ended.client = ClientEnd::Await;
        }
        Some(ended)
    }

    fn want(&self) -> Want {
        let (up, down) = (&self.up_flow, &self.down_flow);
        let down_waits = !down.fills() || self.down == Down::Closing || self.tls.owes_key_update();
        Want {
            client_read: self.up == Up::Open && up.fills() && !up.is_in_flight() && !self.tls.client.sock.readable,
            upstream_write: !up.fills() && !up.is_in_flight() && !self.upstream.writable,
            upstream_read: self.down == Down::Open && down.fills() && !down.is_in_flight() && !self.upstream.readable,
            client_write: down_waits && !down.is_in_flight() && !self.tls.client.sock.writable,
            client_reset: self.up != Up::Open && self.down == Down::Open,
            client_takes: true,
        }
    }

    // ---- client to upstream

    fn turn_up(&mut self, cx: &mut Context<'_>) -> Result<Turn, Ended> {
        let mut budget = TURN_BYTES;
        loop {
            if matches!(self.up, Up::Finished | Up::Broken(_) | Up::Reset) {
                return Ok(Turn::Wait);
            }
            if !self.up_flow.fills() && !self.drain_up(cx) {
                return Ok(Turn::Wait);
            }
            if self.up == Up::Closing {
                self.upstream.finish();
                self.up = Up::Finished;
            }
            if self.up != Up::Open || !self.tls.client.sock.readable && !self.up_flow.is_in_flight() {
                self.up_flow.rest();
                return Ok(Turn::Wait);
            }
            if budget == 0 {
                return Ok(Turn::Again);
            }
            match self.fill_up(cx)? {
                Poll::Pending => return Ok(Turn::Wait),
                Poll::Ready(n) => budget = budget.saturating_sub(n.max(PLAIN_BYTES / 16)),
            }
        }
    }

    /// True when all has gone to the upstream.
    fn drain_up(&mut self, cx: &mut Context<'_>) -> bool {
        let client = &self.tls.client;
        let count = |n| client.worker.counters.up_spliced.add(n as u64);
        match self.up_flow.drain(cx, &mut self.upstream, &client.watch, count) {
            Ok(drained) => drained == Drained::Empty,
            Err(e) => {
                // The upstream takes no more: it may still have an answer, so only this direction ends.
                self.break_up(Up::untaken(&e), HALF_OPEN_TIMEOUT);
                false
            }
        }
    }

    fn break_up(&mut self, how: Up, silence: Duration) {
        self.up = how;
        self.up_flow.rest();
        self.tls.client.watch.allow_at_most(silence);
    }

    /// Takes one record or what is at the head instead; gives the bytes taken.
    fn fill_up(&mut self, cx: &mut Context<'_>) -> Result<Poll<usize>, Ended> {
        self.tls.is_sending = self.down_flow.is_sending();
        let worker = self.tls.client.worker.clone();
        let mut scratch = worker.scratch.borrow_mut();
        let received = if self.tls.copies_up() {
            self.receive(&mut scratch)?
        } else {
            let Poll::Ready(received) = self.tls.fill(cx, &mut self.up_flow, &mut scratch, usize::MAX) else {
                return Ok(Poll::Pending);
            };
            received?
        };
        match received.then {
            Then::Open => {}
            Then::Closed => self.up = Up::Closing,
            Then::Truncated => self.break_up(Up::Broken(End::ClientTruncated), HALF_OPEN_TIMEOUT),
            // Sending is healthy: the download goes on.
            Then::NoRekey => self.break_up(Up::Broken(End::NoRekey), NO_REKEY_QUIET),
            Then::Refused(ended) => return Err(ended),
        }
        Ok(Poll::Ready(received.bytes))
    }

    fn receive(&mut self, scratch: &mut Scratch) -> Result<Received, Ended> {
        let received = self.tls.receive(scratch, usize::MAX)?;
        if received.bytes > 0 {
            self.tls.client.worker.counters.up_copied.add(received.bytes as u64);
            let all = 0..received.bytes;
            if let Err(e) = self.up_flow.hand_on(&self.upstream, &scratch.received, std::slice::from_ref(&all)) {
                self.break_up(Up::untaken(&e), HALF_OPEN_TIMEOUT);
            }
            self.tls.handed_on(self.up_flow.is_empty());
        }
        Ok(received)
    }

    // ---- upstream to client

    fn turn_down(&mut self, cx: &mut Context<'_>) -> Result<Turn, Ended> {
        let mut budget = TURN_BYTES;
        loop {
            if self.down == Down::Finished {
                return Ok(Turn::Wait);
            }
            if self.tls.owes_key_update() && !self.down_flow.is_in_flight() && !self.tls.send_key_update()? {
                return Ok(Turn::Wait);
            }
            if !self.down_flow.fills() && !self.tls.drain(cx, &mut self.down_flow)? {
                return Ok(Turn::Wait);
            }
            match self.down {
                Down::Open => {}
                Down::Closing => return self.close_down(),
                Down::Notified | Down::Broken | Down::Finished => return Ok(Turn::Wait),
            }
            if !self.upstream.readable && !self.down_flow.is_in_flight() {
                self.down_flow.rest();
                return Ok(Turn::Wait);
            }
            if budget == 0 {
                return Ok(Turn::Again);
            }
            if !self.down_flow.is_in_flight() && self.tls.is_used_up() {
                self.key_used_up();
                continue;
            }
            match self.fill_down(cx) {
                Poll::Pending => return Ok(Turn::Wait),
                Poll::Ready(n) => budget = budget.saturating_sub(n.max(1)),
            }
        }
    }

    fn key_used_up(&mut self) {
        if !self.tls.renew_key() {
            self.up = Up::Broken(End::KeyExhausted);
            self.down = Down::Closing;
        }
    }

    /// Gives the bytes taken.
    fn fill_down(&mut self, cx: &mut Context<'_>) -> Poll<usize> {
        let worker = self.tls.client.worker.clone();
        let mut scratch = worker.scratch.borrow_mut();
        match ready!(self.tls.fill_down(cx, &mut self.down_flow, &mut self.upstream, &mut scratch, TURN_BYTES)) {
            Sealed::Bytes(n) => return Poll::Ready(n),
            Sealed::Nothing => {}
            Sealed::Eof if self.awaits_drain() => return Poll::Pending,
            Sealed::Eof if self.up != Up::Reset => self.down = Down::Closing,
            Sealed::Eof | Sealed::Broken => self.down = Down::Broken,
        }
        Poll::Ready(0)
    }

    /// A drain on the ring may have been told of the upstream's reset already, and will tell us.
    fn awaits_drain(&self) -> bool {
        matches!(self.up, Up::Open | Up::Closing) && self.up_flow.is_sending()
    }

    /// Pipe empty, socket writable, close_notify, FIN: any other order can cut a record that the kernel still holds.
    fn close_down(&mut self) -> Result<Turn, Ended> {
        self.down_flow.rest();
        match self.tls.send_close_notify() {
            Ok(true) => {
                self.tls.finish();
                self.down = Down::Finished;
                self.tls.client.watch.allow_at_most(HALF_OPEN_TIMEOUT);
            }
            Ok(false) => {}
            // The client has said its last word and did not wait for ours.
            Err(_) if self.up == Up::Finished => self.down = Down::Finished,
            Err(_) => return Err(Ended::abort(End::ClientReset)),
        }
        Ok(Turn::Wait)
    }
}

impl Turns for Kernel {
    type End = Ended;

    fn is_in_flight(&self) -> bool {
        self.up_flow.is_in_flight() || self.down_flow.is_in_flight()
    }

    fn turns(&mut self, cx: &mut Context<'_>) -> Result<Turn, Ended> {
        let turn = self.turn_up(cx)?.or(self.turn_down(cx)?);
        self.over().map_or(Ok(turn), Err)
    }

    fn poll_next_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.tls.client.poll_next_turn(cx)
    }

    fn poll_sockets(&mut self, cx: &mut Context<'_>, look: Look) -> Poll<Option<Ended>> {
        let want = self.want();
        let ready = ready!(self.tls.poll_ready(cx, Some(&mut self.upstream), want, look));
        Poll::Ready(ready.err().and_then(|verdict| self.timed_out(verdict)))
    }
}
