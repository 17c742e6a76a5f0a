//! The connections of a worker that are established, for people who look on: `tlsplice top` asks the admin endpoint.
//!
//! Their figures come from the sockets in the moment of the question. Nothing is done for them in between.

use super::sockets::{Facts, Place, group_name, suite_name, version_name};
use crate::sys::socket;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::time::Instant;

/// The most connections that one answer tells of.
pub const LISTED: usize = 10_000;

/// One connection, as it is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    pub peer: String,
    pub listener: String,
    pub server_name: String,
    pub version: String,
    pub suite: String,
    pub group: String,
    pub resumed: bool,
    /// `kernel`, `userspace`, or why not the kernel.
    pub offload: String,
    pub age_seconds: f64,
    /// Of the client's TCP, TLS records included.
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub rtt_us: u32,
    pub upstream_rtt_us: u32,
    pub retransmits: u32,
}

struct Entry {
    peer: SocketAddr,
    listener: SocketAddr,
    facts: Facts,
    place: Place,
    since: Instant,
    client: Weak<OwnedFd>,
    upstream: Weak<OwnedFd>,
}

/// One worker's.
#[derive(Clone, Default)]
pub struct Live(Rc<RefCell<Entries>>);

#[derive(Default)]
struct Entries {
    next: u64,
    by_number: HashMap<u64, Entry>,
}

/// A connection's place in the list, until it is dropped.
pub struct Listed {
    live: Live,
    number: u64,
}

impl Live {
    pub fn enter(
        &self,
        (peer, listener): (SocketAddr, SocketAddr),
        (facts, place): (Facts, Place),
        (client, upstream): (Weak<OwnedFd>, Weak<OwnedFd>),
    ) -> Listed {
        let mut entries = self.0.borrow_mut();
        let number = entries.next;
        entries.next += 1;
        let since = Instant::now();
        entries.by_number.insert(number, Entry { peer, listener, facts, place, since, client, upstream });
        Listed { live: self.clone(), number }
    }

    /// The busiest first is not known without asking each, so these are just some where there are more than `limit`.
    pub fn list(&self, limit: usize) -> Vec<Connection> {
        self.0.borrow().by_number.values().take(limit).map(Entry::tell).collect()
    }
}

impl Listed {
    pub fn moved_to(&self, place: Place) {
        if let Some(entry) = self.live.0.borrow_mut().by_number.get_mut(&self.number) {
            entry.place = place;
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.live.0.borrow_mut().by_number.remove(&self.number);
    }
}

impl Entry {
    fn tell(&self) -> Connection {
        let info = |socket: &Weak<OwnedFd>| {
            // A unix socket has none.
            socket.upgrade().and_then(|fd| socket::tcp_info(fd.as_fd()).ok()).unwrap_or_default()
        };
        let (client, upstream) = (info(&self.client), info(&self.upstream));
        Connection {
            peer: self.peer.to_string(),
            listener: self.listener.to_string(),
            server_name: self.facts.name.text(),
            version: version_name(self.facts.version).to_owned(),
            suite: suite_name(self.facts.suite),
            group: group_name(self.facts.group).to_owned(),
            resumed: self.facts.resumed,
            offload: self.place.name().to_owned(),
            age_seconds: self.since.elapsed().as_secs_f64(),
            bytes_in: client.bytes_received,
            bytes_out: client.bytes_acked,
            rtt_us: client.rtt_us,
            upstream_rtt_us: upstream.rtt_us,
            retransmits: client.retransmits,
        }
    }
}
