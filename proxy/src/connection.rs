//! One connection, every stage in order. Each stage consumes what the one before made, and none calls another.
//!
//!   mode tcp       Accepted ─▶ handshake ─▶ connect ─▶ userspace relay ─▶ the door ─▶ kernel relay ─▶ close
//!                                                           └──────── declined ────────────▲
//!   mode http      Accepted ─▶ handshake ─▶ requests, each with its upstream, the door among them ─▶ [relay] ─▶ close
//!   mode redirect  Accepted ─▶ requests ─▶ close

use crate::close;
use crate::config::{Listener, Mode, Upstream};
use crate::handshake::{Handshaken, handshake};
use crate::http::downstream::Downstream;
use crate::http::near::Near;
use crate::http::serve::{Closed, Over, Service};
use crate::http::{redirect, serve as http};
use crate::observe::access::Peer;
use crate::observe::counters::End;
use crate::offload::{self, Offloaded, through_the_door};
use crate::pipes::Share;
use crate::relay::kernel::Kernel;
use crate::relay::user_tls::{UserKeys, UserTls};
use crate::relay::userspace::{Door, Stop, Userspace};
use crate::relay::{Client, Ended, Spare, Worker};
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

/// What the stages of one connection tell of it.
#[derive(Clone)]
struct About {
    peer: Peer,
    listener: Arc<Listener>,
    turn: Rc<Cell<usize>>,
    snapshot: Rc<Snapshot>,
    worker: Rc<Worker>,
    began: Instant,
}

/// The spine. Each stage is boxed, so that what waits holds only the stage it is in.
pub async fn serve(accepted: Accepted, worker: Rc<Worker>) {
    let Accepted { client, peer, listener, share, turn, snapshot, watch } = accepted;
    let peer = Peer::new(peer, snapshot.config.log.client_address);
    let about = About { peer, listener, turn, snapshot, worker: worker.clone(), began: Instant::now() };
    let sock = Sock::new(client);
    let _ = socket::set_nodelay(sock.fd());
    let _ = socket::set_unsent_limit(sock.fd(), UNSENT_BYTES);
    let client = Client { sock, watch, worker, share, next_turn: None, moved_up: 0, moved_down: 0 };

    let over = match about.listener.mode.clone() {
        Mode::Tcp(upstream) => {
            let Some(shaken) = Box::pin(shake_hands(client, &about)).await else { return };
            let Some(relay) = Box::pin(connect_upstream(shaken, &upstream, &about)).await else { return };
            relay_to_end(relay).await
        }
        Mode::Http(upstream) => {
            let Some((tls, door)) = Box::pin(shake_hands(client, &about)).await else { return };
            let near = Near::new(Downstream::user(tls), door);
            match Box::pin(http::serve(near, &service(upstream, &about))).await {
                Over::Closed(closed) => rest(*closed),
                Over::User(relay) => relay_to_end(relay).await,
                Over::Kernel(relay) => relay_behind(relay).await,
            }
        }
        Mode::Redirect => {
            let near = Near::new(Downstream::plain(client), Door::Shut);
            match Box::pin(redirect::serve(near, peer, &about.snapshot.config.http)).await {
                Over::Closed(closed) => rest(*closed),
                // Without an upstream nothing is relayed.
                Over::User(_) | Over::Kernel(_) => return,
            }
        }
    };
    let (client, upstream, ended, pending) = over;
    about.log(&client, ended.how);
    Box::pin(close::close(client, upstream, ended, pending)).await;
}

fn service(upstream: Arc<Upstream>, about: &About) -> Service {
    let config = &about.snapshot.config;
    Service {
        peer: about.peer,
        upstream,
        turn: about.turn.clone(),
        http: config.http.clone(),
        limits: config.limits.clone(),
        unsent_bytes: UNSENT_BYTES,
    }
}

/// What is left to close.
type Rest = (Client, Option<Sock>, Ended, Spare);

fn rest(closed: Closed) -> Rest {
    let Closed { client, upstream, ended, pending } = closed;
    (client, upstream, ended, pending)
}

/// Relays on either side of the door; gives what is left to close.
async fn relay_to_end(mut relay: Box<Userspace>) -> Rest {
    let ended = match relay.run().await {
        Stop::Over(ended) => ended,
        Stop::AtDoor => {
            let Userspace { tls, upstream, to_upstream, up, down, .. } = *relay;
            match through_the_door(tls) {
                Offloaded::Kernel(tls) => {
                    return relay_behind(Box::new(Kernel::new(tls, upstream, to_upstream, up, down))).await;
                }
                Offloaded::Declined(tls, why) => {
                    tls.client.worker.counters.declined(why);
                    *relay = Userspace { tls: *tls, upstream, to_upstream, up, down, door: Door::Shut };
                    match relay.run().await {
                        Stop::Over(ended) => ended,
                        Stop::AtDoor => Ended::abort(End::Internal),
                    }
                }
                Offloaded::Failed(client, ended) => return (client, Some(upstream), ended, Spare::default()),
            }
        }
    };
    let Userspace { tls, upstream, .. } = *relay;
    (tls.client, Some(upstream), ended, tls.to_client)
}

