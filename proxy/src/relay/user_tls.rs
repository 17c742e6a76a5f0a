//! A client's plaintext where userspace protects the records: opened where they were received, sealed where they are sent.
//!
//!   client ─▶ recv ─▶ open in place ─▶ pieces of plaintext        plaintext ─▶ seal in place ─▶ send ─▶ client
//!
//! Everything about the client's stream that is TLS is here: records in parts, alerts, KeyUpdates, storms. Who uses it
//! sees plaintext and how the stream ended. Nothing is held while nothing moves but what a socket did not take, and a
//! record that is not complete. This module knows no upstream, only a socket that it may read plaintext from.

use super::reach::{Reach, ShortReads};
use super::record::{self, Fatal, Head, Storm, alert};
use super::{COPY_BYTES, RECEIVE_BYTES, RECEIVE_MOST_BYTES, SEAL_RECORDS};
use super::{Client, ClientEnd, Ended, Scratch, Spare, UpstreamEnd};
use crate::observe::counters::End;
use crate::protect::{self, OVERHEAD_BYTES, OpenError, PLAIN_BYTES, WIRE_BYTES};
use crate::ring::Sock;
use crate::sys::ktls::{Direction, content_type};
use crate::sys::socket::{self, Follow};
use std::io::IoSliceMut;
use std::ops::Range;

pub use super::keys::UserKeys;

/// Plaintext of records shorter than this is moved together, so that one send takes many: longer ones are sent from
/// where they lie.
const GATHER_BELOW_BYTES: usize = 2048;
/// Read of an upstream before the client is known to take more: what its queue does not take is kept, as long as it likes.
const FIRST_READ_BYTES: usize = 4 * PLAIN_BYTES;

/// See the module.
pub struct UserTls {
    pub client: Client,
    pub keys: UserKeys,
    /// Ciphertext of a record that is not complete yet.
    leftover: Vec<u8>,
    /// The leftover comes from the handshake, and may hold complete records that nobody has opened.
    unopened: bool,
    /// Ciphertext for the client that it did not take yet.
    pub to_client: Spare,
    /// The handshake's last records, which wait for the next one to go with it.
    tickets: Spare,
    /// The upstream has much to say: how much the client's queue takes is asked before it is read.
    flows: bool,
    short_reads: ShortReads,
    /// Read of the upstream at once, and of the client.
    reach_down: Reach<COPY_BYTES, { SEAL_RECORDS * PLAIN_BYTES }>,
    reach_up: Reach<RECEIVE_BYTES, RECEIVE_MOST_BYTES>,
    /// Nothing is read for the client until its queue is shorter: its bytes stay with the upstream.
    waits_for_room: bool,
    /// The client has changed its key since the handshake.
    pub rekeyed: bool,
    /// The client has asked for a KeyUpdate of ours.
    reply_owed: bool,
    storm: Storm,
}

/// What a read of the client came to: plaintext in `Scratch::pieces`, and how the stream stands behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    pub bytes: usize,
    pub then: Then,
}

/// The client's stream behind what was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    Open,
    /// close_notify is in.
    Closed,
    /// FIN without close_notify.
    Truncated,
    /// A KeyUpdate that the kernel cannot follow: reading on would fail and take the sending side with it, which is
    /// healthy.
    NoRekey,
    /// The client broke the rules: an alert is queued where it can be told.
    Refused(Ended),
}

/// What a read of the upstream came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealed {
    /// Bytes of plaintext, sealed and sent or queued.
    Bytes(usize),
    /// The upstream's FIN.
    Eof,
    /// Nothing to read now, or nothing that the client has room for.
    Nothing,
    /// The upstream is gone.
    Broken,
}

impl UserTls {
    /// `leftover` is ciphertext that came behind the handshake, `tickets` what it has left to send.
    pub fn new(client: Client, keys: UserKeys, leftover: Vec<u8>, tickets: Spare) -> Self {
        Self {
            client,
            keys,
            unopened: !leftover.is_empty(),
            leftover,
            to_client: Spare::default(),
            tickets,
            flows: false,
            short_reads: ShortReads::default(),
            reach_down: Reach::default(),
            reach_up: Reach::default(),
            waits_for_room: false,
            rekeyed: false,
            reply_owed: false,
            storm: Storm::default(),
        }
    }

