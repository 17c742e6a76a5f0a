//! Both directions of one established connection, until both have ended.
//!
//!              ┌────────────── up ──────────────▶
//!   client ────┤                                 upstream
//!              ◀───────────── down ──────────────┘
//!
//! `userspace` opens and seals records itself, by `user_tls`; `kernel` splices over a TLS socket, by `kernel_tls`. Both are
//! one hand-written future that holds no buffer and no pipe while nothing moves, and both keep the same rules of ending,
//! which are here. The two `_tls` are a client's plaintext, whoever protects it, and know nothing of a relay: mode "http"
//! stands on them too.

pub mod flow;
pub mod kernel;
pub mod kernel_tls;
mod keys;
mod reach;
pub mod record;
mod spare;
pub mod turns;
pub mod user_tls;
pub mod userspace;

use crate::observe::counters::{Counters, End};
use crate::observe::live::Identity;
use crate::observe::sockets::{Facts, Place};
use crate::pipes::Share;
use crate::protect::{OVERHEAD_BYTES, PLAIN_BYTES, WIRE_BYTES};
use crate::ring::{Look, NextTurn, Sock};
use crate::send_room::WIDE_AFTER_BYTES;
use crate::sys::socket::{self, VECTORS};
use crate::watch::{Verdict, Watch};
pub use spare::{Spare, hand_on};
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// Bytes that one direction moves before the other connections of the worker have their turn.
pub const TURN_BYTES: usize = 1 << 20;
/// Bytes read at once when copying behind the door, and of an upstream before it. What a stalled reader does not take is kept.
pub const COPY_BYTES: usize = COPY_RECORDS * PLAIN_BYTES;
/// `COPY_BYTES` in full records.
pub const COPY_RECORDS: usize = 8;
/// The most that is read of an upstream at once, to be sealed, once all of smaller reads was taken (`reach`).
const SEAL_RECORDS: usize = 4 * COPY_RECORDS;
/// Bytes read of a client at once where userspace opens its records or its requests, and the most once all was taken.
pub const RECEIVE_BYTES: usize = 2 * COPY_BYTES;
const RECEIVE_MOST_BYTES: usize = 4 * RECEIVE_BYTES;
/// How long the other direction may be silent once one has ended without hope of more: a client that is gone without
/// a close_notify, an upstream that has said all. A clean half-close of the client has `idle_timeout`, as it waits
/// for an answer.
pub const HALF_OPEN_TIMEOUT: Duration = Duration::from_secs(60);
/// After a KeyUpdate that the kernel cannot follow, the download has ended when it was silent for this long.
pub const NO_REKEY_QUIET: Duration = Duration::from_secs(5);

/// The client's socket, and what every stage after the handshake needs.
pub struct Client {
    pub sock: Sock,
    pub watch: Rc<Watch>,
    pub worker: Rc<Worker>,
    pub share: Rc<Share>,
    pub identity: Rc<Identity>,
    /// A direction has more to do when the others have had their turn.
    pub next_turn: Option<NextTurn>,
    /// Plaintext bytes handed on, up and down.
    pub moved_up: u64,
    pub moved_down: u64,
    /// How much had moved down when the client last got room for more.
    widened_at: u64,
    /// Bytes on the wire that it had acknowledged when its time was last up.
    acked_bytes: u64,
}

/// What a worker lends to its connections.
pub struct Worker {
    pub counters: std::sync::Arc<Counters>,
    pub kernel: std::sync::Arc<crate::probe::Kernel>,
    pub ways: Ways,
    pub sockets: crate::observe::sockets::Sockets,
    pub scratch: std::cell::RefCell<Scratch>,
    pub send_memory: Rc<crate::send_room::SendMemory>,
    pub pool: crate::upstream::pool::Pool,
}

/// How plaintext goes behind the door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ways {
    pub splicer: flow::Splicer,
    /// Uploads are received and sent on: on this kernel that costs less than splicing them.
    pub copies_up: bool,
    /// So are short answers: a splice takes two calls and a pipe for what a plain recv and send do.
    pub copies_short: bool,
}

/// Buffers of the worker, borrowed within one turn and never across one.
pub struct Scratch {
    /// What a socket gave.
    pub received: Box<[u8]>,
    /// Records sealed, in slots.
    pub sealed: Box<[u8]>,
    /// Where plaintext lies in `received`.
    pub pieces: Vec<Range<usize>>,
}

