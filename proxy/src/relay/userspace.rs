//! The relay whose records userspace protects: before the door, and where there is none.
//!
//!   client ─▶ recv ─▶ open in place ─▶ send ─▶ upstream        upstream ─▶ recv ─▶ seal in place ─▶ send ─▶ client
//!
//! Reads are large, into the worker's buffers, and records are opened and sealed where they lie: no byte is copied but
//! what a socket does not take, which the connection keeps. One that waits holds no buffer. When the connection is to
//! go through the door, reads become exact, so that the client's stream stands at the boundary of a record.

use super::record::{self, Fatal, Head, Storm, alert};
use super::{COPY_BYTES, COPY_RECORDS, HALF_OPEN_TIMEOUT};
use super::{ClientEnd, Down, Ended, Link, Scratch, Spare, TURN_BYTES, Turn, Up, UpstreamEnd, Want, over, timed_out};
use crate::observe::counters::End;
use crate::protect::{self, OVERHEAD_BYTES, OpenError, PLAIN_BYTES, WIRE_BYTES};
use crate::sys::ktls::{Direction, content_type};
use crate::sys::socket::{self, Half, VECTORS};
use std::future::Future;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

pub use super::keys::UserKeys;

/// Plaintext of records shorter than this is moved together, so that one send takes many: longer ones are sent from
/// where they lie.
const GATHER_BELOW_BYTES: usize = 2048;

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
    pub keys: UserKeys,
    /// Ciphertext of a record that is not complete yet.
    leftover: Vec<u8>,
    /// The leftover comes from the handshake, and may hold complete records that nobody has opened.
    unopened: bool,
    /// Plaintext for the upstream that it did not take yet.
    pub to_upstream: Spare,
    /// Ciphertext for the client that it did not take yet.
    pub to_client: Spare,
    pub up: Up,
    pub down: Down,
    pub door: Door,
    /// The client has changed its key since the handshake.
    pub rekeyed: bool,
    /// The client has asked for a KeyUpdate of ours.
    reply_owed: bool,
    storm: Storm,
}

/// Where the relay stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Everything that the client has sent is opened, everything sealed is sent.
    AtDoor,
    Over(Ended),
}

