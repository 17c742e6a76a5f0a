//! One direction's bytes between two sockets: first what was copied, then what is in the pipe.
//!
//!   source ─▶ fill ─▶ [pipe] ─▶ drain ─▶ sink          either splice runs here and now, or on the ring
//!
//! A pipe is held only while bytes are on the way. This module knows no TLS.

use super::Spare;
use crate::pipes::{Share, Taken};
use crate::ring::{RingSplice, Sock};
use crate::sys::socket;
use crate::watch::Watch;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

/// Who makes the splice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Splicer {
    /// This thread, without waiting.
    Inline,
    /// The ring's worker threads.
    Ring,
}

/// What the direction does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Fill,
    Drain,
}

/// See the module.
pub struct Flow {
    splicer: Splicer,
    phase: Phase,
    spare: Spare,
    pipe: Option<Taken>,
    /// On the ring: a fill in phase Fill, a drain in phase Drain. Boxed, as an idle connection has none.
    in_flight: Option<Box<RingSplice>>,
    /// A splice linked behind a poll found the sink full all the same: its `writable` has to come first.
    distrusts_link: bool,
}

/// What a drain came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    Empty,
    /// The sink takes no more now; its `writable` says so, or a splice in flight waits for it.
    Blocked,
}

impl Flow {
    /// A flow whose first bytes are those that the userspace relay could not hand on.
    pub fn new(splicer: Splicer, spare: Spare) -> Self {
        Self { splicer, phase: Phase::Drain, spare, pipe: None, in_flight: None, distrusts_link: false }
    }

    /// Splices are made by this one from now on; one in flight is not touched.
    pub fn splice_by(&mut self, splicer: Splicer) {
        self.splicer = splicer;
    }

    /// Bytes are wanted from the source.
    pub fn fills(&self) -> bool {
        self.phase == Phase::Fill
    }

    /// Nothing is on the way.
    pub fn is_empty(&self) -> bool {
        self.spare.is_empty() && self.in_pipe() == 0 && self.in_flight.is_none()
    }

    /// A splice runs on the ring, and wakes the connection when it ends.
    pub fn is_in_flight(&self) -> bool {
        self.in_flight.is_some()
    }

    /// That splice is one to the sink.
    pub fn is_sending(&self) -> bool {
        self.phase == Phase::Drain && self.in_flight.is_some()
    }

    pub fn in_pipe(&self) -> usize {
        self.pipe.as_ref().map_or(0, |p| p.bytes)
    }

    /// Bytes on the way.
    fn held_bytes(&self) -> usize {
        self.spare.len() + self.in_pipe()
    }

    /// Capacity of the pipe in pages: what its fragments are counted in.
    pub fn pipe_pages(&self) -> usize {
        const PAGE_BYTES: usize = 4096;
        self.pipe.as_ref().map_or(0, |p| p.pipe().capacity() / PAGE_BYTES)
    }

    /// Takes a pipe from the share unless one is held. False: there is none, and this transfer copies.
    pub fn has_pipe(&mut self, share: &Rc<Share>) -> bool {
        if self.pipe.is_none() {
            self.pipe = share.take();
        }
        self.pipe.is_some()
    }

    /// Gives the pipe back: nothing is on the way.
    pub fn rest(&mut self) {
        if self.in_flight.is_none() {
            self.pipe = None;
        }
    }

    /// Keeps bytes that were read into memory; they go before the pipe, so that must be empty.
    pub fn copy(&mut self, bytes: &[u8]) {
        debug_assert_eq!(self.in_pipe(), 0, "copied bytes would overtake those in the pipe");
        self.spare.push(bytes);
        self.phase = Phase::Drain;
    }

    /// Sends pieces of what was received at once, and keeps what the sink does not take. Nothing may be on the way.
    pub fn hand_on(&mut self, sink: &Sock, received: &[u8], pieces: &[Range<usize>]) -> io::Result<()> {
        debug_assert!(self.is_empty(), "bytes would overtake those on the way");
        super::hand_on(sink, received, pieces, &mut self.spare)?;
        if !self.spare.is_empty() {
            self.phase = Phase::Drain;
        }
        Ok(())
    }

    /// Ends filling, for what is in the pipe to go out.
    pub fn turn_to_drain(&mut self) {
        self.phase = Phase::Drain;
    }

    /// Splices up to `max` bytes from the source into the pipe, which `has_pipe` has seen to.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>, source: &Sock, max: usize) -> Poll<io::Result<usize>> {
        let pipe = self.pipe.as_mut().expect("has_pipe was asked");
        let result = match self.splicer {
            Splicer::Inline => pipe.pipe().fill_from(source.fd(), max),
            Splicer::Ring => {
                let op = self.in_flight.get_or_insert_with(|| Box::new(RingSplice::fill(source, pipe.pipe(), max)));
                let result = ready!(op.poll(cx));
                self.in_flight = None;
                result
            }
        };
        if let Ok(n) = result {
            source.received(n);
            pipe.bytes += n;
        }
        Poll::Ready(result)
    }

    /// Sends what is on the way; `note` is told of each splice's bytes, and a sink that takes some renews the time. An error
    /// is the sink's.
    pub fn drain(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut Sock,
        watch: &Watch,
        note: impl FnMut(usize),
    ) -> io::Result<Drained> {
        let held = self.held_bytes();
        let drained = self.send_on(cx, sink, note);
        if self.held_bytes() < held {
            watch.touch();
        }
        drained
    }

    fn send_on(&mut self, cx: &mut Context<'_>, sink: &mut Sock, mut note: impl FnMut(usize)) -> io::Result<Drained> {
        if !self.spare.flush(sink)? {
            return Ok(Drained::Blocked);
        }
        while self.in_pipe() > 0 {
            match self.poll_drain(cx, sink) {
                Poll::Pending => return Ok(Drained::Blocked),
                Poll::Ready(Ok(n)) => {
                    sink.writable = true;
                    note(n);
                }
                Poll::Ready(Err(e)) if socket::is_again(&e) => {
                    let was_linked = !sink.writable;
                    if !sink.is_full() {
                        continue;
                    }
                    self.distrusts_link = was_linked;
                    if was_linked || self.splicer == Splicer::Inline {
                        return Ok(Drained::Blocked);
                    }
                }
                Poll::Ready(Err(e)) => return Err(e),
            }
        }
        self.phase = Phase::Fill;
        Ok(Drained::Empty)
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>, sink: &Sock) -> Poll<io::Result<usize>> {
        let Some(pipe) = self.pipe.as_mut() else { return Poll::Ready(Ok(0)) };
        let result = match self.splicer {
            Splicer::Inline if !sink.writable => return Poll::Pending,
            Splicer::Ring if self.distrusts_link && !sink.writable && self.in_flight.is_none() => return Poll::Pending,
            Splicer::Inline => pipe.pipe().drain_into(sink.fd(), pipe.bytes),
            Splicer::Ring => {
                let op =
                    self.in_flight.get_or_insert_with(|| Box::new(RingSplice::drain(pipe.pipe(), sink, pipe.bytes)));
                let result = ready!(op.poll(cx));
                self.in_flight = None;
                result
            }
        };
        if let Ok(n) = result {
            sink.sent(n);
            pipe.bytes -= n;
        }
        Poll::Ready(result)
    }
}