    /// Nothing of the stream is in userspace, either way: the kernel may go on from here.
    pub fn is_at_boundary(&self) -> bool {
        self.leftover.is_empty() && self.to_client.is_empty() && self.tickets.is_empty() && !self.reply_owed
    }

    /// There may be something to receive without waiting.
    pub fn is_readable(&self) -> bool {
        self.unopened || self.client.sock.readable
    }

    // ---- client's plaintext

    /// As `receive_quietly`, and every byte that comes renews the connection's time.
    pub fn receive(&mut self, scratch: &mut Scratch, max: usize, exact: bool) -> Result<Option<Received>, Ended> {
        let received = self.receive_quietly(scratch, max, exact)?;
        if received.is_some_and(|received| received.then != Then::Truncated) {
            self.client.watch.touch();
        }
        Ok(received)
    }

    /// Reads at most `max` bytes of ciphertext and opens what is complete. `exact`: no byte beyond the next record, so
    /// that the stream comes to stand at a boundary. `None`: nothing to read.
    pub fn receive_quietly(
        &mut self,
        scratch: &mut Scratch,
        max: usize,
        exact: bool,
    ) -> Result<Option<Received>, Ended> {
        scratch.pieces.clear();
        let kept = self.leftover.len();
        if !self.is_readable() {
            return Ok(None);
        }
        scratch.received[..kept].copy_from_slice(&self.leftover);
        if std::mem::take(&mut self.unopened) {
            self.leftover.clear();
            return Ok(Some(self.open(scratch, kept)));
        }
        let max = if exact {
            protect::missing_bytes(&self.leftover)
        } else {
            max.min(self.reach_up.bytes(&self.client.worker.send_memory))
        };
        match socket::recv(self.client.sock.fd(), &mut scratch.received[kept..kept + max]) {
            Ok(0) => Ok(Some(Received { bytes: 0, then: Then::Truncated })),
            Ok(n) => {
                self.client.sock.readable = n == max;
                self.leftover.clear();
                self.send_tickets()?;
                Ok(Some(self.open(scratch, kept + n)))
            }
            Err(e) if socket::is_again(&e) => {
                self.client.sock.readable = false;
                Ok(None)
            }
            Err(_) => Err(Ended::abort(End::ClientReset)),
        }
    }

    /// What was received was handed on: more is read at once now, or less.
    pub fn handed_on(&mut self, all_taken: bool) {
        self.reach_up.note(self.client.sock.readable, all_taken);
    }

