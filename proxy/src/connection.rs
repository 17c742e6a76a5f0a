//! One connection, every stage in order. Each stage consumes what the one before made, and none calls another.
//!
//!   Accepted ─▶ handshake ─▶ connect ─▶ userspace relay ─▶ the door ─▶ kernel relay ─▶ close
//!                                            └──────── declined ────────────▲

use crate::close;
use crate::config::Listener;
use crate::handshake::{Handshaken, handshake};
use crate::observe::counters::End;
use crate::observe::live::Listed;
use crate::observe::sockets::{Facts, Place, Tally};
use crate::offload::{self, Offloaded, through_the_door};
use crate::pipes::Share;
use crate::relay::userspace::{Door, Stop, UserKeys, Userspace};
use crate::relay::{Ended, Link, Spare, Worker};
use crate::ring::Sock;
use crate::session::Session;
use crate::sys::socket;
use crate::upstream::connect::connect;
use crate::watch::Watch;
use crate::worker::Snapshot;
use std::cell::Cell;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

/// Bytes that may lie unsent in a socket's send queue: what a stalled reader can make the kernel hold for each
/// connection beyond its own window. Four times less makes a fast reader wait for bytes that were ready (a third more CPU).
const UNSENT_BYTES: usize = 1024 << 10;

/// A client that has just been accepted.
pub struct Accepted {
    pub client: OwnedFd,
    pub peer: SocketAddr,
    pub listener: Arc<Listener>,
    pub share: Rc<Share>,
    pub turn: Rc<Cell<usize>>,
    pub snapshot: Rc<Snapshot>,
    pub watch: Rc<Watch>,
}

/// The spine. Each stage is boxed, so that what waits holds only the stage it is in.
pub async fn serve(accepted: Accepted, worker: Rc<Worker>) {
    let (peer, listener) = (accepted.peer, accepted.listener.address);
    let client = worker.sockets.accepted(listener);
    client.opened();
    let Some(Established { mut relay, facts, upstream, listed }) = Box::pin(establish(accepted, &worker)).await else {
        return client.closed(0, 0);
    };

    let (link, ended, pending) = match relay.run().await {
        Stop::Over(ended) => (relay.link, ended, relay.to_client),
        Stop::AtDoor => match through_the_door(*relay) {
            Offloaded::Kernel(kernel) => {
                worker.sockets.classify(kernel.link.client.fd(), listener, facts, Place::Kernel);
                listed.moved_to(Place::Kernel);
                let mut kernel = Box::new(kernel);
                let ended = kernel.run().await;
                (kernel.link, ended, Spare::default())
            }
            Offloaded::Declined(declined, why) => {
                worker.counters.declined(why);
                worker.sockets.classify(declined.link.client.fd(), listener, facts, Place::Declined(why));
                listed.moved_to(Place::Declined(why));
                let mut relay = Box::new(declined);
                let ended = match relay.run().await {
                    Stop::Over(ended) => ended,
                    Stop::AtDoor => Ended::abort(End::Internal),
                };
                (relay.link, ended, relay.to_client)
            }
            Offloaded::Failed(link, ended) => (link, ended, Spare::default()),
        },
    };

    report(peer, &worker, ended.how, "relay", "");
    drop(listed);
    let (up, down) = (link.moved_up, link.moved_down);
    Box::pin(close::close(link, ended, pending)).await;
    upstream.closed(down, up);
    client.closed(up, down);
}

/// A connection that has both its ends, and what is counted and told of it.
struct Established {
    relay: Box<Userspace>,
    facts: Facts,
    upstream: Tally,
    listed: Listed,
}

/// Handshake and connect. `None`: the connection has ended there.
async fn establish(accepted: Accepted, worker: &Rc<Worker>) -> Option<Established> {
    let Accepted { client, peer, listener, share, turn, snapshot, watch } = accepted;
    let limits = &snapshot.config.limits;
    let mut client = Sock::new(client);
    let _ = socket::set_nodelay(client.fd());
    let _ = socket::set_unsent_limit(client.fd(), UNSENT_BYTES);
    let session = match Session::new(snapshot.tls.clone()) {
        Ok(session) => session,
        Err(e) => {
            report(peer, worker, End::Internal, "handshake", &e.to_string());
            return None;
        }
    };
    let exact = offload::is_immediate(&listener, &worker.kernel);
    watch.allow(limits.handshake_timeout);
    let begun = Instant::now();
    let Handshaken { session, leftover } = match handshake(&mut client, &watch, session, exact).await {
        Ok(done) => done,
        Err(failure) => {
            report(peer, worker, failure.how, "handshake", &failure.reason);
            close::refuse(client, &watch, worker, failure.alert).await;
            return None;
        }
    };
    worker.counters.handshakes.add(1);
    let facts = session.facts()?;
    worker.counters.handshakes_by.add(&facts, begun.elapsed());
    let keys = session.into_keys().map_err(std::io::Error::other);
    let keys = match keys.and_then(|keys| UserKeys::new(keys, limits.records_per_key)) {
        Ok(keys) => keys,
        Err(e) => {
            report(peer, worker, End::Internal, "handshake", &e.to_string());
            return None;
        }
    };
    tracing::debug!(%peer, suite = ?keys.ring.suite.suite(), group = ?facts.group, "handshake complete");
    let (door, place) = match offload::plan(&listener, &worker.kernel, keys.ring.suite) {
        Ok(door) => (door, Place::Userspace),
        Err(why) => {
            worker.counters.declined(why);
            (Door::Shut, Place::Declined(why))
        }
    };
    worker.sockets.classify(client.fd(), listener.address, facts, place);
    let connected = connect(&listener.upstream, &turn, &watch, limits.connect_timeout, &worker.sockets).await;
    let (upstream, tally) = match connected {
        Ok(connected) => connected,
        Err(failure) => {
            report(peer, worker, failure.how, "connect", &failure.reason);
            // A FIN without a close_notify: nothing has come to a clean end.
            close::refuse(client, &watch, worker, Spare::default()).await;
            return None;
        }
    };
    let _ = socket::set_unsent_limit(upstream.fd(), UNSENT_BYTES);
    watch.forgive();
    watch.allow(limits.idle_timeout);
    let link =
        Link { client, upstream, watch, worker: worker.clone(), share, next_turn: None, moved_up: 0, moved_down: 0 };
    let sockets = (link.client.watched(), link.upstream.watched());
    let listed = worker.sockets.live.enter((peer, listener.address), (facts, place), sockets);
    Some(Established { relay: Box::new(Userspace::new(link, keys, leftover, door)), facts, upstream: tally, listed })
}

/// Counts the end, and logs one that is not clean.
fn report(peer: SocketAddr, worker: &Worker, how: End, stage: &str, reason: &str) {
    worker.counters.ended(how);
    match how {
        End::Clean => tracing::debug!(%peer, stage, "connection closed"),
        End::Internal => tracing::error!(%peer, stage, how = how.to_string(), reason, "connection ended"),
        _ => tracing::info!(%peer, stage, how = how.to_string(), reason, "connection ended"),
    }
}