impl Scratch {
    pub fn new() -> Self {
        let buffer = |bytes: usize| vec![0; bytes].into_boxed_slice();
        Self {
            // A large read behind what is left of a record.
            received: buffer(RECEIVE_MOST_BYTES + WIRE_BYTES),
            sealed: buffer(SEAL_RECORDS * (PLAIN_BYTES + OVERHEAD_BYTES)),
            pieces: Vec::with_capacity(VECTORS),
        }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// The direction from the client to the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Up {
    Open,
    /// The client's close_notify is in; what came before it is still on its way.
    Closing,
    /// All was handed on, and the FIN after it.
    Finished,
    /// Nothing more is read, and the upstream will get a reset: the stream did not end cleanly.
    Broken(End),
    /// As `Broken` by the upstream's reset, which a send has been told of: what it has sent is cut short too.
    Reset,
}

/// The direction from the upstream to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Down {
    Open,
    /// The upstream's FIN is in; what came before it is still on its way, then close_notify and FIN.
    Closing,
    /// close_notify is behind it, and the FIN follows when both are out.
    Notified,
    /// close_notify and FIN are out.
    Finished,
    /// The upstream's reset is in; what came before it is still on its way, then a reset.
    Broken,
}

impl Up {
    /// The upstream takes no more, by this error of a send. It may still have an answer.
    pub fn untaken(error: &io::Error) -> Self {
        if cuts_short(error) { Self::Reset } else { Self::Broken(End::UpstreamReset) }
    }
}

/// How a relay came to its end, for `close`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    pub how: End,
    pub client: ClientEnd,
    pub upstream: UpstreamEnd,
}

/// What is left to do for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientEnd {
    /// FIN is out: read and discard until the client's own, so that nothing unread turns the close into a reset.
    Discard,
    /// FIN is out and reading is impossible: wait until all is acknowledged, then for the client's FIN.
    Await,
    /// Reset.
    Reset,
}

/// What is left to do for the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpstreamEnd {
    Close,
    Reset,
}

impl Ended {
    /// Neither side gets a clean end.
    pub fn abort(how: End) -> Self {
        Self { how, client: ClientEnd::Reset, upstream: UpstreamEnd::Reset }
    }

    /// The client took no more, whatever the error.
    pub fn client_gone(_: io::Error) -> Self {
        Self::abort(End::ClientReset)
    }
}

/// What a direction did in its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Nothing more to do until a socket is ready.
    Wait,
    /// There is more, and the others come first.
    Again,
}

impl Turn {
    /// What both directions did, taken together.
    pub fn or(self, other: Self) -> Self {
        if self == Self::Again { self } else { other }
    }
}

/// The ends of both directions taken together: `Some` when the relay is over.
pub fn over(up: Up, down: Down) -> Option<Ended> {
    match (up, down) {
        (_, Down::Open | Down::Closing | Down::Notified | Down::Broken) => None,
        (Up::Open | Up::Closing, Down::Finished) => None,
        (Up::Finished, Down::Finished) => {
            Some(Ended { how: End::Clean, client: ClientEnd::Discard, upstream: UpstreamEnd::Close })
        }
        (Up::Broken(how), Down::Finished) => {
            let client = if how == End::NoRekey { ClientEnd::Await } else { ClientEnd::Discard };
            Some(Ended { how, client, upstream: UpstreamEnd::Reset })
        }
        (Up::Reset, Down::Finished) => over(Up::Broken(End::UpstreamReset), down),
    }
}

/// What a silent connection's timeout means, given how far both directions have come.
pub fn timed_out(up: Up, down: Down, verdict: Verdict) -> Ended {
    let how = match (verdict, up) {
        (Verdict::Cut, _) => End::Drained,
        (Verdict::TimedOut, Up::Broken(how)) => how,
        (Verdict::TimedOut, Up::Reset) => End::UpstreamReset,
        (Verdict::TimedOut, Up::Open | Up::Closing | Up::Finished) => End::Idle,
    };
    if verdict == Verdict::TimedOut && down == Down::Finished {
        // The client got everything, and its close_notify; it is the client that says no more.
        let upstream = if up == Up::Finished { UpstreamEnd::Close } else { UpstreamEnd::Reset };
        return Ended { how, client: ClientEnd::Discard, upstream };
    }
    Ended::abort(how)
}

