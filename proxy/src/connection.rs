//! One connection, every stage in order. Each stage consumes what the one before made, and none calls another.
//!
//!   mode tcp       Accepted ─▶ handshake ─▶ connect ─▶ userspace relay ─▶ the door ─▶ kernel relay ─▶ close
//!                                                           └──────── declined ────────────▲
//!   mode http      Accepted ─▶ handshake ─▶ requests, each with its upstream, the door among them ─▶ [relay] ─▶ close
//!   mode redirect  Accepted ─▶ requests ─▶ close

use crate::accept::Place;
use crate::close::{self, Closed};
use crate::config::{Listener, Mode, Upstream};
use crate::handshake::{Handshaken, handshake};
use crate::http::downstream::Downstream;
use crate::http::near::Near;
use crate::http::serve::{Over, Service};
use crate::http::{redirect, serve as http};
use crate::observe::access::Peer;
use crate::observe::counters::End;
use crate::observe::live::Identity;
use crate::observe::sockets::{self, Tally};
use crate::offload::{self, Offloaded, through_the_door};
use crate::pipes::Share;
use crate::relay::kernel::Kernel;
use crate::relay::user_tls::{UserKeys, UserTls};
use crate::relay::userspace::{Door, Stop, Userspace};
use crate::relay::{Client, Spare, Worker};
use crate::ring::Sock;
use crate::session::Session;
use crate::upstream::connect::connect;
use crate::watch::Watch;
use crate::worker::Snapshot;
use std::cell::Cell;
use std::future::Future;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

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

/// What the stages of one connection have of it. It is listed for as long as this is there.
struct About {
    identity: Rc<Identity>,
    /// Counts it where the kernel does not.
    tally: Tally,
    turn: Rc<Cell<usize>>,
    snapshot: Rc<Snapshot>,
    worker: Rc<Worker>,
}

/// The spine. What waits holds only the stage it is in: each is boxed, and moves into the next without an await.
/// `_place` counts the connection until it is closed.
pub async fn serve(accepted: Box<Accepted>, _place: Place, worker: Rc<Worker>) {
    let (client, about) = begin(*accepted, worker);
    let closing = match &about.identity.listener.mode {
        Mode::Tcp(upstream) => {
            let Some(shaken) = Box::pin(shake_hands(client, &about)).await else { return };
            let Some(relay) = Box::pin(connect_upstream(shaken, upstream, &about)).await else { return };
            about.close(*relay_to_end(relay).await)
        }
        Mode::Http(upstream) => {
            let Some(shaken) = Box::pin(shake_hands(client, &about)).await else { return };
            Box::pin(requests(shaken, upstream, &about)).await
        }
        Mode::Redirect => Box::pin(redirects(client, &about)).await,
    };
    closing.await;
}

/// Not a part of the future above, which would keep room for each of these to its end.
fn begin(accepted: Accepted, worker: Rc<Worker>) -> (Box<Client>, About) {
    let Accepted { client, peer, listener, share, turn, snapshot, watch } = accepted;
    let peer = Peer::new(peer, snapshot.config.log.client_address);
    let sock = Sock::new(client, Tally::default());
    let tally = worker.sockets.accepted(listener.address);
    let identity = worker.sockets.live.enter(peer, listener, &sock);
    let about = About { identity: identity.clone(), tally, turn, snapshot, worker: worker.clone() };
    (Box::new(Client::new(sock, watch, worker, share, identity)), about)
}

/// Mode http.
async fn requests((tls, door): (UserTls, Door), upstream: &Arc<Upstream>, about: &About) -> Closing {
    let near = Near::new(Downstream::user(tls), door);
    match http::serve(near, &service(upstream.clone(), about)).await {
        Over::Closed(closed) => about.close(*closed),
        Over::User(relay) => about.close(*relay_to_end(relay).await),
        Over::Kernel(relay) => about.close(*relay_behind(relay).await),
    }
}

/// Mode redirect.
async fn redirects(client: Box<Client>, about: &About) -> Closing {
    let near = Near::new(Downstream::plain(*client), Door::Shut);
    let closed = redirect::serve(near, about.identity.peer, &about.snapshot.config.http).await;
    about.close(closed)
}

/// The last stage, ready to go.
type Closing = Pin<Box<dyn Future<Output = ()>>>;

fn service(upstream: Arc<Upstream>, about: &About) -> Service {
    Service { peer: about.identity.peer, upstream, turn: about.turn.clone(), config: about.snapshot.config.clone() }
}

/// Relays on either side of the door.
async fn relay_to_end(mut relay: Box<Userspace>) -> Box<Closed> {
    loop {
        match relay.run().await {
            Stop::Over(ended) => return Box::new(Closed::of(*relay, ended)),
            Stop::AtDoor => match pass(relay) {
                Passed::Kernel(kernel) => return relay_behind(kernel).await,
                // Its door is shut now, so it does not come here again.
                Passed::Declined(declined) => relay = declined,
                Passed::Failed(closed) => return closed,
            },
        }
    }
}

async fn relay_behind(mut relay: Box<Kernel>) -> Box<Closed> {
    let ended = relay.run().await;
    let Kernel { tls, upstream, .. } = *relay;
    Box::new(Closed { client: tls.client, upstream: Some(upstream), ended, pending: Spare::default() })
}

/// What became of a relay at the door. Not a part of the futures above: there, what is taken out of a box would keep its
/// memory until they end.
enum Passed {
    Kernel(Box<Kernel>),
    Declined(Box<Userspace>),
    Failed(Box<Closed>),
}

