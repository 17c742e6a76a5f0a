//! Connects to one of an upstream's servers: the next in turn, then each of the others once.

use crate::close::writable;
use crate::config::{ServerAddress, Upstream};
use crate::keepalive;
use crate::observe::counters::End;
use crate::observe::sockets::{Peer, Sockets, Tally};
use crate::ring::Sock;
use crate::sys::socket;
use crate::watch::{Verdict, Watch};
use socket2::{Domain, SockAddr, Socket, Type};
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// A unix listener whose backlog is full answers EAGAIN and wakes nobody.
const UNIX_BACKLOG_RETRY: Duration = Duration::from_millis(20);

/// Bytes that may lie unsent in an upstream's send queue. Four times less makes a fast reader wait for bytes that were
/// ready (a third more CPU).
const UNSENT_BYTES: usize = 1 << 20;

/// Why no server could be reached.
pub struct Failure {
    pub how: End,
    pub reason: String,
}

/// Connects, within what the watch allows for each server; gives the server's place too. `turn` counts the connections
/// of this worker.
///
/// Says of each socket whose it is before it connects.
pub async fn connect(
    upstream: &Upstream,
    turn: &Cell<usize>,
    watch: &Watch,
    each: Duration,
    sockets: &Sockets,
) -> Result<(Sock, usize), Failure> {
    let first = turn.replace(turn.get().wrapping_add(1));
    let mut failure = Failure { how: End::ConnectFailed, reason: String::new() };
    for n in 0..upstream.servers.len() {
        let place = first.wrapping_add(n) % upstream.servers.len();
        let server = &upstream.servers[place];
        watch.forgive();
        watch.allow(each);
        let begin = |socket: BorrowedFd<'_>| sockets.connecting(socket, &upstream.name, server);
        match one(server, watch, begin).await {
            Ok(sock) => return Ok((sock, place)),
            Err(Refused { error: e, is_local }) => {
                if is_local {
                    sockets.not_begun(&upstream.name, server);
                }
                let name = match server {
                    ServerAddress::Tcp(address) => address.to_string(),
                    ServerAddress::Unix(path) => format!("unix:{}", path.display()),
                };
                failure.how = match e.kind() {
                    io::ErrorKind::TimedOut => End::ConnectTimeout,
                    _ => End::ConnectFailed,
                };
                failure.reason = format!("connect to upstream {} at {name}: {e}{}", upstream.name, mend(&e));
            }
        }
        if watch.verdict() == Some(Verdict::Cut) {
            failure.how = End::Drained;
            break;
        }
    }
    Err(failure)
}

/// On this host, where nothing lies between that could forget a connection.
fn is_near(server: &ServerAddress) -> bool {
    match server {
        ServerAddress::Tcp(address) => address.ip().to_canonical().is_loopback(),
        ServerAddress::Unix(_) => true,
    }
}

/// What mends an error of connect(2) that is this host's own.
fn mend(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrNotAvailable => {
            ": no local port is left for it: widen net.ipv4.ip_local_port_range, name more servers, or use a unix socket"
        }
        _ => "",
    }
}

/// Why a server was not reached.
struct Refused {
    error: io::Error,
    /// By this host, before a packet was sent: nobody has counted it.
    is_local: bool,
}

/// No descriptor, no memory.
impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self { error, is_local: true }
    }
}

async fn one(server: &ServerAddress, watch: &Watch, begin: impl Fn(BorrowedFd<'_>) -> Peer) -> Result<Sock, Refused> {
    let (domain, address) = match server {
        ServerAddress::Tcp(address) => (Domain::for_address(*address), SockAddr::from(*address)),
        ServerAddress::Unix(path) => (Domain::UNIX, SockAddr::unix(path)?),
    };
    let socket = Socket::new(domain, Type::STREAM.nonblocking().cloexec(), None)?;
    if domain != Domain::UNIX {
        socket::set_nodelay(socket.as_fd())?;
        if !is_near(server) {
            keepalive::switch_on(&socket)?;
        }
        let _ = socket::set_unsent_limit(socket.as_fd(), UNSENT_BYTES);
    }
    let peer = begin(socket.as_fd());
    loop {
        match socket.connect(&address) {
            Ok(()) => return Ok(Sock::new(socket.into(), peer.opened())),
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => break,
            Err(e) if socket::is_again(&e) && watch.verdict().is_none() => tokio::time::sleep(UNIX_BACKLOG_RETRY).await,
            Err(e) => {
                // No route, no local port: the kernel's hook comes later. A refusal at once is a server's on this host.
                let is_local = domain != Domain::UNIX && e.raw_os_error() != Some(libc::ECONNREFUSED);
                if !is_local {
                    peer.refused();
                }
                let error = if socket::is_again(&e) { io::ErrorKind::TimedOut.into() } else { e };
                return Err(Refused { error, is_local });
            }
        }
    }
    let mut sock = Sock::new(socket.into(), Tally::default());
    sock.writable = false;
    // A worker with much to do hears of it late: what stands by now is used, and only the drain's end cuts it.
    let in_time = writable(&mut sock, watch).await || watch.verdict() != Some(Verdict::Cut) && is_connected(&sock);
    let error = match socket::take_error(sock.fd()) {
        Ok(None) if in_time => {
            sock.tally = peer.opened();
            // Hardly any server has spoken already.
            sock.readable = false;
            return Ok(sock);
        }
        Ok(None) => io::ErrorKind::TimedOut.into(),
        Ok(Some(e)) | Err(e) => e,
    };
    peer.refused();
    sock.cancel().await;
    Err(Refused { error, is_local: false })
}

fn is_connected(sock: &Sock) -> bool {
    socket::poll_now(sock.fd(), libc::POLLOUT).is_ok_and(|events| events & libc::POLLOUT != 0)
}
