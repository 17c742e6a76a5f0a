//! An exchange's way up: what is left of the request's body, from the client to the upstream.
//!
//!   inbox, then the client ─▶ counted: handed on from where it lies, or spliced │ chunks: taken apart, written anew ─▶ upstream
//!
//! When the body is over, the next requests are read ahead a little, which is how a client that is gone is noticed.

use super::chunk;
use super::downstream::Downstream;
use super::exchange::{Download, Exchange, Left, Outcome};
use super::near::HEAD_READ_BYTES;
use super::refusal::Refusal;
use crate::observe::counters::End;
use crate::protect::PLAIN_BYTES;
use crate::relay::flow::Drained;
use crate::relay::{Ended, RECEIVE_BYTES, Scratch, TURN_BYTES, Turn, cuts_short};
use std::io;
use std::task::{Context, Poll};

impl Exchange {
    pub(super) fn turn_up(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<Turn, Outcome> {
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
        let client = self.near.downstream.client();
        let count = |n| client.worker.counters.up_spliced.add(n as u64);
        match self.up.drain(cx, &mut self.upstream, &client.watch, count) {
            Ok(drained) => drained == Drained::Empty,
            Err(e) => {
                self.abandon(&e);
                false
            }
        }
    }

    /// The upstream takes no more: it may still have an answer.
    fn abandon(&mut self, error: &io::Error) {
        self.cut_short = cuts_short(error);
        self.upload = Left::Abandoned;
        self.up.rest();
    }

    fn fill_up(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<Poll<usize>, Outcome> {
        if let (Downstream::Kernel(behind), Left::Length(left)) = (&mut self.near.downstream, &mut self.upload)
            && !behind.tls.copies_up()
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
        let max = most_bytes(&self.upload);
        let Some(received) = self.near.receive(scratch, max).map_err(Outcome::Ended)? else {
            return Ok(Poll::Ready(0));
        };
        self.near.downstream.client().watch.touch();
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
        if let Err(e) = self.up.hand_on(&self.upstream, &scratch.received, &scratch.pieces[..ours]) {
            self.abandon(&e);
            return Ok(());
        }
        self.near.downstream.handed_on(self.up.is_empty());
        if is_over {
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
}

/// Received at once: not much more than the body, as what is beyond it is kept. Where chunks end is only known when they
/// are there, so behind the last one it may be all that a read gives.
fn most_bytes(upload: &Left) -> usize {
    match upload {
        Left::Length(left) => usize::try_from(*left).unwrap_or(usize::MAX).saturating_add(HEAD_READ_BYTES),
        Left::Chunked(_) | Left::Nothing | Left::UntilClose | Left::Abandoned => RECEIVE_BYTES,
    }
}
