//! One request and its response, both ways at once.
//!
//!             ┌ head ─▶ body (counted, or chunks taken apart and written anew) ─▶ upstream
//!   client ───┤
//!             └ ◀─ head ◀─ … 1xx … ◀─ body (counted, chunks, until close) ◀────── upstream
//!
//! `upload` and `download` are the two ways; here are what they share, and what comes of it. Counted bodies and those
//! until close are not looked at: userspace seals them where they were received, behind the door they are spliced.
//! Everything else goes through memory, in pieces of at most 128 KiB. A response may come before its request is
//! complete. A body that is cut short is never passed on as a whole one: its reader gets a reset.

use super::chunk::Decoder;
use super::downstream::Downstream;
use super::field::Connection;
use super::framing::Body;
use super::head::Scanner;
use super::near::{HEAD_READ_BYTES, Near};
use super::refusal::{Refusal, Status};
use super::request::Request;
use crate::config::Config;
use crate::observe::counters::End;
use crate::relay::flow::{Flow, Splicer};
use crate::relay::turns::{InTurns, Turns};
use crate::relay::userspace::Door;
use crate::relay::{Client, Ended, Spare, Turn, Want};
use crate::ring::{Look, Sock};
use crate::watch::Verdict;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

/// See the module.
pub struct Exchange {
    pub near: Near,
    pub upstream: Sock,
    pub request: Request,
    pub config: Arc<Config>,
    /// The upstream's connection has carried a request before.
    pub(super) reused: bool,
    pub(super) upload: Left,
    /// The upstream's reset is in, which a send has been told of.
    pub(super) cut_short: bool,
    pub(super) up: Flow,
    /// What the upstream has said and nobody has understood yet.
    pub(super) answer: Vec<u8>,
    pub(super) scanner: Scanner,
    pub(super) download: Download,
    pub(super) interim: u32,
    /// Of the final response, once its head is out.
    pub status: Option<u16>,
    pub(super) keep_client: bool,
    pub(super) keep_upstream: bool,
    pub up_bytes: u64,
    pub down_bytes: u64,
}

/// What is left of a body.
pub(super) enum Left {
    Nothing,
    Length(u64),
    Chunked(Box<Decoder>),
    UntilClose,
    /// The upstream takes no more, or what came was no body.
    Abandoned,
}

pub(super) enum Download {
    Head,
    Body(Left),
    /// Complete; for chunks in HTTP/1.0 or a body until close, so is the connection.
    Done,
    Switched,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The response is complete and sent.
    Complete {
        keep_client: bool,
        keep_upstream: bool,
    },
    /// The connection is another protocol's now.
    Switched,
    /// Nothing of a response was sent, and this is why.
    Refused(Refusal),
    /// An old connection was closed by the upstream before it said a word: a new one may do.
    Stale,
    /// The client stands at the door.
    AtDoor,
    Ended(Ended),
}

impl Left {
    /// `connection` is what the message's head says of its connection.
    pub(super) fn of(body: Body, head_bytes: usize, connection: &Connection) -> Self {
        match body {
            Body::None => Self::Nothing,
            Body::Length(length) => Self::Length(length),
            Body::Chunked => Self::Chunked(Box::new(Decoder::new(head_bytes).without(connection.clone()))),
            Body::UntilClose => Self::UntilClose,
        }
    }
}

impl Exchange {
    /// The request's head is sent first.
    pub fn new(near: Near, upstream: Sock, reused: bool, request: Request, config: Arc<Config>) -> Self {
        let mut head = Spare::default();
        head.push(&request.head);
        let splicer = match &near.downstream {
            Downstream::Kernel(behind) => behind.tls.splicer(),
            Downstream::User(_) | Downstream::Plain(_) => Splicer::Inline,
        };
        let watch = &near.downstream.client().watch;
        watch.forgive();
        watch.allow(config.http.response_timeout);
        Self {
            upload: Left::of(request.body, config.http.head_bytes, &request.connection),
            up: Flow::new(splicer, head),
            cut_short: false,
            near,
            upstream,
            request,
            config,
            reused,
            answer: Vec::new(),
            scanner: Scanner::response(),
            download: Download::Head,
            interim: 0,
            status: None,
            keep_client: false,
            keep_upstream: false,
            up_bytes: 0,
            down_bytes: 0,
        }
    }

