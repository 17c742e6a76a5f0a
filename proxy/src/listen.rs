//! Binds the listeners: one SO_REUSEPORT socket for each worker, so that the kernel spreads connections and no
//! worker waits for another.

use crate::config::Listener;
use crate::keepalive;
use crate::observe::maps::Maps;
use crate::observe::sockets::begin_listener;
use crate::sys::socket::set_nodelay;
use crate::worker::Bound;
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Connections that wait for an accept, on each socket. The kernel cuts it to net.core.somaxconn, whose default is
/// the same.
pub const BACKLOG: i32 = 4096;

/// An address that could not be had. What it displays names the call and what mends it.
#[derive(Debug, thiserror::Error)]
#[error("listen on {address}: {call}: {source}{mend}")]
pub struct BindError {
    pub address: SocketAddr,
    call: &'static str,
    source: io::Error,
    mend: String,
}

/// Sockets for the listeners of `wanted`, one list for each of `workers`.
///
/// `all` are the listeners of the whole configuration, of which `wanted` may be the new ones of a reload.
/// Each socket is labelled in `maps` before it listens.
///
/// # Errors
/// The first address that could not be had; nothing stays bound then.
pub fn bind(
    wanted: &[Arc<Listener>],
    all: &[Arc<Listener>],
    workers: usize,
    maps: Option<&Maps>,
) -> Result<Vec<Vec<Bound>>, BindError> {
    let mut bound: Vec<Vec<Bound>> = (0..workers).map(|_| Vec::with_capacity(wanted.len())).collect();
    for listener in wanted {
        let address = listener.address;
        let v6only = is_v6only(address, all);
        refuse_if_served(address, v6only)?;
        for sockets in &mut bound {
            let socket =
                reuseport(listener, v6only, maps).map_err(|(call, source)| BindError::new(address, call, source))?;
            sockets.push(Bound { listener: Arc::clone(listener), socket });
        }
    }
    Ok(bound)
}

/// The admin endpoint's socket, non-blocking.
///
/// # Errors
/// As `bind`.
pub fn bind_admin(address: SocketAddr) -> Result<TcpListener, BindError> {
    let open = || -> Result<TcpListener, (&'static str, io::Error)> {
        let socket = socket(address, true)?;
        socket.bind(&address.into()).map_err(|e| ("bind", e))?;
        socket.listen(BACKLOG).map_err(|e| ("listen", e))?;
        Ok(socket.into())
    };
    open().map_err(|(call, source)| BindError::new(address, call, source))
}

/// `[::]:443` takes IPv4 too, unless another listener has that port on IPv4.
pub fn is_v6only(address: SocketAddr, all: &[Arc<Listener>]) -> bool {
    !is_any_v6(address) || v4_of_port(address, all).next().is_some()
}

/// The listeners of `wanted` that take no IPv4 although no other takes all of it, each with one that has the port.
pub fn short_of_v4(wanted: &[Arc<Listener>], all: &[Arc<Listener>]) -> Vec<(SocketAddr, SocketAddr)> {
    let short = |listener: &Arc<Listener>| {
        let address = listener.address;
        let takes_all = v4_of_port(address, all).any(|other| other.ip().is_unspecified());
        let other = v4_of_port(address, all).next().filter(|_| is_any_v6(address) && !takes_all)?;
        Some((address, other))
    };
    wanted.iter().filter_map(short).collect()
}

fn is_any_v6(address: SocketAddr) -> bool {
    address.ip() == IpAddr::from([0u16; 8])
}

fn v4_of_port(address: SocketAddr, all: &[Arc<Listener>]) -> impl Iterator<Item = SocketAddr> {
    let has = move |other: &SocketAddr| other.is_ipv4() && other.port() == address.port();
    all.iter().map(|other| other.address).filter(has)
}

/// SO_REUSEPORT shares a port with any process of the same user, so a second tlsplice by mistake would take half of
/// the connections in silence. A socket without it finds out: bind refuses where somebody listens.
fn refuse_if_served(address: SocketAddr, v6only: bool) -> Result<(), BindError> {
    let probe = || {
        let socket = socket(address, v6only)?;
        socket.bind(&address.into()).map_err(|e| ("bind", e))
    };
    probe().map_err(|(call, source)| BindError::new(address, call, source))
}

