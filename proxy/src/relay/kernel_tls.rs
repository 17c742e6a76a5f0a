//! A client's plaintext behind the door: the kernel opens and seals the records, this module does what else TLS asks for.
//!
//!   client (TLS_RX) ─▶ recv, or splice into a pipe        a pipe, or send ─▶ (TLS_TX) client
//!
//! Which of the two is `Ways`. A large receive takes a MiB of records in one call, opened right where it wants them; a splice
//! takes one record. A large answer goes best through a pipe, a short one does not.
//!
//! Splice takes data only. When it will not, a record of another kind is at the head, and is read by recvmsg at once,
//! because a poll no longer tells of it. Nothing here asks for a kernel version: the probe's answers decide. This module
//! knows no upstream.

use super::flow::{Drained, Flow, Splicer};
use super::reach::{Reach, ShortReads};
use super::record::{self, Fatal, Head, Storm, alert};
use super::user_tls::{Received, Sealed, Then};
use super::{COPY_BYTES, Client, ClientEnd, Ended, Scratch, TURN_BYTES, UpstreamEnd, Want, is_gone};
use super::{RECEIVE_BYTES, RECEIVE_MOST_BYTES};
use crate::observe::counters::End;
use crate::protect::PLAIN_BYTES;
use crate::ring::{Look, Sock};
use crate::sys::ktls::{self, Direction, content_type};
use crate::sys::socket;
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

/// See the module.
pub struct KernelTls {
    pub client: Client,
    keys: KernelKeys,
    /// A KeyUpdate of ours is due, because the client asked for one or our key is used up.
    key_update_due: bool,
    storm: Storm,
    /// Received of the client at once, where that is copied.
    reach_up: Reach<RECEIVE_BYTES, RECEIVE_MOST_BYTES>,
    /// The last time it was as much as was asked for.
    received_in_full: bool,
    short_reads: ShortReads,
    /// What splice refused to take behind a pipe that was not empty: a malformed header is told of once.
    refused: Option<io::Error>,
    /// A partial record counts as readable.
    partial_record_wakes: bool,
    /// SO_RCVLOWAT stands above 1, because a partial record would wake us for ever; read again when this is over.
    low_water: Option<Pin<Box<Sleep>>>,
    /// A splice to the client runs on the ring: no record of ours may come between.
    pub is_sending: bool,
}

impl KernelTls {
    pub fn new(mut client: Client, keys: KernelKeys) -> Self {
        if client.worker.ways.copies_up {
            // It only saves a copy.
            let _ = ktls::expect_no_padding(client.sock.fd());
        } else {
            client.sock.read_by_level();
        }
        Self {
            partial_record_wakes: client.worker.kernel.partial_record_wakes,
            client,
            keys,
            key_update_due: false,
            storm: Storm::default(),
            reach_up: Reach::default(),
            received_in_full: false,
            short_reads: ShortReads::default(),
            refused: None,
            low_water: None,
            is_sending: false,
        }
    }

    /// Who makes this connection's splices.
    pub fn splicer(&self) -> Splicer {
        self.client.worker.ways.splicer
    }

    // ---- waiting for the client

    /// As the client's own; where the kernel would wake for each byte of a record, it wakes for more of it.
    pub fn poll_ready(
        &mut self,
        cx: &mut Context<'_>,
        upstream: Option<&mut Sock>,
        want: Want,
        look: Look,
    ) -> Poll<Result<(), Verdict>> {
        if want.client_read && !self.raise_low_water() {
            return Poll::Ready(Ok(()));
        }
        let ready = self.client.poll_ready(cx, upstream, want, look);
        // While a splice on the ring reads again, the mark stays: what waits at it has not begun.
        if want.client_read && self.lower_low_water(cx) && ready.is_pending() {
            self.client.sock.readable = true;
            return Poll::Ready(Ok(()));
        }
        ready
    }