    /// Opens what was received, up to the end of the stream or to what is no record of it.
    fn open(&mut self, scratch: &mut Scratch, received: usize) -> Received {
        let Scratch { received: wire, pieces, .. } = scratch;
        let wire = &mut wire[..received];
        let mut at = 0;
        let mut then = Then::Open;
        while then == Then::Open {
            let Some(len) = protect::record_bytes(&wire[at..]) else { break };
            if !self.is_record(&wire[at..]) {
                then = Then::Refused(self.refuse_head(record::unexpected()));
            } else if len > WIRE_BYTES {
                then = Then::Refused(self.refuse(refusal(OpenError::Overflow)));
            } else if len > wire.len() - at {
                break;
            } else {
                then = self.record(wire, at..at + len, pieces).unwrap_or_else(Then::Refused);
                at += len;
            }
        }
        self.leftover = if at == received || then != Then::Open { Vec::new() } else { wire[at..].to_vec() };
        Received { bytes: pieces.iter().map(Range::len).sum(), then }
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
    fn record(&mut self, wire: &mut [u8], at: Range<usize>, pieces: &mut Vec<Range<usize>>) -> Result<Then, Ended> {
        let tls12 = self.keys.ring.is_tls12();
        let (kind, range) = match self.keys.rx.open(&mut wire[at.clone()]) {
            Ok((kind, range)) => (kind, at.start + range.start..at.start + range.end),
            Err(error) => return Err(self.refuse(refusal(error))),
        };
        match kind {
            content_type::APPLICATION_DATA if range.is_empty() => self.nothing_received(),
            content_type::APPLICATION_DATA => {
                self.storm.received_data();
                gather(wire, range, pieces);
                Ok(Then::Open)
            }
            content_type::ALERT => self.head(record::read_alert(&wire[range], tls12)),
            content_type::HANDSHAKE => self.head(record::read_handshake(&wire[range], tls12)),
            _ => Err(self.refuse_head(record::unexpected())),
        }
    }

    fn head(&mut self, head: Head) -> Result<Then, Ended> {
        match head {
            Head::Ignored => self.nothing_received(),
            Head::Data(_) | Head::Nothing | Head::Eof => Ok(Then::Open),
            Head::CloseNotify => Ok(Then::Closed),
            Head::KeyUpdate { reply } => self.key_update_received(reply).map(|()| Then::Open),
            Head::Renegotiation | Head::Fatal(_) => Err(self.refuse_head(head)),
        }
    }

    /// A record that says nothing: so many of them in a row are a storm too, as BoringSSL and Go have it.
    fn nothing_received(&mut self) -> Result<Then, Ended> {
        if self.storm.received_key_update() { Err(self.refuse_head(record::unexpected())) } else { Ok(Then::Open) }
    }

    fn key_update_received(&mut self, reply: bool) -> Result<(), Ended> {
        if self.storm.received_key_update() {
            return Err(self.refuse(Fatal { how: End::KeyUpdateStorm, alert: Some(alert::UNEXPECTED_MESSAGE) }));
        }
        self.client.worker.counters.key_updates_received.add(1);
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
                self.queue_close_notify();
                ended
            }
        }
    }

    // ---- plaintext to the client

    /// Something waits for the client to take it: what is sealed here, or what is left with the upstream.
    pub fn is_blocked(&self) -> bool {
        !self.to_client.is_empty() || self.waits_for_room
    }

    /// How much to read for the client: no more than it takes, or a stalled one makes us keep the rest. `None`: its queue
    /// has to become shorter before.
    fn appetite(&mut self) -> Option<usize> {
        let sock = &mut self.client.sock;
        let room = match self.flows {
            true => sock.room_bytes(),
            false if self.short_reads.are_usual() => Some(PLAIN_BYTES),
            false => Some(FIRST_READ_BYTES),
        };
        let appetite = match room {
            Some(room) => {
                let reach = self.reach_down.bytes(&self.client.worker.send_memory);
                Some((room / PLAIN_BYTES).clamp(1, reach / PLAIN_BYTES) * PLAIN_BYTES)
            }
            None if sock.is_full() => None,
            // It has got more room.
            None => Some(FIRST_READ_BYTES),
        };
        self.waits_for_room = appetite.is_none();
        appetite
    }

    /// Seals a short record of ours behind what the client has not taken yet.
    fn queue(&mut self, kind: u8, body: &[u8]) {
        let mut slot = [0u8; 16 + OVERHEAD_BYTES];
        let head = self.keys.tx.head_bytes();
        slot[head..head + body.len()].copy_from_slice(body);
        let len = self.keys.tx.seal(kind, &mut slot, body.len());
        self.to_client.append(&mut self.tickets);
        self.to_client.push(&slot[..len]);
    }

    /// The client has more to say before it gets an answer: it may be long in coming.
    fn send_tickets(&mut self) -> Result<(), Ended> {
        if self.tickets.is_empty() {
            return Ok(());
        }
        self.to_client.append(&mut self.tickets);
        // That a client takes these is no reason to wait longer.
        self.to_client.flush(&mut self.client.sock).map(drop).map_err(Ended::client_gone)
    }

    /// The FIN is to follow it at once, and may be in the same segment.
    pub fn queue_close_notify(&mut self) {
        self.client.sock.follow = Follow::Fin;
        self.queue(content_type::ALERT, &alert::CLOSE_NOTIFY);
    }

    /// Says that our key changes, and changes it. One covers every request of the client's before it.
    pub fn queue_key_update(&mut self) -> Result<(), Ended> {
        self.queue(content_type::HANDSHAKE, &record::KEY_UPDATE);
        self.client.worker.counters.key_updates_sent.add(1);
        self.reply_owed = false;
        self.renew(Direction::Tx)
    }

    /// The client waits for a KeyUpdate of ours.
    pub fn owes_key_update(&self) -> bool {
        self.reply_owed
    }

    /// Sends what is queued. True when nothing is left.
    pub fn flush(&mut self) -> std::io::Result<bool> {
        let before = self.to_client.len();
        let flushed = self.to_client.flush(&mut self.client.sock);
        if self.to_client.len() < before {
            self.client.watch.touch();
        }
        flushed
    }

    /// Reads at most `max` bytes of plaintext, and no more than the client has room for, to where their records will be,
    /// seals them there and sends them.
    pub fn seal_from(&mut self, upstream: &mut Sock, scratch: &mut Scratch, max: u64) -> Result<Sealed, Ended> {
        let (head, tail) = (self.keys.tx.head_bytes(), self.keys.tx.tail_bytes());
        let slot_bytes = head + PLAIN_BYTES + tail;
        let slots = &mut scratch.sealed[..slot_bytes * SEAL_RECORDS];
        let Some(appetite) = self.appetite() else { return Ok(Sealed::Nothing) };
        let of_this_key = self.keys.records_left().saturating_mul(PLAIN_BYTES as u64);
        let wanted = usize::try_from(max.min(of_this_key)).unwrap_or(usize::MAX).min(appetite);
        let plain = if wanted <= PLAIN_BYTES {
            socket::recv(upstream.fd(), &mut slots[head..head + wanted])
        } else {
            let mut vectors: [IoSliceMut<'_>; SEAL_RECORDS] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
            let count = wanted.div_ceil(PLAIN_BYTES);
            for (n, (vector, slot)) in
                vectors.iter_mut().zip(slots.chunks_exact_mut(slot_bytes)).enumerate().take(count)
            {
                *vector = IoSliceMut::new(&mut slot[head..head + PLAIN_BYTES.min(wanted - n * PLAIN_BYTES)]);
            }
            socket::recv_vectored(upstream.fd(), &mut vectors[..count])
        };
        let plain = match plain {
            Ok(0) => return Ok(Sealed::Eof),
            Ok(n) => n,
            Err(e) if socket::is_again(&e) => {
                upstream.readable = false;
                return Ok(Sealed::Nothing);
            }
            Err(_) => return Ok(Sealed::Broken),
        };
        upstream.received(plain);
        upstream.readable = plain == wanted;
        self.flows = plain >= FIRST_READ_BYTES || (self.flows && plain >= PLAIN_BYTES);
        self.short_reads.note(plain);
        self.send_slots(scratch, plain)?;
        self.reach_down.note(upstream.readable, self.to_client.is_empty());
        Ok(Sealed::Bytes(plain))
    }

    /// Seals plaintext of ours, or of a body that came through our memory, and sends it. `scratch.sealed` is used.
    pub fn seal(&mut self, scratch: &mut Scratch, plaintext: &[u8]) -> Result<(), Ended> {
        let (head, tail) = (self.keys.tx.head_bytes(), self.keys.tx.tail_bytes());
        let slot_bytes = head + PLAIN_BYTES + tail;
        for part in plaintext.chunks(COPY_BYTES) {
            let slots = scratch.sealed.chunks_exact_mut(slot_bytes);
            for (slot, body) in slots.zip(part.chunks(PLAIN_BYTES)) {
                slot[head..head + body.len()].copy_from_slice(body);
            }
            self.send_slots(scratch, part.len())?;
        }
        Ok(())
    }

    /// Seals so many bytes that lie in the slots and sends the records. Every slot but the last is full, so the
    /// records lie one behind the other.
    fn send_slots(&mut self, scratch: &mut Scratch, plain: usize) -> Result<(), Ended> {
        let slot_bytes = self.keys.tx.head_bytes() + PLAIN_BYTES + self.keys.tx.tail_bytes();
        let slots = &mut scratch.sealed;
        let mut sealed = 0;
        for (n, slot) in slots.chunks_exact_mut(slot_bytes).take(plain.div_ceil(PLAIN_BYTES)).enumerate() {
            let len = PLAIN_BYTES.min(plain - n * PLAIN_BYTES);
            sealed += self.keys.tx.seal(content_type::APPLICATION_DATA, slot, len);
        }
        if plain >= PLAIN_BYTES {
            self.client.sock.limit_room();
        }
        self.to_client.append(&mut self.tickets);
        self.to_client.send(&mut self.client.sock, &slots[..sealed]).map_err(Ended::client_gone)?;
        self.storm.sent_data(plain);
        self.client.watch.touch();
        self.client.moved_down += plain as u64;
        self.client.worker.counters.down_copied.add(plain as u64);
        Ok(())
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
        OpenError::NoType => Fatal { how: End::UnexpectedMessage, alert: Some(alert::UNEXPECTED_MESSAGE) },
    }
}