fn reuseport(listener: &Listener, v6only: bool, maps: Option<&Maps>) -> Result<OwnedFd, (&'static str, io::Error)> {
    let address = listener.address;
    let socket = socket(address, v6only)?;
    // Its children inherit it.
    set_nodelay(socket.as_fd()).map_err(|e| ("setsockopt(TCP_NODELAY)", e))?;
    keepalive::switch_on(&socket).map_err(|e| ("setsockopt(SO_KEEPALIVE)", e))?;
    socket.set_reuse_port(true).map_err(|e| ("setsockopt(SO_REUSEPORT)", e))?;
    socket.bind(&address.into()).map_err(|e| ("bind", e))?;
    if let Some(maps) = maps {
        begin_listener(maps, socket.as_fd(), listener).map_err(|e| ("have it counted by the kernel", e))?;
    }
    socket.listen(BACKLOG).map_err(|e| ("listen", e))?;
    Ok(socket.into())
}

/// Non-blocking and close-on-exec, with SO_REUSEADDR: connections of an earlier process in TIME_WAIT are no obstacle.
fn socket(address: SocketAddr, v6only: bool) -> Result<Socket, (&'static str, io::Error)> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP)).map_err(|e| ("socket", e))?;
    socket.set_reuse_address(true).map_err(|e| ("setsockopt(SO_REUSEADDR)", e))?;
    if address.is_ipv6() {
        socket.set_only_v6(v6only).map_err(|e| ("setsockopt(IPV6_V6ONLY)", e))?;
    }
    Ok(socket)
}

impl BindError {
    /// Somebody has the address.
    pub fn is_in_use(&self) -> bool {
        self.source.kind() == io::ErrorKind::AddrInUse
    }

    fn new(address: SocketAddr, call: &'static str, source: io::Error) -> Self {
        let port = address.port();
        let mend = match source.raw_os_error() {
            Some(libc::EADDRINUSE) => format!(
                ": another process serves this port, and sharing it would split the connections: \
                 ss -ltnp 'sport = :{port}' shows which"
            ),
            Some(libc::EACCES) => format!(
                ": port {port} takes root at the start, or CAP_NET_BIND_SERVICE \
                 (systemd: AmbientCapabilities=CAP_NET_BIND_SERVICE)"
            ),
            Some(libc::EADDRNOTAVAIL) => ": no interface of this host has the address: ip address show".to_owned(),
            Some(libc::EAFNOSUPPORT) => ": this host has IPv6 switched off: use 0.0.0.0 for [::]".to_owned(),
            Some(_) | None => String::new(),
        };
        Self { address, call, source, mend }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Mode, Offload, OffloadAfter, Upstream};

    fn listener(address: &str) -> Arc<Listener> {
        Arc::new(Listener {
            address: address.parse().expect("an address"),
            offload: Offload::Auto,
            offload_after: OffloadAfter::Auto,
            mode: Mode::Tcp(Arc::new(Upstream { name: "app".to_owned(), servers: Vec::new() })),
        })
    }

    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("loopback").port()
    }

    #[test]
    fn every_worker_gets_a_socket_of_each_listener() {
        let wanted = [listener(&format!("127.0.0.1:{}", free_port()))];
        let bound = bind(&wanted, &wanted, 3, None).expect("free");
        assert_eq!(bound.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1, 1]);
    }

    #[test]
    fn a_port_that_is_served_is_refused_although_it_could_be_shared() {
        let wanted = [listener(&format!("127.0.0.1:{}", free_port()))];
        let first = bind(&wanted, &wanted, 1, None).expect("free");
        let Err(refused) = bind(&wanted, &wanted, 1, None) else { panic!("shared with itself") };
        assert!(refused.to_string().contains("ss -ltnp"), "{refused}");
        drop(first);
        bind(&wanted, &wanted, 1, None).expect("free again");
    }

    #[test]
    fn any_v6_takes_v4_unless_a_listener_has_it() {
        let any = listener("[::]:443");
        assert!(!is_v6only(any.address, &[Arc::clone(&any), listener("0.0.0.0:80")]));
        assert!(is_v6only(any.address, &[Arc::clone(&any), listener("0.0.0.0:443")]));
        assert!(is_v6only("[::1]:443".parse().expect("an address"), &[]));
    }

    #[test]
    fn any_v6_beside_a_part_of_v4_is_told() {
        let (any, loopback, all_v4) = (listener("[::]:443"), listener("127.0.0.1:443"), listener("0.0.0.0:443"));
        let short = |all: &[Arc<Listener>]| short_of_v4(all, all);
        assert_eq!(short(&[Arc::clone(&any), Arc::clone(&loopback)]), [(any.address, loopback.address)]);
        assert_eq!(short(&[Arc::clone(&any), loopback, all_v4]), []);
        assert_eq!(short(&[any, listener("127.0.0.1:80"), listener("[::1]:443")]), []);
    }
}
