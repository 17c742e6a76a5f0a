//! One connection of mode "http": request after request, each with an upstream of its own for as long as it takes.
//!
//!   read_head ─▶ Request ─▶ upstream from the pool ─▶ exchange ─▶ … ─▶ read_head       refused: a page of ours, close
//!                                                        └─ 101 ─▶ the relays of mode "tcp"
//!
//! Requests that were pipelined are answered one after the other. An upgraded connection is an ordinary relay, which
//! knows the door, half-closes and truncation already.

use super::downstream::{Downstream, KEPT_PARTS};
use super::exchange::{Exchange, Outcome};
use super::near::{Gone, Near, NoRequest, Patience};
use super::refusal::{Refusal, Status, page};
use super::request::Request;
use crate::close::Closed;
use crate::config::{Config, Upstream};
use crate::observe::access::{Entry, Peer};
use crate::observe::counters::End;
use crate::relay::kernel::Kernel;
use crate::relay::userspace::Userspace;
use crate::relay::{Down, Ended, Spare, Up, Want};
use crate::ring::{Look, Sock};
use crate::sys::socket;
use crate::upstream::connect::Failure;
use crate::upstream::pool::Connected;
use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

/// How long a client may take nothing of the last that we have for it.
const STALLED_TIMEOUT: Duration = Duration::from_secs(60);

/// What the requests of a connection have in common.
pub struct Service {
    pub peer: Peer,
    pub upstream: Arc<Upstream>,
    pub turn: Rc<Cell<usize>>,
    pub config: Arc<Config>,
}

/// What is left of a connection.
pub enum Over {
    Closed(Box<Closed>),
    /// It has become one of mode "tcp".
    User(Box<Userspace>),
    Kernel(Box<Kernel>),
}

impl From<Closed> for Over {
    fn from(closed: Closed) -> Self {
        Self::Closed(Box::new(closed))
    }
}

enum Next {
    Request(Box<Near>),
    Over(Over),
}

/// Serves requests until the connection is over.
pub async fn serve(near: Near, service: &Service) -> Over {
    let mut near = Box::new(near);
    let http = &service.config.http;
    let (head, limit) = (http.head_timeout, http.head_bytes);
    let mut patience = Patience { idle: head, head, limit, ends_in_drain: false };
    loop {
        let extent = match Box::pin(near.read_head(patience)).await {
            Ok(extent) => extent,
            Err(NoRequest::Over(how)) => return finish(near, how).await.into(),
            Err(NoRequest::Ended(ended)) => return closed(*near, None, ended).into(),
            Err(NoRequest::Refused(refusal)) => {
                return refuse(near, Entry::new(None), refusal, false, service).await.into();
            }
        };
        let request = Request::parse(&near.inbox[extent.start..extent.end], service.peer.ip());
        near.take(extent.end);
        let request = match request {
            Ok(request) => request,
            Err(refusal) => return refuse(near, Entry::new(None), refusal, false, service).await.into(),
        };
        near = match Box::pin(answer(near, request, service)).await {
            Next::Request(near) => near,
            Next::Over(over) => return over,
        };
        (patience.idle, patience.ends_in_drain) = (http.keep_alive, true);
    }
}

/// One request, from its head to the end of its response.
async fn answer(mut near: Box<Near>, mut request: Request, service: &Service) -> Next {
    let mut entry = Entry::new(Some(&request));
    let mut pooled = true;
    loop {
        let to_head = request.is_head();
        let connected = match connect(&near, &request, pooled, service).await {
            Ok(connected) => connected,
            Err(failure) => {
                if failure.how == End::Drained {
                    return Next::Over(closed(*near, None, Ended::abort(End::Drained)).into());
                }
                entry.reason = failure.reason;
                return Next::Over(refuse(near, entry, refusal_of(failure.how), to_head, service).await.into());
            }
        };
        let server = connected.server;
        entry.reused = connected.reused;
        let (done, outcome) = match relay(*near, connected, request, service).await {
            Ok(relayed) => relayed,
            Err(over) => return Next::Over(over),
        };
        if outcome == Outcome::Stale && pooled && done.request.is_replayable() {
            let Exchange { near: back, upstream: mut gone, request: again, .. } = *done;
            gone.cancel().await;
            (near, request, pooled) = (Box::new(back), again, false);
            continue;
        }
        return conclude(done, outcome, entry, server, service).await;
    }
}