fn pass(relay: Box<Userspace>) -> Passed {
    let Userspace { tls, upstream, to_upstream, up, down, .. } = *relay;
    match through_the_door(tls) {
        Offloaded::Kernel(tls) => Passed::Kernel(Box::new(Kernel::new(*tls, upstream, to_upstream, up, down))),
        Offloaded::Declined(tls) => {
            Passed::Declined(Box::new(Userspace { tls: *tls, upstream, to_upstream, up, down, door: Door::Shut }))
        }
        Offloaded::Failed(client, ended) => {
            let (upstream, pending) = (Some(upstream), Spare::default());
            Passed::Failed(Box::new(Closed { client: *client, upstream, ended, pending }))
        }
    }
}

/// The handshake, up to the keys and the plan for the door. `None`: the connection has ended there.
async fn shake_hands(client: Box<Client>, about: &About) -> Option<(UserTls, Door)> {
    let Client { sock: mut client, watch, worker, share, identity, .. } = *client;
    let (listener, snapshot) = (&about.identity.listener, &about.snapshot);
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
    let exact = offload::is_immediate(listener, tls, &worker.kernel);
    watch.allow(limits.handshake_timeout);
    let Handshaken { session, leftover, tickets } = match handshake(&mut client, &watch, session, exact).await {
        Ok(done) => done,
        Err(failure) => {
            about.report(failure.how, "handshake", &failure.reason);
            if let Some(alert) = failure.told {
                worker.counters.handshake_alerts.add(alert);
            }
            close::refuse(client, &watch, &worker, failure.alert).await;
            return None;
        }
    };
    let Some(facts) = session.facts() else {
        about.report(End::Internal, "handshake", "it has no result");
        return None;
    };
    worker.counters.handshakes_by.add(&facts, identity.since.elapsed());
    let keys = session.into_keys().map_err(std::io::Error::other);
    let keys = match keys.and_then(|keys| UserKeys::new(keys, limits.records_per_key)) {
        Ok(keys) => keys,
        Err(e) => {
            about.report(End::Internal, "handshake", &e.to_string());
            return None;
        }
    };
    tracing::debug!(peer = %identity.peer, suite = ?facts.suite, group = ?facts.group, "handshake complete");
    let (door, place) = match offload::plan(listener, tls, &worker.kernel, keys.ring.suite()) {
        Ok(door) => (door, sockets::Place::Userspace),
        Err(why) => {
            worker.counters.declined(why);
            (Door::Shut, sockets::Place::Declined(why))
        }
    };
    watch.forgive();
    watch.allow(limits.idle_timeout);
    let client = Client::new(client, watch, worker, share, identity);
    client.is(facts, place);
    Some((UserTls::new(client, keys, leftover, tickets), door))
}

/// Mode tcp: one upstream for the whole connection. `None`: the connection has ended there.
async fn connect_upstream(
    (mut tls, door): (UserTls, Door),
    upstream: &Upstream,
    about: &About,
) -> Option<Box<Userspace>> {
    let limits = &about.snapshot.config.limits;
    let watch = tls.client.watch.clone();
    let upstream = match connect(upstream, &about.turn, &watch, limits.connect_timeout, &about.worker.sockets).await {
        Ok((upstream, _)) => upstream,
        Err(failure) => {
            about.report(failure.how, "connect", &failure.reason);
            // A FIN without a close_notify: nothing has come to a clean end.
            close::refuse(tls.client.sock, &watch, &about.worker, Spare::default()).await;
            return None;
        }
    };
    let send_memory = tls.client.worker.send_memory.clone();
    tls.client.sock.draw_on(send_memory, &upstream);
    tls.client.identity.goes_to(&upstream);
    watch.forgive();
    watch.allow(limits.idle_timeout);
    Some(Box::new(Userspace::new(tls, upstream, door)))
}

impl About {
    /// Counts and logs the end, and makes the last stage ready.
    fn close(&self, closed: Closed) -> Closing {
        self.log(&closed.client, closed.ended.how);
        self.tally.moved(closed.client.moved_up, closed.client.moved_down);
        Box::pin(close::close(closed))
    }

    /// Counts an end before the relay, and logs it.
    fn report(&self, how: End, stage: &str, reason: &str) {
        let peer = self.identity.peer;
        self.worker.counters.ended(how);
        match how {
            End::Internal => tracing::error!(%peer, stage, %how, reason, "connection ended"),
            // A balancer's health checks: a line for each would bury the others.
            End::NoHello => tracing::debug!(%peer, stage, %how, reason, "connection ended"),
            _ => tracing::info!(%peer, stage, %how, reason, "connection ended"),
        }
    }

    /// Counts the end of a connection that got past its handshake, and writes its line of the access log. In modes http
    /// and redirect each request has its own, and this one is only for an end that none of them tells of.
    fn log(&self, client: &Client, how: End) {
        let Identity { peer, listener, since, .. } = &*self.identity;
        self.worker.counters.ended(how);
        let ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (listener, up_bytes, down_bytes) = (listener.address, client.moved_up, client.moved_down);
        let is_quiet = match self.identity.listener.mode {
            Mode::Tcp(_) => false,
            Mode::Http(_) | Mode::Redirect => matches!(how, End::Clean | End::Idle | End::Refused),
        };
        match how {
            End::Internal => {
                tracing::error!(%peer, %listener, stage = "relay", %how, up_bytes, down_bytes, ms, "connection")
            }
            _ if is_quiet => tracing::debug!(%peer, %listener, %how, up_bytes, down_bytes, ms, "connection"),
            _ => tracing::info!(%peer, %listener, %how, up_bytes, down_bytes, ms, "connection"),
        }
    }
}

impl Drop for About {
    fn drop(&mut self) {
        self.worker.sockets.live.leave(&self.identity);
    }
}
