//! One worker's idle connections to upstreams, between two requests of mode "http".
//!
//!   exchange ─▶ put ─▶ idle ─▶ take ─▶ exchange          too old, closed by its peer, or with bytes nobody asked for: ended
//!
//! A connection never changes worker. Nothing waits on an idle one: whether it is still good is asked when it is taken.

use crate::config::{ServerAddress, Upstream};
use crate::observe::sockets::Sockets;
use crate::ring::Sock;
use crate::sys::socket;
use crate::upstream::connect::{Failure, connect};
use crate::watch::Watch;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Idle connections to one server, at most: beyond it a burst has passed and what it needed is given back.
const IDLE_PER_SERVER: usize = 256;
/// How fresh a connection has to be for a request that must not be sent twice: an upstream that closes idle
/// connections does so after seconds, and would be caught in the act.
const FRESH: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Default)]
pub struct Pool(RefCell<HashMap<ServerAddress, Vec<Idle>>>);

struct Idle {
    sock: Sock,
    since: Instant,
    until: Instant,
}

/// A connection to one of an upstream's servers.
pub struct Connected {
    pub sock: Sock,
    /// Its place among the upstream's servers.
    pub server: usize,
    /// It has carried a request before.
    pub reused: bool,
}

impl Pool {
    /// Keeps a connection whose last response is complete.
    pub fn put(&self, server: &ServerAddress, sock: Sock, idle: Duration) {
        let since = Instant::now();
        let mut pool = self.0.borrow_mut();
        let list = match pool.get_mut(server) {
            Some(list) => list,
            None => pool.entry(server.clone()).or_default(),
        };
        if idle.is_zero() || list.len() >= IDLE_PER_SERVER {
            return end(sock);
        }
        list.push(Idle { sock, since, until: since + idle });
    }

    /// `once`: the request must not be sent twice, so the connection has to be fresh, and is asked again.
    fn take(&self, server: &ServerAddress, once: bool) -> Option<Sock> {
        let mut pool = self.0.borrow_mut();
        let list = pool.get_mut(server)?;
        let now = Instant::now();
        while let Some(Idle { mut sock, since, until }) = list.pop() {
            if once && now.duration_since(since) > FRESH {
                // The newest is not fresh, so none is; it will do for another request.
                list.push(Idle { sock, since, until });
                return None;
            }
            let is_silent = !once && sock.seems_silent() || has_nothing_to_read(&sock);
            if is_silent && now < until {
                sock.readable = false;
                sock.writable = true;
                sock.changes_task();
                return Some(sock);
            }
            end(sock);
        }
        None
    }

    /// Ends what has been idle for its time.
    pub fn sweep(&self) {
        let mut pool = self.0.borrow_mut();
        let now = Instant::now();
        for list in pool.values_mut() {
            // The oldest are at the front, unless a reload has changed their time.
            for idle in list.extract_if(.., |idle| idle.until <= now) {
                end(idle.sock);
            }
        }
        pool.retain(|_, list| !list.is_empty());
    }

    /// An idle connection to the server whose turn it is, or a new one. `once`: the request must not be sent twice.
    pub async fn connect(
        &self,
        upstream: &Upstream,
        turn: &Cell<usize>,
        watch: &Watch,
        each: Duration,
        once: bool,
        sockets: &Sockets,
    ) -> Result<Connected, Failure> {
        let server = turn.get() % upstream.servers.len();
        if let Some(sock) = self.take(&upstream.servers[server], once) {
            turn.set(turn.get().wrapping_add(1));
            return Ok(Connected { sock, server, reused: true });
        }
        let (sock, server) = connect(upstream, turn, watch, each, sockets).await?;
        Ok(Connected { sock, server, reused: false })
    }
}

fn has_nothing_to_read(sock: &Sock) -> bool {
    socket::recv(sock.fd(), &mut [0]).is_err_and(|e| socket::is_again(&e))
}

/// Closes it once nothing of it is in flight on the ring.
fn end(mut sock: Sock) {
    tokio_uring::spawn(async move { sock.cancel().await });
}
