//! The access log: one line for each connection, and in mode http and redirect one for each request.
//!
//! What goes in is what an operator needs to find a fault: no query of a path, no cookie, no field, no body. Lines leave
//! the worker through `tracing`'s queue, which drops and counts rather than waits.

use crate::config::ClientAddress;
use crate::http::refusal::{Id, Refusal};
use crate::http::request::Request;
use crate::observe::counters::{Class, Counters, End};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Bytes of a path or a host in a line: enough to know it by.
const SHOWN_BYTES: usize = 512;

/// A client's address as the log may show it.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    address: SocketAddr,
    show: ClientAddress,
}

impl Peer {
    pub fn new(address: SocketAddr, show: ClientAddress) -> Self {
        Self { address, show }
    }

    pub fn ip(self) -> IpAddr {
        self.address.ip()
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.show, self.address.ip()) {
            (ClientAddress::Full, _) => self.address.fmt(f),
            (ClientAddress::Truncated, IpAddr::V4(v4)) => {
                let [a, b, c, _] = v4.octets();
                write!(f, "{a}.{b}.{c}.0")
            }
            (ClientAddress::Truncated, IpAddr::V6(v6)) => {
                let [a, b, c, ..] = v6.segments();
                Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0).fmt(f)
            }
        }
    }
}

/// One request, from its head on.
pub struct Entry {
    pub id: Id,
    began: Instant,
    method: String,
    host: String,
    path: String,
    pub status: Option<u16>,
    pub up_bytes: u64,
    pub down_bytes: u64,
    /// A connection that had carried a request before.
    pub reused: bool,
    /// Why the answer is ours.
    pub refused: Option<Refusal>,
    /// More of why, as the operating system told it.
    pub reason: String,
}

impl Entry {
    /// `None`: what came was no request.
    pub fn new(request: Option<&Request>) -> Self {
        let shown = |text: &str| text[..text.floor_char_boundary(SHOWN_BYTES)].to_owned();
        Self {
            id: next_id(),
            began: Instant::now(),
            method: request.map_or_else(String::new, |r| shown(&r.method)),
            host: request.map_or_else(String::new, |r| shown(&r.host)),
            path: request.map_or_else(String::new, |r| shown(r.path())),
            status: None,
            up_bytes: 0,
            down_bytes: 0,
            reused: false,
            refused: None,
            reason: String::new(),
        }
    }

    /// Writes the line.
    pub fn log(self, peer: Peer, counters: &Counters, how: End) {
        counters.answered(Class::of(self.status));
        let Self { id, method, host, path, up_bytes, down_bytes, reused, reason, .. } = self;
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (status, refused) = (self.status.unwrap_or(0), self.refused.map_or("", |r| r.why));
        tracing::info!(
            %peer, %id, method, host, path, status, up_bytes, down_bytes, ms, reused, %how, refused, reason,
            "request"
        );
    }
}

/// An id of 64 bits that no other request of this host has had in a while: where the clock stood when the process
/// began, and a count.
fn next_id() -> Id {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static STARTED: std::sync::LazyLock<u64> = std::sync::LazyLock::new(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(now.as_micros()).unwrap_or(0).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    });
    Id(STARTED.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_address_names_a_network() {
        let shown = |address: &str, show| Peer::new(address.parse().expect("an address"), show).to_string();
        assert_eq!(shown("192.0.2.77:5", ClientAddress::Full), "192.0.2.77:5");
        assert_eq!(shown("192.0.2.77:5", ClientAddress::Truncated), "192.0.2.0");
        assert_eq!(shown("[2001:db8:1:2::3]:5", ClientAddress::Truncated), "2001:db8:1::");
    }

    #[test]
    fn ids_differ() {
        assert_ne!(next_id(), next_id());
    }
}