/// What an exchange's outcome means for both connections.
async fn conclude(
    mut done: Box<Exchange>,
    outcome: Outcome,
    mut entry: Entry,
    server: usize,
    service: &Service,
) -> Next {
    const STALE: Refusal = Refusal::bad_gateway("the upstream closed an old connection as it was used");
    (entry.status, entry.up_bytes, entry.down_bytes) = (done.status, done.up_bytes, done.down_bytes);
    let to_head = done.request.is_head();
    let worker = done.near.downstream.client().worker.clone();
    let how = match outcome {
        Outcome::Complete { .. } | Outcome::Switched => End::Clean,
        Outcome::Stale => return Next::Over(refuse_after(done, entry, STALE, to_head, service).await.into()),
        Outcome::Refused(refusal) => {
            return Next::Over(refuse_after(done, entry, refusal, to_head, service).await.into());
        }
        Outcome::AtDoor => End::Internal,
        Outcome::Ended(ended) => ended.how,
    };
    entry.log(service.peer, &worker.counters, how);
    match outcome {
        Outcome::Complete { keep_client, keep_upstream } => {
            if !keep_upstream {
                end_upstream(&mut done).await;
            }
            // A long response may have taken what was left: better no answer to the next request than half of one.
            let keep_client = keep_client && !done.near.downstream.is_key_short(KEPT_PARTS);
            let Exchange { near, upstream, .. } = *done;
            if keep_upstream {
                worker.pool.put(&service.upstream.servers[server], upstream, service.config.http.upstream_idle);
            }
            let near = Box::new(near);
            if keep_client { Next::Request(near) } else { Next::Over(finish(near, End::Clean).await.into()) }
        }
        Outcome::Switched => Next::Over(tunnel(done.near, done.upstream)),
        Outcome::Ended(ended) => Next::Over(closed(done.near, Some(done.upstream), ended).into()),
        Outcome::Stale | Outcome::Refused(_) | Outcome::AtDoor => {
            Next::Over(closed(done.near, Some(done.upstream), Ended::abort(how)).into())
        }
    }
}

async fn refuse_after(
    mut done: Box<Exchange>,
    entry: Entry,
    refusal: Refusal,
    to_head: bool,
    service: &Service,
) -> Closed {
    end_upstream(&mut done).await;
    refuse(Box::new(done.near), entry, refusal, to_head, service).await
}

/// Runs the exchange, through the door where it comes to that.
async fn relay(
    mut near: Near,
    connected: Connected,
    request: Request,
    service: &Service,
) -> Result<(Box<Exchange>, Outcome), Over> {
    let client = near.downstream.client_mut();
    client.sock.draw_on(client.worker.send_memory.clone(), &connected.sock);
    client.identity.goes_to(&connected.sock);
    let mut exchange = Box::new(Exchange::new(near, connected.sock, connected.reused, request, service.config.clone()));
    loop {
        match exchange.run().await {
            Outcome::AtDoor => {
                *exchange = (*exchange).through_the_door().map_err(|failed| {
                    let (client, upstream, ended) = *failed;
                    Over::Closed(Box::new(Closed {
                        client,
                        upstream: Some(upstream),
                        ended,
                        pending: Spare::default(),
                    }))
                })?
            }
            outcome => return Ok((exchange, outcome)),
        }
    }
}