impl Userspace {
    /// `leftover` is ciphertext that came behind the handshake.
    pub fn new(link: Link, keys: UserKeys, leftover: Vec<u8>, door: Door) -> Self {
        Self {
            link,
            keys,
            unopened: !leftover.is_empty(),
            leftover,
            to_upstream: Spare::default(),
            to_client: Spare::default(),
            up: Up::Open,
            down: Down::Open,
            door,
            rekeyed: false,
            reply_owed: false,
            storm: Storm::default(),
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

    /// A client that has ended its stream stays: what it sends behind the end is no record of the kernel's, and would
    /// stop the sending side too.
    fn at_door(&self) -> bool {
        self.wants_door()
            && self.up == Up::Open
            && self.leftover.is_empty()
            && self.to_client.is_empty()
            && !self.reply_owed
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
            if matches!(self.up, Up::Finished | Up::Broken(_)) || !self.flush_up() {
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
            budget = budget.saturating_sub(moved.max(PLAIN_BYTES / 16));
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
        let max = if self.wants_door() { protect::missing_bytes(&self.leftover) } else { COPY_BYTES };
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
        let Scratch { received: wire, pieces, .. } = scratch;
        let wire = &mut wire[..received];
        pieces.clear();
        let mut at = 0;
        let mut outcome = Ok(());
        while outcome.is_ok() && self.up == Up::Open {
            let Some(len) = protect::record_bytes(&wire[at..]) else { break };
            if !self.is_record(&wire[at..]) {
                outcome = Err(self.refuse_head(record::unexpected()));
            } else if len > WIRE_BYTES {
                outcome = Err(self.refuse(refusal(OpenError::Overflow)));
            } else if len > wire.len() - at {
                break;
            } else {
                outcome = self.record(wire, at..at + len, pieces);
                at += len;
            }
        }
        self.leftover = if at == received || self.up != Up::Open { Vec::new() } else { wire[at..].to_vec() };
        self.link.watch.touch();
        let moved = pieces.iter().map(Range::len).sum();
        if self.hand_on(wire, pieces).is_err() {
            self.give_up_upload();
        }
        self.link.moved_up += moved as u64;
        self.link.worker.counters.up_copied.add(moved as u64);
        outcome.map(|()| moved)
    }

    /// A header that may be one: outside, a protected record of TLS 1.3 is always data.
    fn is_record(&self, header: &[u8]) -> bool {
        match header {
            [content_type::APPLICATION_DATA, 3, ..] => true,
            [content_type::ALERT | content_type::HANDSHAKE, 3, ..] => self.keys.ring.is_tls12(),
            _ => false,
        }
    }

    /// Opens one record: data becomes a piece, anything else is done.
    fn record(&mut self, wire: &mut [u8], at: Range<usize>, pieces: &mut Vec<Range<usize>>) -> Result<(), Ended> {
        let tls12 = self.keys.ring.is_tls12();
        let (kind, range) = match self.keys.rx.open(&mut wire[at.clone()]) {
            Ok((kind, range)) => (kind, at.start + range.start..at.start + range.end),
            Err(error) => return Err(self.refuse(refusal(error))),
        };
        match kind {
            content_type::APPLICATION_DATA => {
                if !range.is_empty() {
                    self.storm.received_data();
                    gather(wire, range, pieces);
                }
                Ok(())
            }
            content_type::ALERT => self.head(record::read_alert(&wire[range], tls12)),
            content_type::HANDSHAKE => self.head(record::read_handshake(&wire[range], tls12)),
            _ => Err(self.refuse_head(record::unexpected())),
        }
    }

    fn head(&mut self, head: Head) -> Result<(), Ended> {
        match head {
            Head::Ignored | Head::Data(_) | Head::Nothing | Head::Eof => Ok(()),
            Head::CloseNotify => {
                self.up = Up::Closing;
                Ok(())
            }
            Head::KeyUpdate { reply } => self.key_update_received(reply),
            Head::Renegotiation | Head::Fatal(_) => Err(self.refuse_head(head)),
        }
    }

    fn key_update_received(&mut self, reply: bool) -> Result<(), Ended> {
        if self.storm.received_key_update() {
            return Err(self.refuse(Fatal { how: End::KeyUpdateStorm, alert: Some(alert::UNEXPECTED_MESSAGE) }));
        }
        self.link.worker.counters.key_updates_received.add(1);
        self.rekeyed = true;
        self.reply_owed |= reply;
        self.renew(Direction::Rx)
    }

    fn renew(&mut self, direction: Direction) -> Result<(), Ended> {
        self.keys.renew(direction).map_err(|e| {
            tracing::error!(stage = "relay", reason = %e, "deriving the next key failed");
            Ended::abort(End::Internal)
        })
    }

    /// Sends the pieces, and keeps what the upstream does not take.
    fn hand_on(&mut self, wire: &[u8], pieces: &[Range<usize>]) -> std::io::Result<()> {
        let mut full = false;
        for now in pieces.chunks(VECTORS) {
            let mut sent = 0;
            if !full {
                let mut vectors = [IoSlice::new(&[]); VECTORS];
                for (vector, piece) in vectors.iter_mut().zip(now) {
                    *vector = IoSlice::new(&wire[piece.clone()]);
                }
                sent = match socket::send_vectored(self.link.upstream.fd(), &vectors[..now.len()]) {
                    Ok(n) => n,
                    Err(e) if socket::is_again(&e) => 0,
                    Err(e) => return Err(e),
                };
            }
            for piece in now {
                let taken = sent.min(piece.len());
                sent -= taken;
                full |= taken < piece.len();
                self.to_upstream.push(&wire[piece.start + taken..piece.end]);
            }
        }
        // A short send may only mean that the socket took a part: the flush that follows finds out.
        Ok(())
    }

    /// Ends the connection with an alert, which `close` sends, then FIN.
    fn refuse(&mut self, fatal: Fatal) -> Ended {
        let Some(body) = fatal.alert else { return Ended::abort(fatal.how) };
        self.queue(content_type::ALERT, &body);
        Ended { how: fatal.how, client: ClientEnd::Discard, upstream: UpstreamEnd::Reset }
    }

    fn refuse_head(&mut self, head: Head) -> Ended {
        match head {
            Head::Fatal(fatal) => self.refuse(fatal),
            Head::Renegotiation
            | Head::Data(_)
            | Head::CloseNotify
            | Head::Ignored
            | Head::KeyUpdate { .. }
            | Head::Eof
            | Head::Nothing => {
                let ended = self.refuse(Fatal { how: End::Renegotiation, alert: Some(alert::NO_RENEGOTIATION) });
                self.queue(content_type::ALERT, &alert::CLOSE_NOTIFY);
                ended
            }
        }
    }

    /// Seals a short record of ours behind what the client has not taken yet.
    fn queue(&mut self, kind: u8, body: &[u8]) {
        let mut slot = [0u8; 16 + OVERHEAD_BYTES];
        let head = self.keys.tx.head_bytes();
        slot[head..head + body.len()].copy_from_slice(body);
        let len = self.keys.tx.seal(kind, &mut slot, body.len());
        self.to_client.push(&slot[..len]);
    }

    /// Says that our key changes, and changes it.
    fn queue_key_update(&mut self) -> Result<(), Ended> {
        self.queue(content_type::HANDSHAKE, &record::KEY_UPDATE);
        self.link.worker.counters.key_updates_sent.add(1);
        self.reply_owed = false;
        self.renew(Direction::Tx)
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
                    self.queue(content_type::ALERT, &alert::CLOSE_NOTIFY);
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
            if self.reply_owed {
                // One reply covers every request before it.
                self.queue_key_update()?;
                continue;
            }
            if !self.link.upstream.readable || self.at_door() {
                return Ok(Turn::Wait);
            }
            if self.keys.is_used_up(COPY_RECORDS) {
                self.key_used_up()?;
                continue;
            }
            let Some(moved) = self.seal(scratch)? else { return Ok(Turn::Wait) };
            budget = budget.saturating_sub(moved);
            if budget == 0 {
                return Ok(Turn::Again);
            }
        }
    }

    fn key_used_up(&mut self) -> Result<(), Ended> {
        if !self.keys.ring.is_tls12() {
            return self.queue_key_update();
        }
        // TLS 1.2 has no other key: the stream ends here, by a close_notify.
        self.up = Up::Broken(End::KeyExhausted);
        self.down = Down::Closing;
        Ok(())
    }

    /// Reads plaintext to where its records will be, seals them there and sends them. `None`: nothing to read.
    fn seal(&mut self, scratch: &mut Scratch) -> Result<Option<usize>, Ended> {
        let (head, tail) = (self.keys.tx.head_bytes(), self.keys.tx.tail_bytes());
        let slot_bytes = head + PLAIN_BYTES + tail;
        let slots = &mut scratch.sealed[..slot_bytes * COPY_RECORDS];
        let mut chunks = slots.chunks_exact_mut(slot_bytes);
        let mut body = || chunks.next().map_or(&mut [][..], |slot| &mut slot[head..head + PLAIN_BYTES]);
        let mut vectors: [IoSliceMut<'_>; COPY_RECORDS] = std::array::from_fn(|_| IoSliceMut::new(body()));
        let plain = match socket::recv_vectored(self.link.upstream.fd(), &mut vectors) {
            Ok(0) => {
                self.down = Down::Closing;
                return Ok(Some(0));
            }
            Ok(n) => n,
            Err(e) if socket::is_again(&e) => {
                self.link.upstream.readable = false;
                return Ok(None);
            }
            Err(_) => {
                self.down = Down::Broken;
                return Ok(None);
            }
        };
        self.link.upstream.readable = plain == COPY_BYTES;
        // Every slot but the last is full, so the records lie one behind the other.
        let mut sealed = 0;
        for (n, slot) in slots.chunks_exact_mut(slot_bytes).take(plain.div_ceil(PLAIN_BYTES)).enumerate() {
            let len = PLAIN_BYTES.min(plain - n * PLAIN_BYTES);
            sealed += self.keys.tx.seal(content_type::APPLICATION_DATA, slot, len);
        }
        let gone = |_| Ended::abort(End::ClientReset);
        self.to_client.send(&mut self.link.client, &slots[..sealed]).map_err(gone)?;
        self.storm.sent_data(plain);
        self.link.watch.touch();
        self.link.moved_down += plain as u64;
        self.link.worker.counters.down_copied.add(plain as u64);
        Ok(Some(plain))
    }
}

/// Adds a record's plaintext to the pieces: a short one is moved to the end of the piece before it.
fn gather(wire: &mut [u8], range: Range<usize>, pieces: &mut Vec<Range<usize>>) {
    if range.len() < GATHER_BELOW_BYTES
        && let Some(last) = pieces.last_mut()
    {
        let end = last.end;
        last.end += range.len();
        wire.copy_within(range, end);
    } else {
        pieces.push(range);
    }
}

fn refusal(error: OpenError) -> Fatal {
    match error {
        OpenError::BadMac => Fatal { how: End::BadRecordMac, alert: Some(alert::BAD_RECORD_MAC) },
        OpenError::Overflow => Fatal { how: End::BadRecord, alert: Some(alert::RECORD_OVERFLOW) },
        OpenError::Malformed => Fatal { how: End::BadRecord, alert: Some(alert::DECODE_ERROR) },
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
