//! Takes connections off one listening socket, in batches, and gives each a task.
//!
//! At `limits.connections` a client is reset at once, which it can tell from a server that hangs. Without descriptors
//! or memory it stops accepting for a moment, says so once, and serves on.

use crate::config::Listener;
use crate::connection::{Accepted, serve};
use crate::observe::sockets::Tally;
use crate::pipes::Share;
use crate::ring::{NextTurn, Sock};
use crate::sys::socket;
use crate::worker::Core;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;

/// Connections taken before the others of the worker have their turn.
const BATCH: usize = 64;
/// How long accept rests when the process or the host is out of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a listener that closes still completes TCP handshakes it has answered: a slow client's round trip.
pub const SYN_GRACE: Duration = Duration::from_millis(500);

/// Client connections of the whole process, for `limits.connections`.
static LIVE: AtomicUsize = AtomicUsize::new(0);

/// A listening socket and its settings, which a reload may change.
pub struct Listening {
    listener: RefCell<Arc<Listener>>,
    /// `None` once it is closed.
    sock: RefCell<Option<Sock>>,
    share: Rc<Share>,
    /// Connections so far: whose turn it is among the upstream's servers.
    turn: Rc<Cell<usize>>,
    closing: Cell<bool>,
    closed: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Listening {
    pub fn new(listener: Arc<Listener>, socket: OwnedFd, share: Rc<Share>) -> Rc<Self> {
        Rc::new(Self {
            listener: RefCell::new(listener),
            sock: RefCell::new(Some(Sock::new(socket, Tally::default()))),
            share,
            turn: Rc::default(),
            closing: Cell::new(false),
            closed: Cell::new(false),
            waker: RefCell::default(),
        })
    }

    pub fn adjust(&self, listener: Arc<Listener>, share_cap_bytes: usize) {
        *self.listener.borrow_mut() = listener;
        self.share.set_cap(share_cap_bytes);
    }
}

/// Closes a listener so that no client that was answered is reset: new SYNs are dropped, handshakes under way may
/// complete, and everything queued is accepted.
pub async fn retire(listening: Rc<Listening>) {
    if let Some(sock) = listening.sock.borrow().as_ref()
        && let Err(e) = socket::refuse_new_connections(sock.fd())
    {
        tracing::info!(stage = "accept", reason = %e, "no filter: a SYN in the moment of closing may be reset");
    }
    tokio::time::sleep(SYN_GRACE).await;
    listening.closing.set(true);
    if let Some(waker) = listening.waker.borrow_mut().take() {
        waker.wake();
    }
    while !listening.closed.get() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Accepts until the listener is retired and its queue is empty.
pub async fn accept_loop(listening: Rc<Listening>, core: Rc<Core>) {
    let mut pausing = false;
    loop {
        match accept_batch(&listening, &core) {
            Ok(Batch::More) => {
                pausing = false;
                NextTurn::new().await;
            }
            Ok(Batch::Empty) if listening.closing.get() => {
                // Nothing between the last look at the queue and the close, or a client in between is reset.
                if close(&listening, &core).await {
                    break;
                }
            }
            Ok(Batch::Empty) => {
                pausing = false;
                acceptable(&listening).await;
            }
            Err(e) => {
                core.relay.counters.accept_pauses.add(1);
                if !std::mem::replace(&mut pausing, true) {
                    tracing::warn!(stage = "accept", reason = %e, "accept failed: resting for a moment, then serving on");
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    listening.closed.set(true);
}

/// Closes the socket if its queue is empty in the same moment. Afterwards no poll of ours holds it open.
#[expect(clippy::await_holding_refcell_ref, reason = "the accept loop is the socket's only user by then")]
async fn close(listening: &Listening, core: &Rc<Core>) -> bool {
    if let Some(sock) = listening.sock.borrow_mut().as_mut() {
        sock.cancel().await;
    }
    let empty = !matches!(accept_batch(listening, core), Ok(Batch::More));
    if empty {
        drop(listening.sock.borrow_mut().take());
    }
    empty
}

async fn acceptable(listening: &Listening) {
    poll_fn(|cx| {
        let mut sock = listening.sock.borrow_mut();
        let Some(sock) = sock.as_mut() else { return Poll::Ready(()) };
        sock.arm_read();
        if sock.take_up(cx) || listening.closing.get() {
            return Poll::Ready(());
        }
        *listening.waker.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    })
    .await;
}

enum Batch {
    More,
    Empty,
}

fn accept_batch(listening: &Listening, core: &Rc<Core>) -> io::Result<Batch> {
    for _ in 0..BATCH {
        let next = match listening.sock.borrow().as_ref() {
            Some(sock) => socket::accept(sock.fd()),
            None => return Ok(Batch::Empty),
        };
        match next {
            Ok(Some((client, peer))) => admit(client, peer, listening, core),
            Ok(None) => return Ok(Batch::Empty),
            // The client left while it was queued, or the network did: accept(2) says to try again.
            Err(e) if is_about_one_client(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Batch::More)
}

fn is_about_one_client(error: &io::Error) -> bool {
    let code = error.raw_os_error().unwrap_or(0);
    let network = [
        libc::ECONNABORTED,
        libc::EINTR,
        libc::EPERM,
        libc::EPROTO,
        libc::ENETDOWN,
        libc::ENOPROTOOPT,
        libc::EHOSTDOWN,
        libc::ENONET,
        libc::EHOSTUNREACH,
        libc::EOPNOTSUPP,
        libc::ENETUNREACH,
    ];
    network.contains(&code)
}

fn admit(client: OwnedFd, peer: SocketAddr, listening: &Listening, core: &Rc<Core>) {
    let snapshot = core.snapshot.borrow().clone();
    let counters = &core.relay.counters;
    let Some(place) = Place::take(core.clone(), snapshot.config.limits.connections) else {
        counters.refused_limit.add(1);
        let _ = socket::reset_on_close(client.as_fd());
        return;
    };
    counters.accepted.add(1);
    let accepted = Box::new(Accepted {
        client,
        peer,
        listener: listening.listener.borrow().clone(),
        share: listening.share.clone(),
        turn: listening.turn.clone(),
        watch: core.clock.watch(snapshot.config.limits.handshake_timeout),
        snapshot,
    });
    let relay = core.relay.clone();
    tokio_uring::spawn(Box::pin(serve(accepted, place, relay)));
}

/// One connection's place under `limits.connections`, given back when dropped.
pub struct Place(Rc<Core>);

impl Place {
    fn take(core: Rc<Core>, limit: usize) -> Option<Self> {
        if LIVE.fetch_add(1, Ordering::Relaxed) >= limit {
            LIVE.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        core.live.set(core.live.get() + 1);
        core.relay.counters.live.add(1);
        Some(Self(core))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        LIVE.fetch_sub(1, Ordering::Relaxed);
        self.0.live.set(self.0.live.get() - 1);
        self.0.relay.counters.live.sub(1);
    }
}