    /// Goes on until there is an outcome; behind `AtDoor` it can go on again.
    pub fn run(&mut self) -> InTurns<'_, Self> {
        InTurns::new(self)
    }

    /// Takes the client through the door in the middle of a body.
    pub fn through_the_door(self) -> Result<Self, Box<(Client, Sock, Ended)>> {
        let Near { downstream, inbox, gone, .. } = self.near;
        match downstream.through_the_door() {
            Ok(downstream) => {
                let mut up = self.up;
                if let Downstream::Kernel(behind) = &downstream {
                    up.splice_by(behind.tls.splicer());
                }
                let near = Near { downstream, inbox, gone, door: Door::Shut };
                Ok(Self { near, up, ..self })
            }
            Err(failed) => {
                let (client, ended) = *failed;
                Err(Box::new((client, self.upstream, ended)))
            }
        }
    }

    pub(super) fn upload_is_over(&self) -> bool {
        matches!(self.upload, Left::Nothing | Left::Abandoned)
    }

    /// All of the request has gone to the upstream, or no more of it will.
    fn has_uploaded(&self) -> bool {
        self.upload_is_over() && (self.up.fills() || matches!(self.upload, Left::Abandoned))
    }

    /// The upstream has all of the request, or the kernel has it for it.
    pub fn is_sent(&self) -> bool {
        matches!(self.upload, Left::Nothing) && self.up.fills()
    }

    fn outcome(&self) -> Option<Outcome> {
        if self.near.downstream.client().sock.is_reset() {
            return Some(Outcome::Ended(Ended::abort(End::ClientReset)));
        }
        if self.near.downstream.is_blocked() {
            return None;
        }
        let is_whole = self.is_sent();
        match self.download {
            Download::Done if !self.keep_client || self.has_uploaded() => Some(Outcome::Complete {
                keep_client: self.keep_client && is_whole,
                // Bytes behind a response are no answer to the next request.
                keep_upstream: self.keep_upstream && is_whole && self.answer.is_empty(),
            }),
            Download::Switched if self.cut_short => Some(Outcome::Ended(Ended::abort(End::UpstreamReset))),
            Download::Switched if self.has_uploaded() => Some(Outcome::Switched),
            Download::Done | Download::Switched | Download::Head | Download::Body(_) => None,
        }
    }

    fn timed_out(&self, verdict: Verdict) -> Outcome {
        if verdict == Verdict::Cut {
            return Outcome::Ended(Ended::abort(End::Drained));
        }
        match self.download {
            Download::Head if !self.upload_is_over() && self.up.fills() => {
                Outcome::Refused(Refusal::new(Status::RequestTimeout, "the client sends no more of its body"))
            }
            Download::Head => {
                Outcome::Refused(Refusal::new(Status::GatewayTimeout, "no response within http.response_timeout"))
            }
            Download::Body(_) | Download::Done | Download::Switched => Outcome::Ended(Ended::abort(End::Idle)),
        }
    }

    fn want(&self) -> Want {
        let (near, client) = (&self.near, &self.near.downstream.client().sock);
        let takes_body = !self.upload_is_over() && self.up.fills() && !self.up.is_in_flight() && near.inbox.is_empty();
        let reads_ahead = self.upload_is_over() && near.inbox.len() < HEAD_READ_BYTES;
        let blocked = near.downstream.is_blocked();
        let down_in_flight = near.downstream.is_in_flight();
        let reads_answer = matches!(self.download, Download::Head | Download::Body(_));
        Want {
            client_read: (takes_body || reads_ahead) && near.gone.is_none() && !client.readable,
            upstream_write: !self.has_uploaded()
                && !self.up.fills()
                && !self.up.is_in_flight()
                && !self.upstream.writable,
            upstream_read: reads_answer && !blocked && !down_in_flight && !self.upstream.readable,
            client_write: blocked && !down_in_flight && !client.writable,
            client_reset: near.gone.is_some(),
            // Before the head it is the upstream that is waited for.
            client_takes: !matches!(self.download, Download::Head),
        }
    }
}

impl Turns for Exchange {
    type End = Outcome;

    fn is_in_flight(&self) -> bool {
        self.up.is_in_flight() || self.near.downstream.is_in_flight()
    }

    fn turns(&mut self, cx: &mut Context<'_>) -> Result<Turn, Outcome> {
        let worker = self.near.downstream.client().worker.clone();
        let mut scratch = worker.scratch.borrow_mut();
        let turn = self.turn_up(cx, &mut scratch)?.or(self.turn_down(cx, &mut scratch)?);
        if let Some(outcome) = self.outcome() {
            return Err(outcome);
        }
        if self.near.is_at_door() { Err(Outcome::AtDoor) } else { Ok(turn) }
    }

    fn poll_next_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.near.downstream.client_mut().poll_next_turn(cx)
    }

    fn poll_sockets(&mut self, cx: &mut Context<'_>, look: Look) -> Poll<Option<Outcome>> {
        let want = self.want();
        let ready = ready!(self.near.downstream.poll_ready(cx, Some(&mut self.upstream), want, look));
        Poll::Ready(ready.err().map(|verdict| self.timed_out(verdict)))
    }
}