impl Client {
    pub fn new(sock: Sock, watch: Rc<Watch>, worker: Rc<Worker>, share: Rc<Share>, identity: Rc<Identity>) -> Self {
        Self {
            sock,
            watch,
            worker,
            share,
            identity,
            next_turn: None,
            moved_up: 0,
            moved_down: 0,
            widened_at: 0,
            acked_bytes: 0,
        }
    }

    /// What the handshake gave, for all who count, and where the records are protected.
    pub fn is(&self, facts: Facts, place: Place) {
        self.identity.is(facts, place);
        self.worker.sockets.classify(self.sock.fd(), facts, place);
    }

    /// The records are protected elsewhere from now on.
    pub fn moved_to(&self, place: Place) {
        if let Some(facts) = self.identity.facts() {
            self.is(facts, place);
        }
    }

    /// Enough has moved for the kernel to take over.
    pub fn wants_door(&self, door: userspace::Door) -> bool {
        match door {
            userspace::Door::Shut => false,
            userspace::Door::After(bytes) => self.moved_up.max(self.moved_down) >= bytes,
        }
    }

    /// Waits for the connection's next turn, begun by the first call.
    pub fn poll_next_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let turn = self.next_turn.get_or_insert_default();
        ready!(Pin::new(turn).poll(cx));
        self.next_turn = None;
        Poll::Ready(())
    }

    /// Its time is up, but it takes what the kernel still holds for it, of which no send tells. One that has stopped is
    /// found out the next time.
    fn takes_still(&mut self) -> bool {
        let client = self.sock.fd();
        let has_some = socket::unacknowledged(client).is_ok_and(|bytes| bytes > 0);
        let acked = socket::tcp_info(client).map_or(0, |info| info.bytes_acked);
        has_some && std::mem::replace(&mut self.acked_bytes, acked) < acked
    }

    /// Arms what is wanted and takes up what has come: `Ready` when a direction may go on, or time is up.
    pub fn poll_ready(
        &mut self,
        cx: &mut Context<'_>,
        upstream: Option<&mut Sock>,
        want: Want,
        look: Look,
    ) -> Poll<Result<(), Verdict>> {
        if want.client_read {
            self.sock.arm_read();
        }
        if want.client_write {
            self.sock.arm_write();
        }
        if want.client_reset && self.watch.has_ticked() {
            self.sock.arm_reset();
        }
        let mut ready = self.sock.look_up(cx, look);
        if let Some(upstream) = upstream {
            if want.upstream_read {
                upstream.arm_read();
            }
            if want.upstream_write {
                upstream.arm_write();
            }
            ready |= upstream.look_up(cx, look);
        }
        if self.moved_down - self.widened_at >= WIDE_AFTER_BYTES {
            self.widened_at = self.moved_down;
            self.sock.widen();
        }
        match self.watch.verdict() {
            Some(Verdict::TimedOut) if want.client_takes && self.takes_still() => {
                self.watch.forgive();
                self.watch.touch();
            }
            Some(verdict) => return Poll::Ready(Err(verdict)),
            None => {}
        }
        if ready {
            return Poll::Ready(Ok(()));
        }
        self.watch.register(cx.waker());
        Poll::Pending
    }
}

/// The readiness a relay waits for.
#[derive(Debug, Default, Clone, Copy)]
pub struct Want {
    pub client_read: bool,
    pub client_write: bool,
    pub upstream_read: bool,
    pub upstream_write: bool,
    /// The client has ended its stream, and could still reset the connection.
    pub client_reset: bool,
    /// The client has been given something, and is alive as long as it takes of that.
    pub client_takes: bool,
}

/// Whether this error of a send says that what the peer has sent is cut short too. The kernel tells a reset once, so a
/// read behind it takes that for an end; only behind the peer's FIN, where the end is one, it is EPIPE (tcp_reset in
/// net/ipv4/tcp_input.c).
pub fn cuts_short(error: &io::Error) -> bool {
    error.raw_os_error() != Some(libc::EPIPE)
}

/// Whether an error of a socket means that the peer is gone, not that we did something wrong.
pub fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNRESET
                | libc::EPIPE
                | libc::ECONNABORTED
                | libc::ETIMEDOUT
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
        )
    )
}