async fn relay_behind(mut relay: Box<Kernel>) -> Rest {
    let ended = relay.run().await;
    (relay.tls.client, Some(relay.upstream), ended, Spare::default())
}

/// The handshake, up to the keys and the plan for the door. `None`: the connection has ended there.
async fn shake_hands(client: Client, about: &About) -> Option<(UserTls, Door)> {
    let Client { sock: mut client, watch, worker, share, .. } = client;
    let About { listener, snapshot, .. } = about;
    let limits = &snapshot.config.limits;
    let tls = match listener.mode {
        Mode::Http(_) => &snapshot.http_tls,
        Mode::Tcp(_) | Mode::Redirect => &snapshot.tls,
    };
    let session = match Session::new(tls.clone()) {
        Ok(session) => session,
        Err(e) => {
            about.report(End::Internal, "handshake", &e.to_string());
            return None;
        }
    };
    let exact = offload::is_immediate(listener, &worker.kernel);
    watch.allow(limits.handshake_timeout);
    let Handshaken { session, leftover } = match handshake(&mut client, &watch, session, exact).await {
        Ok(done) => done,
        Err(failure) => {
            about.report(failure.how, "handshake", &failure.reason);
            close::refuse(client, &watch, &worker, failure.alert).await;
            return None;
        }
    };
    worker.counters.handshakes.add(1);
    let group = session.group();
    let keys = session.into_keys().map_err(std::io::Error::other);
    let keys = match keys.and_then(|keys| UserKeys::new(keys, limits.records_per_key)) {
        Ok(keys) => keys,
        Err(e) => {
            about.report(End::Internal, "handshake", &e.to_string());
            return None;
        }
    };
    tracing::debug!(peer = %about.peer, suite = ?keys.ring.suite.suite(), ?group, "handshake complete");
    let door = offload::plan(listener, &worker.kernel, keys.ring.suite).unwrap_or_else(|why| {
        worker.counters.declined(why);
        Door::Shut
    });
    watch.forgive();
    watch.allow(limits.idle_timeout);
    let client = Client { sock: client, watch, worker, share, next_turn: None, moved_up: 0, moved_down: 0 };
    Some((UserTls::new(client, keys, leftover), door))
}

/// Mode tcp: one upstream for the whole connection. `None`: the connection has ended there.
async fn connect_upstream((tls, door): (UserTls, Door), upstream: &Upstream, about: &About) -> Option<Box<Userspace>> {
    let limits = &about.snapshot.config.limits;
    let watch = tls.client.watch.clone();
    let upstream = match connect(upstream, &about.turn, &watch, limits.connect_timeout).await {
        Ok((upstream, _)) => upstream,
        Err(failure) => {
            about.report(failure.how, "connect", &failure.reason);
            // A FIN without a close_notify: nothing has come to a clean end.
            close::refuse(tls.client.sock, &watch, &about.worker, Spare::default()).await;
            return None;
        }
    };
    let _ = socket::set_unsent_limit(upstream.fd(), UNSENT_BYTES);
    watch.forgive();
    watch.allow(limits.idle_timeout);
    Some(Box::new(Userspace::new(tls, upstream, door)))
}

impl About {
    /// Counts an end before the relay, and logs it.
    fn report(&self, how: End, stage: &str, reason: &str) {
        let peer = self.peer;
        self.worker.counters.ended(how);
        match how {
            End::Internal => tracing::error!(%peer, stage, how = how.to_string(), reason, "connection ended"),
            _ => tracing::info!(%peer, stage, how = how.to_string(), reason, "connection ended"),
        }
    }

    /// Counts the end of a connection that got past its handshake, and writes its line of the access log. In modes http
    /// and redirect each request has its own, and this one is only for an end that none of them tells of.
    fn log(&self, client: &Client, how: End) {
        let Self { peer, listener, .. } = self;
        self.worker.counters.ended(how);
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (listener, up_bytes, down_bytes) = (listener.address, client.moved_up, client.moved_down);
        let is_quiet = match self.listener.mode {
            Mode::Tcp(_) => false,
            Mode::Http(_) | Mode::Redirect => matches!(how, End::Clean | End::Idle | End::Refused),
        };
        let how_text = how.to_string();
        match how {
            End::Internal => {
                tracing::error!(%peer, %listener, stage = "relay", how = how_text, up_bytes, down_bytes, ms, "connection")
            }
            _ if is_quiet => tracing::debug!(%peer, %listener, how = how_text, up_bytes, down_bytes, ms, "connection"),
            _ => tracing::info!(%peer, %listener, how = how_text, up_bytes, down_bytes, ms, "connection"),
        }
    }
}
