//! The relay behind the door: the kernel opens and seals the records, pipes carry the bytes.
//!
//!   client (TLS_RX) ─▶ splice ─▶ pipe ─▶ splice ─▶ upstream      upstream ─▶ splice ─▶ pipe ─▶ splice ─▶ (TLS_TX) client
//!
//! Splice takes data only. When it will not, a record of another kind is at the head, and is read by recvmsg at once,
//! because a poll no longer tells of it. Nothing here asks for a kernel version: the probe's answers decide.

use super::flow::{Drained, Flow, Splicer};
use super::record::{self, Fatal, Head, Storm, alert};
use super::{COPY_BYTES, HALF_OPEN_TIMEOUT, NO_REKEY_QUIET, TURN_BYTES};
use super::{ClientEnd, Down, Ended, Link, Spare, Turn, Up, UpstreamEnd, Want, is_gone, over, timed_out};
use crate::observe::counters::End;
use crate::protect::PLAIN_BYTES;
use crate::sys::ktls::{self, Direction, content_type};
use crate::sys::socket::{self, Half};
use crate::watch::Verdict;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::Sleep;

pub use super::keys::KernelKeys;

/// Records are gathered in the pipe up to this before they are spliced on: past it the gain is 2 %, before it 9 %.
const GATHER_BYTES: usize = 128 << 10;
/// Pipe slots that one record may take: its pages, and one for where it starts.
const RECORD_PIPE_PAGES: usize = 18;

/// How long a partial record may keep the kernel's queue below the mark that was set for its next byte.
const PARTIAL_RECORD_RETRY: Duration = Duration::from_millis(10);

/// A connection whose record layer is the kernel's.
pub struct Kernel {
    pub link: Link,
    keys: KernelKeys,
    up_flow: Flow,
    down_flow: Flow,
    up: Up,
    down: Down,
    /// A KeyUpdate of ours is due, because the client asked for one or our key is used up.
    key_update_due: bool,
    storm: Storm,
    /// SO_RCVLOWAT stands above 1, because a partial record would wake us for ever; read again when this is over.
    low_water: Option<Pin<Box<Sleep>>>,
}

impl Kernel {
    /// `to_upstream` is plaintext that the userspace relay has opened and not handed on.
    pub fn new(link: Link, keys: KernelKeys, to_upstream: Spare, up: Up, down: Down) -> Self {
        let splicer = match link.worker.splice {
            crate::config::SpliceMode::Ring => Splicer::Ring,
            crate::config::SpliceMode::Inline | crate::config::SpliceMode::Auto => Splicer::Inline,
        };
        Self {
            link,
            keys,
            up_flow: Flow::new(splicer, to_upstream),
            down_flow: Flow::new(splicer, Spare::default()),
            up,
            down,
            key_update_due: false,
            storm: Storm::default(),
            low_water: None,
        }
    }

