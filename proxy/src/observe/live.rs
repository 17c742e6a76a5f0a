//! The connections of a worker that are established, for people who look on: `tlsplice top` asks the admin endpoint.
//!
//! What a connection tells of itself is kept once, for its log lines, its labels and this list. Figures come from the
//! sockets in the moment of the question, and nothing is done for them in between.

use super::access::Peer;
use super::sockets::{Facts, Place, group_name, suite_name, version_name};
use crate::config::Listener;
use crate::ring::Sock;
use crate::sys::socket;
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::sync::Arc;
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

/// What is known of a client's connection.
pub struct Identity {
    pub peer: Peer,
    pub listener: Arc<Listener>,
    pub since: Instant,
    /// What the handshake gave, and where the records are protected now.
    known: Cell<Option<(Facts, Place)>>,
    client: Weak<OwnedFd>,
    upstream: RefCell<Weak<OwnedFd>>,
    /// Its place in the list.
    at: Cell<usize>,
}

/// One worker's.
#[derive(Default)]
pub struct Live(RefCell<Vec<Rc<Identity>>>);

impl Live {
    /// Lists a connection, until `leave`.
    pub fn enter(&self, peer: Peer, listener: Arc<Listener>, client: &Sock) -> Rc<Identity> {
        let mut list = self.0.borrow_mut();
        let identity = Rc::new(Identity {
            peer,
            listener,
            since: Instant::now(),
            known: Cell::new(None),
            client: client.watched(),
            upstream: RefCell::default(),
            at: Cell::new(list.len()),
        });
        list.push(identity.clone());
        identity
    }

    pub fn leave(&self, identity: &Identity) {
        let mut list = self.0.borrow_mut();
        list.swap_remove(identity.at.get());
        if let Some(moved) = list.get(identity.at.get()) {
            moved.at.set(identity.at.get());
        }
    }

    /// The busiest first is not known without asking each, so these are just some where there are more than `limit`.
    pub fn list(&self, limit: usize) -> Vec<Connection> {
        self.0.borrow().iter().filter_map(|identity| identity.tell()).take(limit).collect()
    }
}

impl Identity {
    /// What the handshake gave, once there was one.
    pub fn facts(&self) -> Option<Facts> {
        self.known.get().map(|(facts, _)| facts)
    }

    pub fn is(&self, facts: Facts, place: Place) {
        self.known.set(Some((facts, place)));
    }

    /// Where its bytes go now.
    pub fn goes_to(&self, upstream: &Sock) {
        *self.upstream.borrow_mut() = upstream.watched();
    }

    fn tell(&self) -> Option<Connection> {
        let (facts, place) = self.known.get()?;
        let info = |socket: Option<Rc<OwnedFd>>| {
            // A unix socket has none.
            socket.and_then(|fd| socket::tcp_info(fd.as_fd()).ok()).unwrap_or_default()
        };
        let (client, upstream) = (info(self.client.upgrade()), info(self.upstream.borrow().upgrade()));
        Some(Connection {
            peer: self.peer.to_string(),
            listener: self.listener.address.to_string(),
            server_name: facts.name.text(),
            version: version_name(facts.version).to_owned(),
            suite: suite_name(facts.suite),
            group: group_name(facts.group).to_owned(),
            resumed: facts.resumed,
            offload: place.name().to_owned(),
            age_seconds: self.since.elapsed().as_secs_f64(),
            bytes_in: client.bytes_received,
            bytes_out: client.bytes_acked,
            rtt_us: client.rtt_us,
            upstream_rtt_us: upstream.rtt_us,
            retransmits: client.retransmits,
        })
    }
}
