//! Types that the eBPF program and the proxy share: the layout of the pinned maps.
//!
//!   map            key              value        written by            pinned
//!   SOCKETS        a socket         Socket       the program           yes    (begun by user space, inherited from listeners)
//!   HANDSHAKES     a socket         Handshake    user space            yes    (clients, once they have one)
//!   ENDPOINTS      row, each CPU    Sums         the program           yes
//!   CLASSES        row, each CPU    ClassSums    the program           yes
//!   ENDPOINT_NAMES row              EndpointName user space            yes
//!   CLASS_NAMES    row              ClassName    user space            yes
//!   USER_WORDS     word             u64          user space            yes
//!   USER_NAMES     word             WordName     user space            yes
//!
//! Once released, any change of a size or a meaning here is a new `LAYOUT`: maps of another one are left alone where they are. The
//! memory is bounded by the rows: 256 endpoints and 1024 classes are 262 KiB for each CPU, all names and words 528 KiB,
//! and each socket has 104 bytes of values.

#![no_std]

/// The folder under the pins' root. From the first release on it changes with every change of this file that changes a map.
pub const LAYOUT: &str = "v1";

/// A listener, or a server of an upstream, each. Row 0 takes what found none.
pub const ENDPOINTS: usize = 256;
/// Combinations of what a handshake gave, each. Row 0 is for connections that ended before it was complete.
pub const CLASSES: usize = 1024;
/// The class of a socket that has none: an upstream's.
pub const NO_CLASS: u32 = u32::MAX;
/// The class that takes what found no row.
pub const OTHER_CLASS: u32 = 1;
/// Buckets of a histogram. The last takes all that is larger.
pub const BUCKETS: usize = 32;
/// Samples that user space counts and wants to find again.
pub const WORDS: usize = 1024;

/// What a client's handshake gave.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handshake {
    /// A row of CLASSES.
    pub class: u32,
    pub padding: u32,
}

/// Who a socket belongs to, which is the reason why it is counted at all, and what has been accounted for it. User space
/// gives it to listeners before they listen and to upstreams before they connect; from then on it is the program's.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Socket {
    /// When it was established, 0 until then, and when it was last accounted, in nanoseconds of the monotonic clock.
    pub since_ns: u64,
    pub flushed_ns: u64,
    /// tcp_info's counts at that moment: an active socket's SYN is one byte of them.
    pub base_received: u64,
    pub base_acked: u64,
    /// Payload in the sums of its endpoint.
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Payload in the sums of its class.
    pub class_in: u64,
    pub class_out: u64,
    /// tcp_info's received bytes when our FIN was acknowledged.
    pub half_received: u64,
    pub retransmits: u32,
    pub class_retransmits: u32,
    /// A row of ENDPOINTS.
    pub endpoint: u32,
    /// The class that counts it as live; 0: none yet; `NO_CLASS`: it never has one.
    pub class: u32,
    pub flags: u32,
    pub padding: u32,
}

/// log2 buckets: bucket `n` takes values up to 2^n units.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Histogram {
    pub sum: u64,
    pub buckets: [u64; BUCKETS],
}

/// The sums of one listener or server.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sums {
    pub opened: u64,
    pub closed: u64,
    /// Connects that came to nothing.
    pub refused: u64,
    /// Closed otherwise than by both sides' FIN.
    pub reset: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub retransmits: u64,
    /// In milliseconds.
    pub duration: Histogram,
    /// Smoothed round trip at each account, in microseconds.
    pub rtt: Histogram,
    /// From the opening to the first acknowledged byte, in microseconds.
    pub first_ack: Histogram,
}

/// The sums of one combination of what handshakes gave.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassSums {
    pub opened: u64,
    pub closed: u64,
    /// Wrapping, as a connection may end on another CPU than it began.
    pub live: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub retransmits: u64,
}

/// Zero-padded text.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Text<const N: usize>(pub [u8; N]);

/// What a row of ENDPOINTS stands for. All zero: nothing yet.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EndpointName {
    pub side: Text<16>,
    pub listener: Text<64>,
    pub upstream: Text<64>,
    pub server: Text<128>,
}

/// What a row of CLASSES stands for.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClassName {
    pub used: Text<8>,
    pub server_name: Text<128>,
    pub version: Text<16>,
    pub suite: Text<48>,
    pub group: Text<32>,
    pub resumed: Text<8>,
    pub offload: Text<16>,
}

/// The sample that a word is, with its labels. Empty: none.
pub type WordName = Text<192>;

impl Socket {
    /// One that is not established yet. Only clients of a TLS listener have a handshake to be told apart by.
    #[must_use]
    pub const fn new(endpoint: u32, has_handshake: bool) -> Self {
        Self {
            since_ns: 0,
            flushed_ns: 0,
            base_received: 0,
            base_acked: 0,
            bytes_in: 0,
            bytes_out: 0,
            class_in: 0,
            class_out: 0,
            half_received: 0,
            retransmits: 0,
            class_retransmits: 0,
            endpoint,
            class: if has_handshake { 0 } else { NO_CLASS },
            flags: 0,
            padding: 0,
        }
    }
}

impl<const N: usize> Text<N> {
    pub const EMPTY: Self = Self([0; N]);

    /// The text, cut to what fits at a character's boundary.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut end = text.len().min(N);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let mut bytes = [0; N];
        bytes[..end].copy_from_slice(&text.as_bytes()[..end]);
        Self(bytes)
    }

    /// What was put in; nothing if it is no UTF-8.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|b| *b == 0).unwrap_or(N);
        core::str::from_utf8(&self.0[..end]).unwrap_or_default()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0[0] == 0
    }
}