    /// Where a partial record counts as readable, asks to be woken by the next byte instead. False: read again, as
    /// more than the bytes counted here may have come before the mark was set.
    fn raise_low_water(&mut self) -> bool {
        let armed = self.low_water.is_some() || self.client.sock.read_armed();
        if !self.partial_record_wakes || armed {
            return true;
        }
        match socket::readable_bytes(self.client.sock.fd()) {
            Ok(partial) if partial > 0 => {
                let _ = socket::set_receive_low_water(self.client.sock.fd(), partial + 1);
                self.low_water = Some(Box::pin(tokio::time::sleep(PARTIAL_RECORD_RETRY)));
                self.client.sock.readable = true;
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
        if over || !self.client.sock.read_armed() {
            self.reset_low_water();
        }
        over
    }

    pub fn reset_low_water(&mut self) {
        if self.low_water.take().is_some() {
            let _ = socket::set_receive_low_water(self.client.sock.fd(), 1);
        }
    }

    // ---- plaintext for the client

    /// Moves at most `max` bytes from the upstream into the flow, by its pipe or, where there is none, by a copy.
    pub fn fill_down(
        &mut self,
        cx: &mut Context<'_>,
        flow: &mut Flow,
        upstream: &mut Sock,
        scratch: &mut Scratch,
        max: usize,
    ) -> Poll<Sealed> {
        let max = max.min(TURN_BYTES);
        let is_short = self.client.worker.ways.copies_short && self.short_reads.are_usual();
        let spliced = !is_short && flow.has_pipe(&self.client.share);
        let result = if is_short {
            self.copy_down(flow, upstream, scratch, max.min(PLAIN_BYTES))
        } else if spliced {
            let result = ready!(flow.poll_fill(cx, upstream, max));
            if flow.in_pipe() > 0 {
                flow.turn_to_drain();
            }
            result
        } else {
            self.copy_down(flow, upstream, scratch, max)
        };
        Poll::Ready(match result {
            Ok(0) => Sealed::Eof,
            Ok(n) => {
                self.short_reads.note(n);
                if n >= PLAIN_BYTES {
                    self.client.sock.limit_room();
                }
                self.client.moved_down += n as u64;
                self.client.watch.touch();
                // A pipe may be full of few bytes: small pieces take a slot each.
                upstream.readable &= spliced || n >= PLAIN_BYTES.min(max);
                Sealed::Bytes(n)
            }
            Err(e) if socket::is_again(&e) => {
                upstream.readable = false;
                Sealed::Nothing
            }
            Err(_) => Sealed::Broken,
        })
    }

    fn copy_down(&mut self, flow: &mut Flow, upstream: &Sock, scratch: &mut Scratch, max: usize) -> io::Result<usize> {
        // What the client does not take is kept: little, until it has shown that it reads.
        let most = if self.client.sock.is_wide() { COPY_BYTES } else { PLAIN_BYTES };
        let n = socket::recv(upstream.fd(), &mut scratch.received[..max.min(most)])?;
        upstream.received(n);
        let all = 0..n;
        if n > 0 && flow.hand_on(&self.client.sock, &scratch.received, std::slice::from_ref(&all)).is_err() {
            // The error is found again, and told, when what is kept is sent.
            flow.copy(&scratch.received[..n]);
        }
        self.client.worker.counters.down_copied.add(n as u64);
        self.sealed(n);
        Ok(n)
    }

    /// Sends what is on the way. True when all has gone to the client.
    pub fn drain(&mut self, cx: &mut Context<'_>, flow: &mut Flow) -> Result<bool, Ended> {
        let mut spliced = 0;
        let drained = flow.drain(cx, &mut self.client.sock, &self.client.watch, |n| spliced += n);
        if spliced > 0 {
            self.client.worker.counters.down_spliced.add(spliced as u64);
            self.sealed(spliced);
        }
        match drained {
            Ok(drained) => Ok(drained == Drained::Empty),
            Err(_) => Err(Ended::abort(End::ClientReset)),
        }
    }

    // ---- client's plaintext

    /// What the client sends is received into memory and sent on, and not spliced.
    pub fn copies_up(&self) -> bool {
        self.client.worker.ways.copies_up
    }

    /// As `receive_quietly`, and what comes renews the connection's time.
    pub fn receive(&mut self, scratch: &mut Scratch, max: usize) -> Result<Received, Ended> {
        let received = self.receive_quietly(scratch, max)?;
        if received.bytes > 0 {
            self.client.watch.touch();
        }
        Ok(received)
    }

    /// Receives at most `max` bytes to the front of `scratch.received`, or what stands at the head instead. With no
    /// bytes and an open stream, `readable` tells whether anything was there.
    pub fn receive_quietly(&mut self, scratch: &mut Scratch, max: usize) -> Result<Received, Ended> {
        let at_once = max.min(self.reach_up.bytes(&self.client.worker.send_memory));
        let refused = self.refused.take();
        let received = self.read(&mut scratch.received[..at_once], refused)?;
        self.received_in_full = received.bytes == at_once;
        Ok(received)
    }

    /// What was received was handed on: more is received at once now, or less.
    pub fn handed_on(&mut self, all_taken: bool) {
        self.reach_up.note(self.received_in_full, all_taken);
    }

    /// Moves at most `max` bytes into the flow, by its pipe or, where there is none, by a copy.
    pub fn fill(
        &mut self,
        cx: &mut Context<'_>,
        flow: &mut Flow,
        scratch: &mut Scratch,
        max: usize,
    ) -> Poll<Result<Received, Ended>> {
        const NOTHING: Poll<Result<Received, Ended>> = Poll::Ready(Ok(Received { bytes: 0, then: Then::Open }));
        let buffer = &mut scratch.received[..COPY_BYTES.min(max)];
        if !flow.has_pipe(&self.client.share) {
            let refused = self.refused.take();
            return Poll::Ready(self.copy(flow, buffer, refused));
        }
        let held = flow.in_pipe();
        let result = ready!(flow.poll_fill(cx, &self.client.sock, max.min(TURN_BYTES)));
        let refused = self.refused.take();
        match result {
            Ok(n) if n > 0 => {
                self.took_data(n);
                self.client.watch.touch();
                // Less than a full record, most likely the last one for now; a poll tells if it was not.
                self.client.sock.readable &= n >= PLAIN_BYTES.min(max);
                let room = (held + n) / PLAIN_BYTES + 2;
                let gather = self.client.worker.kernel.short_splice_safe
                    && self.client.sock.readable
                    && n < max
                    && held + n < GATHER_BYTES
                    && room * RECORD_PIPE_PAGES <= flow.pipe_pages();
                if !gather {
                    flow.turn_to_drain();
                }
                Poll::Ready(Ok(Received { bytes: n, then: Then::Open }))
            }
            Err(e) if socket::is_again(&e) && refused.is_some() => Poll::Ready(self.copy(flow, buffer, refused)),
            Err(e) if socket::is_again(&e) => {
                self.client.sock.readable = false;
                if held > 0 {
                    flow.turn_to_drain();
                }
                NOTHING
            }
            // The error is told once; a read after it would say that the stream has ended.
            Err(e) if is_gone(&e) => Poll::Ready(Err(Ended::abort(End::ClientReset))),
            result if held > 0 => {
                // What is in the pipe came first.
                self.refused = result.err();
                flow.turn_to_drain();
                NOTHING
            }
            Ok(_) => Poll::Ready(self.copy(flow, buffer, None)),
            Err(e) => Poll::Ready(self.copy(flow, buffer, Some(e))),
        }
    }

    fn copy(&mut self, flow: &mut Flow, buffer: &mut [u8], refused: Option<io::Error>) -> Result<Received, Ended> {
        let received = self.read(buffer, refused)?;
        if received.bytes > 0 {
            self.client.watch.touch();
            self.client.worker.counters.up_copied.add(received.bytes as u64);
            flow.copy(&buffer[..received.bytes]);
        }
        Ok(received)
    }

    fn took_data(&mut self, bytes: usize) {
        self.storm.received_data();
        self.client.moved_up += bytes as u64;
    }

    /// Reads what splice would not take, or what is to be looked at. With no bytes and an open stream, `readable` tells
    /// whether anything was there.
    fn read(&mut self, buffer: &mut [u8], refused: Option<io::Error>) -> Result<Received, Ended> {
        let mut received = Received { bytes: 0, then: Then::Open };
        match record::read_head(self.client.sock.fd(), buffer, self.keys.is_tls12()) {
            // What says nothing is a storm too, so many times in a row.
            Head::Data(0) | Head::Ignored => {
                if self.storm.received_key_update() {
                    let alert = Some(alert::UNEXPECTED_MESSAGE);
                    return Err(self.refuse(Fatal { how: End::UnexpectedMessage, alert }));
                }
            }
            Head::Data(n) => {
                self.took_data(n);
                received.bytes = n;
            }
            Head::CloseNotify => received.then = Then::Closed,
            Head::Eof => received.then = Then::Truncated,
            Head::KeyUpdate { reply } => received.then = self.key_update_received(reply)?,
            Head::Renegotiation => {
                let alert = Some(alert::NO_RENEGOTIATION);
                return Err(self.refuse(Fatal { how: End::Renegotiation, alert }));
            }
            Head::Nothing => match refused {
                // Splice refused and nothing is there: a malformed header was reported once, and never again.
                Some(e) => return Err(self.refuse(record::read_error(&e))),
                None => self.client.sock.readable = false,
            },
            Head::Fatal(fatal) => return Err(self.refuse(fatal)),
        }
        Ok(received)
    }

    fn key_update_received(&mut self, reply: bool) -> Result<Then, Ended> {
        self.client.worker.counters.key_updates_received.add(1);
        if self.storm.received_key_update() {
            return Err(self.refuse(Fatal { how: End::KeyUpdateStorm, alert: Some(alert::UNEXPECTED_MESSAGE) }));
        }
        if !self.client.worker.kernel.rekey {
            return Ok(Then::NoRekey);
        }
        if let Err(e) = self.keys.renew(self.client.sock.fd(), Direction::Rx) {
            tracing::warn!(stage = "relay", reason = %e, "setting the client's new key failed");
            return Err(self.refuse(Fatal { how: End::Internal, alert: Some(alert::INTERNAL_ERROR) }));
        }
        self.key_update_due |= reply;
        Ok(Then::Open)
    }

    /// Ends the connection, with an alert where the client can be told.
    fn refuse(&mut self, fatal: Fatal) -> Ended {
        let Some(body) = fatal.alert else { return Ended::abort(fatal.how) };
        let client = self.client.sock.fd();
        // A failed read leaves its error on the socket, where it would stop the alert too.
        let _ = socket::take_error(client);
        if !self.is_sending {
            let _ = ktls::send_record(client, content_type::ALERT, &body);
            if fatal.how == End::Renegotiation {
                let _ = ktls::send_record(client, content_type::ALERT, &alert::CLOSE_NOTIFY);
            }
        }
        Ended { how: fatal.how, client: ClientEnd::Await, upstream: UpstreamEnd::Reset }
    }

    // ---- plaintext to the client

    /// Notes what was given to the kernel to seal.
    pub fn sealed(&mut self, bytes: usize) {
        self.keys.sealed(bytes);
        self.storm.sent_data(bytes);
    }

    /// Asked between two pipes, so that nothing on the way is lost: what is in reserve covers the next one.
    pub fn is_used_up(&mut self) -> bool {
        self.keys.is_used_up(self.client.sock.fd())
    }

    /// Our key has no next, and less than one part in `parts` is left of it.
    pub fn is_key_short(&mut self, parts: u64) -> bool {
        !self.keys.can_renew(&self.client.worker.kernel) && self.keys.is_short(self.client.sock.fd(), parts)
    }

    /// Has our key changed, where this kernel and the protocol can.
    pub fn renew_key(&mut self) -> bool {
        let can = self.keys.can_renew(&self.client.worker.kernel);
        self.key_update_due |= can;
        can
    }

    pub fn owes_key_update(&self) -> bool {
        self.key_update_due
    }

    /// Sends the KeyUpdate that is due, and seals under the new key from there on. False: the socket is full.
    pub fn send_key_update(&mut self) -> Result<bool, Ended> {
        if !self.client.sock.writable {
            return Ok(false);
        }
        match ktls::send_record(self.client.sock.fd(), content_type::HANDSHAKE, &record::KEY_UPDATE) {
            Ok(()) => {}
            Err(e) if socket::is_again(&e) => {
                // Nothing went out. The key must not change before the message that says so.
                self.client.sock.writable = false;
                return Ok(false);
            }
            Err(_) => return Err(Ended::abort(End::ClientReset)),
        }
        if let Err(e) = self.keys.renew(self.client.sock.fd(), Direction::Tx) {
            tracing::warn!(stage = "relay", reason = %e, "setting our new key failed");
            return Err(Ended::abort(End::Internal));
        }
        self.key_update_due = false;
        self.client.worker.counters.key_updates_sent.add(1);
        Ok(true)
    }

    /// Sends close_notify once the socket is writable: before that it could cut a record that the kernel still holds.
    /// False: it is not yet.
    pub fn send_close_notify(&mut self) -> io::Result<bool> {
        let writable = socket::poll_now(self.client.sock.fd(), libc::POLLOUT)?;
        if writable & libc::POLLOUT == 0 {
            self.client.sock.writable = false;
            return Ok(false);
        }
        match ktls::send_record(self.client.sock.fd(), content_type::ALERT, &alert::CLOSE_NOTIFY) {
            Ok(()) => Ok(true),
            Err(e) if socket::is_again(&e) => {
                self.client.sock.writable = false;
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// Sends the FIN. Behind it every kernel calls a partial record readable: tls_sk_poll (net/tls/tls_main.c) looks into
    /// the records of established connections alone. Where we wait for edges that wakes nobody.
    pub fn finish(&mut self) {
        self.client.sock.finish();
        self.partial_record_wakes |= !self.copies_up();
    }
}
