//! The last stage: both sockets are closed so that what was sent arrives, and what is to be a reset is one.
//!
//!   client:   flush ─▶ FIN ─▶ discard until the client's FIN ─▶ close        (or: wait for its ACKs and FIN; or: reset)
//!   upstream: close, or reset
//!
//! A close with unread input, or right behind the last record, is a reset that takes the end of the stream with it.

use crate::relay::userspace::Userspace;
use crate::relay::{Client, ClientEnd, Ended, Spare, UpstreamEnd, Worker};
use crate::ring::Sock;
use crate::sys::ktls::{self, Received};
use crate::sys::socket::{self, Follow};
use crate::watch::{Verdict, Watch};
use std::future::poll_fn;
use std::os::fd::BorrowedFd;
use std::task::Poll;
use std::time::Duration;

/// How long a client may take no byte of what is still in the send queue.
const STALLED_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a client that has acknowledged everything may take to close its side.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the send queue is looked at while it is drained: nothing announces an ACK.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Bytes discarded of a client that goes on sending, before it is cut.
const DISCARD_BYTES: u64 = 64 << 20;

/// Two sockets to be closed, and how.
pub struct Closed {
    pub client: Client,
    pub upstream: Option<Sock>,
    pub ended: Ended,
    /// Ciphertext that the client has not taken yet; an alert may be at its end.
    pub pending: Spare,
}

impl Closed {
    /// Of a relay that came to this end before the door.
    pub fn of(relay: Userspace, ended: Ended) -> Self {
        let Userspace { tls, upstream, .. } = relay;
        Self { client: tls.client, upstream: Some(upstream), ended, pending: tls.to_client }
    }
}

/// Ends both sockets.
pub async fn close(closed: Closed) {
    let Closed { client, upstream, ended, pending } = closed;
    let Client { sock: mut client, watch, worker, .. } = client;
    if let Some(upstream) = upstream {
        end_upstream(upstream, ended.upstream).await;
    }
    match ended.client {
        ClientEnd::Reset => reset(&mut client).await,
        ClientEnd::Discard => finish(&mut client, &watch, &worker, pending).await,
        ClientEnd::Await => {
            client.finish();
            acknowledged(&client, STALLED_TIMEOUT).await;
            fin(&client).await;
        }
    }
    client.cancel().await;
}

/// Ends a client that got no further than the handshake: `pending` is the alert, if there is one.
pub async fn refuse(mut client: Sock, watch: &Watch, worker: &Worker, pending: Spare) {
    finish(&mut client, watch, worker, pending).await;
    client.cancel().await;
}

async fn end_upstream(mut upstream: Sock, end: UpstreamEnd) {
    if end == UpstreamEnd::Reset {
        // A unix socket has no reset: closing it with bytes unread is the most that can be done.
        let _ = socket::reset_on_close(upstream.fd());
    }
    upstream.cancel().await;
}

/// What was sent before the reset shall arrive, so it waits for the ACKs.
async fn reset(client: &mut Sock) {
    acknowledged(client, LINGER_TIMEOUT).await;
    let _ = socket::reset_on_close(client.fd());
}

async fn finish(client: &mut Sock, watch: &Watch, worker: &Worker, mut pending: Spare) {
    watch.forgive();
    watch.allow(STALLED_TIMEOUT);
    client.follow = Follow::Fin;
    while let Ok(false) = pending.flush(client) {
        if !writable(client, watch).await {
            return;
        }
        watch.touch();
    }
    client.finish();
    discard(client, watch, worker).await;
}

/// Reads and drops until the client's FIN, as long as it makes progress one way or the other.
async fn discard(client: &mut Sock, watch: &Watch, worker: &Worker) {
    let mut left = DISCARD_BYTES;
    let mut queued = usize::MAX;
    let mut quiet_since = std::time::Instant::now();
    // Behind our FIN a TLS socket counts as readable while the front of a record is there, and no more.
    let mut woken_in_vain = false;
    loop {
        match drop_some(client.fd(), worker) {
            Discarded::Bytes(n) => {
                left = left.saturating_sub(n);
                woken_in_vain = false;
            }
            Discarded::Nothing => {
                let now = socket::unacknowledged(client.fd()).unwrap_or(0);
                if now != queued {
                    queued = now;
                    quiet_since = std::time::Instant::now();
                }
                let allowed = if queued > 0 { STALLED_TIMEOUT } else { LINGER_TIMEOUT };
                if quiet_since.elapsed() >= allowed || watch.verdict() == Some(Verdict::Cut) {
                    return;
                }
                let wait = if queued > 0 { POLL_INTERVAL } else { allowed };
                if woken_in_vain {
                    tokio::time::sleep(POLL_INTERVAL).await;
                } else {
                    woken_in_vain = tokio::time::timeout(wait, readable(client)).await.is_ok();
                }
            }
            // A record cut off by the FIN cannot be read, and makes the close a reset: all must have arrived before.
            Discarded::Eof => return acknowledged(client, STALLED_TIMEOUT).await,
            // Unreadable, and perhaps not yet acknowledged: then only waiting is left.
            Discarded::Unreadable => {
                acknowledged(client, STALLED_TIMEOUT).await;
                return fin(client).await;
            }
        }
        if left == 0 {
            return;
        }
    }
}

enum Discarded {
    Bytes(u64),
    Nothing,
    Eof,
    Unreadable,
}

fn drop_some(client: BorrowedFd<'_>, worker: &Worker) -> Discarded {
    let mut scratch = worker.scratch.borrow_mut();
    // recvmsg, because on a TLS socket control records come too.
    match ktls::receive(client, &mut scratch.received) {
        Ok(Received::Eof) => Discarded::Eof,
        Ok(Received::Record { len, .. }) => Discarded::Bytes(len as u64 + 1),
        Err(e) if socket::is_again(&e) => Discarded::Nothing,
        Err(e) if crate::relay::is_gone(&e) => Discarded::Eof,
        Err(_) => Discarded::Unreadable,
    }
}

/// Waits until the peer has acknowledged everything, as long as it acknowledges something.
async fn acknowledged(client: &Sock, stalled: Duration) {
    let mut queued = usize::MAX;
    let mut since = std::time::Instant::now();
    loop {
        let now = match socket::unacknowledged(client.fd()) {
            Ok(now) if now > 0 => now,
            Ok(_) | Err(_) => return,
        };
        if now != queued {
            queued = now;
            since = std::time::Instant::now();
        }
        if since.elapsed() >= stalled {
            return;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Waits for the client's FIN without reading.
async fn fin(client: &Sock) {
    let started = std::time::Instant::now();
    while started.elapsed() < LINGER_TIMEOUT {
        match socket::poll_now(client.fd(), libc::POLLRDHUP) {
            Ok(events) if events & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) == 0 => {}
            Ok(_) | Err(_) => return,
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// True when the socket can be written; false when time is up.
pub async fn writable(sock: &mut Sock, watch: &Watch) -> bool {
    poll_fn(|cx| {
        sock.arm_write();
        if sock.take_up(cx) && sock.writable {
            return Poll::Ready(true);
        }
        if watch.verdict().is_some() {
            return Poll::Ready(false);
        }
        watch.register(cx.waker());
        Poll::Pending
    })
    .await
}

async fn readable(sock: &mut Sock) {
    sock.read_by_level();
    sock.readable = false;
    poll_fn(|cx| {
        sock.arm_read();
        if sock.take_up(cx) && sock.readable { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}