    /// Relays to the end.
    pub fn run(&mut self) -> Run<'_> {
        Run(self)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        loop {
            let turns = self.turn_up(cx).and_then(|up| Ok((up, self.turn_down(cx)?)));
            let (up, down) = match turns {
                Ok(turns) => turns,
                Err(ended) => return Poll::Ready(ended),
            };
            if let Some(ended) = self.over() {
                return Poll::Ready(ended);
            }
            if up == Turn::Again || down == Turn::Again {
                ready!(self.link.poll_next_turn(cx));
                continue;
            }
            let want = self.want();
            if want.client_read && !self.raise_low_water() {
                continue;
            }
            let ready = self.link.poll_ready(cx, want);
            if self.lower_low_water(cx) && ready.is_pending() {
                self.link.client.readable = true;
                continue;
            }
            if let Err(verdict) = ready!(ready)
                && let Some(ended) = self.timed_out(verdict)
            {
                return Poll::Ready(ended);
            }
        }
    }

    fn over(&self) -> Option<Ended> {
        if self.down == Down::Broken && self.down_flow.is_empty() {
            return Some(Ended::abort(End::UpstreamReset));
        }
        over(self.up, self.down)
    }

    fn timed_out(&mut self, verdict: Verdict) -> Option<Ended> {
        let no_rekey = matches!(self.up, Up::Broken(End::NoRekey));
        if verdict == Verdict::TimedOut && no_rekey && self.down == Down::Open {
            // The download has been silent: it is drained, and ends like one that the upstream has ended.
            self.link.watch.forgive();
            self.link.watch.allow(HALF_OPEN_TIMEOUT);
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
        let down_waits = !down.fills() || self.down == Down::Closing || self.key_update_due;
        Want {
            client_read: self.up == Up::Open && up.fills() && !up.is_in_flight() && !self.link.client.readable,
            upstream_write: !up.fills() && !up.is_in_flight() && !self.link.upstream.writable,
            upstream_read: self.down == Down::Open
                && down.fills()
                && !down.is_in_flight()
                && !self.link.upstream.readable,
            client_write: down_waits && !down.is_in_flight() && !self.link.client.writable,
        }
    }

    /// Where a partial record counts as readable, asks to be woken by the next byte instead. False: read again, as
    /// more than the bytes counted here may have come before the mark was set.
    fn raise_low_water(&mut self) -> bool {
        let armed = self.low_water.is_some() || self.link.client.read_armed();
        if !self.link.worker.kernel.partial_record_wakes || armed {
            return true;
        }
        match socket::readable_bytes(self.link.client.fd()) {
            Ok(partial) if partial > 0 => {
                let _ = socket::set_receive_low_water(self.link.client.fd(), partial + 1);
                self.low_water = Some(Box::pin(tokio::time::sleep(PARTIAL_RECORD_RETRY)));
                self.link.client.readable = true;
                false
            }
            Ok(_) | Err(_) => true,
        }
    }

    /// Back to 1 as soon as the poll has ended. True: it has not, and it is time to read all the same, because the
    /// kernel may have taken the bytes that were counted out of the queue, and then the mark is never reached.
    fn lower_low_water(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(retry) = &mut self.low_water else { return false };
        let over = retry.as_mut().poll(cx).is_ready();
        if over || !self.link.client.read_armed() {
            let _ = socket::set_receive_low_water(self.link.client.fd(), 1);
            self.low_water = None;
        }
        over
    }

    // ---- client to upstream

    fn turn_up(&mut self, cx: &mut Context<'_>) -> Result<Turn, Ended> {
        let mut budget = TURN_BYTES;
        loop {
            if matches!(self.up, Up::Finished | Up::Broken(_)) {
                return Ok(Turn::Wait);
            }
            if !self.up_flow.fills() && !self.drain_up(cx) {
                return Ok(Turn::Wait);
            }
            if self.up == Up::Closing {
                let _ = socket::shutdown(self.link.upstream.fd(), Half::Write);
                self.up = Up::Finished;
            }
            if self.up != Up::Open || !self.link.client.readable && !self.up_flow.is_in_flight() {
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
        let counters = &self.link.worker.counters;
        match self.up_flow.drain(cx, &mut self.link.upstream, |n| counters.up_spliced.add(n as u64)) {
            Ok(drained) => drained == Drained::Empty,
            Err(_) => {
                // The upstream takes no more: it may still have an answer, so only this direction ends.
                self.break_up(End::UpstreamReset, HALF_OPEN_TIMEOUT);
                false
            }
        }
    }

    fn break_up(&mut self, how: End, silence: Duration) {
        self.up = Up::Broken(how);
        self.up_flow.rest();
        self.link.watch.allow_at_most(silence);
    }

    /// Takes one record or what is at the head instead; gives the bytes taken.
    fn fill_up(&mut self, cx: &mut Context<'_>) -> Result<Poll<usize>, Ended> {
        if !self.up_flow.has_pipe(&self.link.share) {
            return self.read_head(None).map(Poll::Ready);
        }
        let held = self.up_flow.in_pipe();
        let Poll::Ready(result) = self.up_flow.poll_fill(cx, &self.link.client, TURN_BYTES) else {
            return Ok(Poll::Pending);
        };
        match result {
            Ok(n) if n > 0 => {
                self.took_data(n);
                // Less than a full record, most likely the last one for now; a poll tells if it was not.
                self.link.client.readable &= n >= PLAIN_BYTES;
                let room = (held + n) / PLAIN_BYTES + 2;
                let gather = self.link.worker.kernel.short_splice_safe
                    && self.link.client.readable
                    && held + n < GATHER_BYTES
                    && room * RECORD_PIPE_PAGES <= self.up_flow.pipe_pages();
                if !gather {
                    self.up_flow.turn_to_drain();
                }
                Ok(Poll::Ready(n))
            }
            Err(e) if socket::is_again(&e) => {
                self.link.client.readable = false;
                if held > 0 {
                    self.up_flow.turn_to_drain();
                }
                Ok(Poll::Ready(0))
            }
            // The error is told once; a read after it would say that the stream has ended.
            Err(e) if is_gone(&e) => Err(Ended::abort(End::ClientReset)),
            _ if held > 0 => {
                // What is in the pipe came first; afterwards splice refuses again.
                self.up_flow.turn_to_drain();
                Ok(Poll::Ready(0))
            }
            Ok(_) => self.read_head(None).map(Poll::Ready),
            Err(e) => self.read_head(Some(e)).map(Poll::Ready),
        }
    }

    fn took_data(&mut self, bytes: usize) {
        self.storm.received_data();
        self.link.moved_up += bytes as u64;
        self.link.watch.touch();
    }

    /// Reads what splice would not take, or what there is no pipe for; gives the bytes of data.
    fn read_head(&mut self, refused: Option<io::Error>) -> Result<usize, Ended> {
        let worker = self.link.worker.clone();
        let mut scratch = worker.scratch.borrow_mut();
        let buffer = &mut scratch.received[..COPY_BYTES];
        match record::read_head(self.link.client.fd(), buffer, self.keys.is_tls12()) {
            Head::Data(0) | Head::Ignored => {}
            Head::Data(n) => {
                self.took_data(n);
                worker.counters.up_copied.add(n as u64);
                self.up_flow.copy(&buffer[..n]);
                return Ok(n);
            }
            Head::CloseNotify => self.up = Up::Closing,
            Head::Eof => self.break_up(End::ClientTruncated, HALF_OPEN_TIMEOUT),
            Head::KeyUpdate { reply } => self.key_update_received(reply)?,
            Head::Renegotiation => {
                let alert = Some(alert::NO_RENEGOTIATION);
                return Err(self.refuse(Fatal { how: End::Renegotiation, alert }));
            }
            Head::Nothing => match refused {
                // Splice refused and nothing is there: a malformed header was reported once, and never again.
                Some(e) => return Err(self.refuse(record::read_error(&e))),
                None => self.link.client.readable = false,
            },
            Head::Fatal(fatal) => return Err(self.refuse(fatal)),
        }
        Ok(0)
    }

    fn key_update_received(&mut self, reply: bool) -> Result<(), Ended> {
        let counters = &self.link.worker.counters;
        counters.key_updates_received.add(1);
        if self.storm.received_key_update() {
            return Err(self.refuse(Fatal { how: End::KeyUpdateStorm, alert: Some(alert::UNEXPECTED_MESSAGE) }));
        }
        if !self.link.worker.kernel.rekey {
            // Reading on would fail and take the sending side with it. Sending is healthy: the download goes on.
            self.break_up(End::NoRekey, NO_REKEY_QUIET);
            return Ok(());
        }
        if let Err(e) = self.keys.renew(self.link.client.fd(), Direction::Rx) {
            tracing::warn!(stage = "relay", reason = %e, "setting the client's new key failed");
            return Err(self.refuse(Fatal { how: End::Internal, alert: Some(alert::INTERNAL_ERROR) }));
        }
        self.key_update_due |= reply;
        Ok(())
    }

    /// Ends the connection, with an alert where the client can be told.
    fn refuse(&mut self, fatal: Fatal) -> Ended {
        let Some(body) = fatal.alert else { return Ended::abort(fatal.how) };
        // A failed read leaves its error on the socket, where it would stop the alert too.
        let _ = socket::take_error(self.link.client.fd());
        if !self.down_flow.is_in_flight() {
            let _ = ktls::send_record(self.link.client.fd(), content_type::ALERT, &body);
            if fatal.how == End::Renegotiation {
                let _ = ktls::send_record(self.link.client.fd(), content_type::ALERT, &alert::CLOSE_NOTIFY);
            }
        }
        Ended { how: fatal.how, client: ClientEnd::Await, upstream: UpstreamEnd::Reset }
    }

    // ---- upstream to client

    fn turn_down(&mut self, cx: &mut Context<'_>) -> Result<Turn, Ended> {
        let mut budget = TURN_BYTES;
        loop {
            if self.down == Down::Finished {
                return Ok(Turn::Wait);
            }
            if self.key_update_due && !self.down_flow.is_in_flight() && !self.send_key_update()? {
                return Ok(Turn::Wait);
            }
            if !self.down_flow.fills() && !self.drain_down(cx)? {
                return Ok(Turn::Wait);
            }
            match self.down {
                Down::Open => {}
                Down::Closing => return self.close_down(),
                Down::Notified | Down::Broken | Down::Finished => return Ok(Turn::Wait),
            }
            if !self.link.upstream.readable && !self.down_flow.is_in_flight() {
                self.down_flow.rest();
                return Ok(Turn::Wait);
            }
            if budget == 0 {
                return Ok(Turn::Again);
            }
            if !self.down_flow.is_in_flight() && self.keys.is_used_up(self.link.client.fd()) {
                self.key_used_up();
                continue;
            }
            match self.fill_down(cx) {
                Poll::Pending => return Ok(Turn::Wait),
                Poll::Ready(n) => budget = budget.saturating_sub(n.max(1)),
            }
        }
    }

    /// True when all has gone to the client.
    fn drain_down(&mut self, cx: &mut Context<'_>) -> Result<bool, Ended> {
        let (keys, counters) = (&mut self.keys, &self.link.worker.counters);
        let storm = &mut self.storm;
        let note = |n: usize| {
            counters.down_spliced.add(n as u64);
            keys.sealed(n);
            storm.sent_data(n);
        };
        match self.down_flow.drain(cx, &mut self.link.client, note) {
            Ok(drained) => Ok(drained == Drained::Empty),
            Err(_) => Err(Ended::abort(End::ClientReset)),
        }
    }

    /// Asked between two pipes, so that nothing on the way is lost: what is in reserve covers the next one.
    fn key_used_up(&mut self) {
        if self.keys.can_renew(&self.link.worker.kernel) {
            self.key_update_due = true;
        } else {
            self.up = Up::Broken(End::KeyExhausted);
            self.down = Down::Closing;
        }
    }

    fn fill_down(&mut self, cx: &mut Context<'_>) -> Poll<usize> {
        let result = if self.down_flow.has_pipe(&self.link.share) {
            ready!(self.down_flow.poll_fill(cx, &self.link.upstream, TURN_BYTES))
        } else {
            self.copy_down()
        };
        match result {
            Ok(0) => self.down = Down::Closing,
            Ok(n) => {
                self.link.moved_down += n as u64;
                self.link.watch.touch();
                self.link.upstream.readable &= n >= PLAIN_BYTES;
            }
            Err(e) if socket::is_again(&e) => {
                self.link.upstream.readable = false;
                return Poll::Ready(0);
            }
            Err(_) => self.down = Down::Broken,
        }
        self.down_flow.turn_to_drain();
        Poll::Ready(result.unwrap_or(0))
    }

    fn copy_down(&mut self) -> io::Result<usize> {
        let worker = self.link.worker.clone();
        let mut scratch = worker.scratch.borrow_mut();
        // What the client does not take is kept: little, until it has shown that it reads.
        let max = if self.link.client.is_wide() { COPY_BYTES } else { PLAIN_BYTES };
        let n = socket::recv(self.link.upstream.fd(), &mut scratch.received[..max])?;
        self.down_flow.copy(&scratch.received[..n]);
        worker.counters.down_copied.add(n as u64);
        self.keys.sealed(n);
        self.storm.sent_data(n);
        Ok(n)
    }

    /// Sends the KeyUpdate that is due, and seals under the new key from there on. False: the socket is full.
    fn send_key_update(&mut self) -> Result<bool, Ended> {
        if !self.link.client.writable {
            return Ok(false);
        }
        match ktls::send_record(self.link.client.fd(), content_type::HANDSHAKE, &record::KEY_UPDATE) {
            Ok(()) => {}
            Err(e) if socket::is_again(&e) => {
                // Nothing went out. The key must not change before the message that says so.
                self.link.client.writable = false;
                return Ok(false);
            }
            Err(_) => return Err(Ended::abort(End::ClientReset)),
        }
        if let Err(e) = self.keys.renew(self.link.client.fd(), Direction::Tx) {
            tracing::warn!(stage = "relay", reason = %e, "setting our new key failed");
            return Err(Ended::abort(End::Internal));
        }
        self.key_update_due = false;
        self.link.worker.counters.key_updates_sent.add(1);
        Ok(true)
    }

    /// Pipe empty, socket writable, close_notify, FIN: any other order can cut a record that the kernel still holds.
    fn close_down(&mut self) -> Result<Turn, Ended> {
        self.down_flow.rest();
        let writable =
            socket::poll_now(self.link.client.fd(), libc::POLLOUT).map_err(|_| Ended::abort(End::Internal))?;
        if writable & libc::POLLOUT == 0 {
            self.link.client.writable = false;
            return Ok(Turn::Wait);
        }
        match ktls::send_record(self.link.client.fd(), content_type::ALERT, &alert::CLOSE_NOTIFY) {
            Ok(()) => {
                let _ = socket::shutdown(self.link.client.fd(), Half::Write);
                self.down = Down::Finished;
                self.link.watch.allow_at_most(HALF_OPEN_TIMEOUT);
                Ok(Turn::Wait)
            }
            Err(e) if socket::is_again(&e) => {
                self.link.client.writable = false;
                Ok(Turn::Wait)
            }
            // The client has said its last word and did not wait for ours.
            Err(_) if self.up == Up::Finished => {
                self.down = Down::Finished;
                Ok(Turn::Wait)
            }
            Err(_) => Err(Ended::abort(End::ClientReset)),
        }
    }
}

/// The future of one relay.
pub struct Run<'a>(&'a mut Kernel);

impl Future for Run<'_> {
    type Output = Ended;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Ended> {
        let ended = ready!(self.0.poll(cx));
        if self.0.low_water.is_some() {
            let _ = socket::set_receive_low_water(self.0.link.client.fd(), 1);
        }
        Poll::Ready(ended)
    }
}