async fn connect(near: &Near, request: &Request, pooled: bool, service: &Service) -> Result<Connected, Failure> {
    let client = near.downstream.client();
    let (pool, sockets, watch) = (&client.worker.pool, &client.worker.sockets, client.watch.clone());
    let each = service.config.limits.connect_timeout;
    let connected = if pooled {
        pool.connect(&service.upstream, &service.turn, &watch, each, !request.is_replayable(), sockets).await
    } else {
        let new = crate::upstream::connect::connect(&service.upstream, &service.turn, &watch, each, sockets).await;
        new.map(|(sock, server)| Connected { sock, server, reused: false })
    };
    if let Ok(connected) = &connected {
        let counters = &client.worker.counters;
        let count = if connected.reused { &counters.upstream_reused } else { &counters.upstream_new };
        count.add(1);
    }
    connected
}

fn refusal_of(how: End) -> Refusal {
    if how == End::ConnectTimeout {
        Refusal::new(Status::GatewayTimeout, "no server of the upstream was reached in time")
    } else {
        Refusal::bad_gateway("no server of the upstream could be reached")
    }
}

/// Closes the upstream's connection; with a reset, if the request is not complete.
async fn end_upstream(exchange: &mut Exchange) {
    if !exchange.is_sent() {
        let _ = socket::reset_on_close(exchange.upstream.fd());
    }
    exchange.upstream.cancel().await;
}

/// Answers with a page of ours and closes.
async fn refuse(mut near: Box<Near>, mut entry: Entry, refusal: Refusal, to_head: bool, service: &Service) -> Closed {
    let text = page(refusal.status, entry.id, Some(&service.config.http.hsts), to_head);
    entry.status = Some(refusal.status.code());
    entry.refused = Some(refusal);
    let worker = near.downstream.client().worker.clone();
    entry.log(service.peer, &worker.counters, End::Refused);
    let sent = near.downstream.send(&mut worker.scratch.borrow_mut(), &text);
    match sent {
        Ok(()) => finish(near, End::Refused).await,
        Err(ended) => closed(*near, None, ended),
    }
}

/// Sends what is left, then the close_notify.
pub async fn finish(mut near: Box<Near>, how: End) -> Closed {
    let watch = near.downstream.client().watch.clone();
    watch.forgive();
    watch.allow(STALLED_TIMEOUT);
    let ended = poll_fn(|cx| {
        loop {
            let end = near.downstream.flush(cx).and_then(|sent| Ok(sent && near.downstream.close_notify()?));
            match end {
                Ok(true) => return Poll::Ready(near.downstream.clean_end(how)),
                Ok(false) => {}
                Err(ended) => return Poll::Ready(ended),
            }
            let sock = &near.downstream.client().sock;
            let want = Want { client_write: !sock.writable && !near.downstream.is_in_flight(), ..Want::default() };
            if ready!(near.downstream.poll_ready(cx, None, want, Look::All)).is_err() {
                return Poll::Ready(Ended::abort(how));
            }
        }
    })
    .await;
    closed(*near, None, ended)
}

pub fn closed(near: Near, upstream: Option<Sock>, ended: Ended) -> Closed {
    let (client, pending) = near.downstream.into_parts();
    Closed { client, upstream, ended, pending }
}

/// Hands the connection to the relays of mode "tcp", with what was read ahead.
fn tunnel(near: Near, upstream: Sock) -> Over {
    let mut to_upstream = Spare::default();
    to_upstream.push(&near.inbox);
    let up = match near.gone {
        None => Up::Open,
        Some(Gone::Clean) => Up::Closing,
        Some(Gone::Truncated) => Up::Broken(End::ClientTruncated),
        Some(Gone::NoRekey) => Up::Broken(End::NoRekey),
    };
    match near.downstream {
        Downstream::User(tls) => {
            let mut relay = Userspace::new(*tls, upstream, near.door);
            (relay.to_upstream, relay.up) = (to_upstream, up);
            Over::User(Box::new(relay))
        }
        Downstream::Kernel(behind) => {
            Over::Kernel(Box::new(Kernel::new(behind.tls, upstream, to_upstream, up, Down::Open)))
        }
        // Mode "redirect" has no upstream.
        Downstream::Plain(plain) => {
            let ended = Ended::abort(End::Internal);
            let pending = Spare::default();
            Over::Closed(Box::new(Closed { client: plain.client, upstream: Some(upstream), ended, pending }))
        }
    }
}
