//! What each worker counts: plain words that only it writes, read by whoever renders them.
//!
//! One `Counters` per worker, so that no cache line is shared on the data path; a scrape adds them up.

use super::alerts::Alerts;
use super::sockets::UserEndpoints;
use super::sums::Handshakes;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A count with one writer.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    pub fn add(&self, n: u64) {
        // A load and a store, not a fetch_add: the worker that owns it is the only writer.
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(n), Relaxed);
    }
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// An enum whose values label a counter.
pub trait Label: Copy + 'static {
    const ALL: &'static [Self];
    fn name(self) -> &'static str;
    fn index(self) -> usize;
}

macro_rules! label {
    ($(#[$m:meta])* $name:ident { $($(#[$vm:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$m])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vm])* $variant),+ }
        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant),+];
            fn name(self) -> &'static str { match self { $(Self::$variant => $text),+ } }
            fn index(self) -> usize { self as usize }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(self.name()) }
        }
    };
}

label! {
    /// Why a connection that might have gone to the kernel stays in userspace.
    Decline {
        /// `offload = "off"`.
        Off = "off",
        /// The policy wants the validated module, and the kernel is not in FIPS mode.
        Policy = "policy",
        /// The kernel has no `tls` upper-layer protocol.
        NoUlp = "no_ulp",
        /// The kernel lacks a direction of the suite.
        Cipher = "cipher",
        /// The client has rekeyed and this kernel cannot.
        Rekeyed = "rekeyed",
        /// Setting the ULP failed on this socket.
        Socket = "socket",
    }
}

label! {
    /// What was answered to a request of mode http or redirect, by us or by the upstream.
    Class {
        Switched = "1xx",
        Success = "2xx",
        Redirection = "3xx",
        ClientError = "4xx",
        ServerError = "5xx",
        /// No final response came to its head.
        Unanswered = "none",
    }
}

impl Class {
    pub fn of(status: Option<u16>) -> Self {
        match status.map(|status| status / 100) {
            Some(1) => Self::Switched,
            Some(2) => Self::Success,
            Some(3) => Self::Redirection,
            Some(4) => Self::ClientError,
            Some(_) => Self::ServerError,
            None => Self::Unanswered,
        }
    }
}

label! {
    /// How a connection ended. The first ones are clean.
    End {
        Clean = "clean",
        /// Idle for `limits.idle_timeout`.
        Idle = "idle_timeout",
        /// The client has connected and left without a byte, as a balancer's health check does.
        NoHello = "no_hello",
        HandshakeTimeout = "handshake_timeout",
        HandshakeFailed = "handshake_failed",
        ConnectFailed = "connect_failed",
        ConnectTimeout = "connect_timeout",
        /// The client's stream ended without a close_notify.
        ClientTruncated = "client_truncated",
        ClientReset = "client_reset",
        UpstreamReset = "upstream_reset",
        /// Mode http: the upstream's stream ended within a response.
        UpstreamTruncated = "upstream_truncated",
        /// Mode http: a request that is none, or whose response was ours (4xx, 5xx).
        Refused = "http_refused",
        /// Mode http: a request that turned out to be none when its response had begun.
        BadRequest = "bad_request",
        /// Mode http: a response that turned out to be none when it had begun.
        BadResponse = "bad_response",
        /// A record that does not decrypt.
        BadRecordMac = "bad_record_mac",
        /// A record that is none: too long, of an unknown type, malformed.
        BadRecord = "bad_record",
        /// A handshake message that has no place after the handshake.
        UnexpectedMessage = "unexpected_message",
        /// TLS 1.2: the client asked to renegotiate.
        Renegotiation = "renegotiation",
        /// 32 KeyUpdates in a row without application data.
        KeyUpdateStorm = "key_update_storm",
        /// The client rekeyed past the door and this kernel cannot.
        NoRekey = "no_rekey",
        /// The key has protected `limits.records_per_key` records and this kernel cannot rekey.
        KeyExhausted = "key_exhausted",
        /// The client sent an alert.
        ClientAlert = "client_alert",
        /// Cut at the end of the drain.
        Drained = "drain_timeout",
        /// A call that should not have failed.
        Internal = "internal",
    }
}

/// One worker's counts.
#[derive(Debug, Default)]
pub struct Counters {
    pub accepted: Count,
    /// Refused at `limits.connections`.
    pub refused_limit: Count,
    /// Pauses of accept at EMFILE, ENFILE, ENOBUFS or ENOMEM.
    pub accept_pauses: Count,
    pub live: Count,
    /// Complete handshakes by what they gave, and how long they took.
    pub handshakes_by: Handshakes,
    /// Alerts of those that failed.
    pub handshake_alerts: Alerts,
    /// Peers that the kernel does not count.
    pub user_endpoints: Arc<UserEndpoints>,
    /// Connections that went through the door.
    pub offloaded: Count,
    pub declined: [Count; Decline::ALL.len()],
    pub ended: [Count; End::ALL.len()],
    /// Plaintext bytes from the client to the upstream: through a pipe, and through a buffer of ours.
    pub up_spliced: Count,
    pub up_copied: Count,
    /// Plaintext bytes from the upstream to the client.
    pub down_spliced: Count,
    pub down_copied: Count,
    /// KeyUpdates received past the door, and sent.
    pub key_updates_received: Count,
    pub key_updates_sent: Count,
    /// Requests of mode http and redirect, by what was answered.
    pub requests: [Count; Class::ALL.len()],
    /// Connections to upstreams that a request of mode http made, and that it found idle.
    pub upstream_new: Count,
    pub upstream_reused: Count,
    /// Transfers that copied because no pipe was to be had.
    pub pipe_denied: Count,
    pub pipe_bytes: Count,
}

impl Counters {
    pub fn declined(&self, why: Decline) {
        self.declined[why.index()].add(1);
    }
    pub fn answered(&self, class: Class) {
        self.requests[class.index()].add(1);
    }
    pub fn ended(&self, how: End) {
        self.ended[how.index()].add(1);
    }
}
