//! What an operator may say, after it was parsed: every value here is valid, and no other value can be built.
//!
//! `Config::parse` (in `config/parse.rs`) is the only way in. Names and units are those of the configuration file.

mod parse;
mod problem;
mod section;
#[cfg(test)]
mod tests;
mod value;

pub use problem::{Invalid, Problem};

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// One configuration file.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub server: Server,
    pub tls: Tls,
    pub limits: Limits,
    pub log: Log,
    pub metrics: Metrics,
    pub listeners: Vec<Arc<Listener>>,
}

/// `[server]`
#[derive(Debug, Clone, PartialEq)]
pub struct Server {
    pub workers: NonZeroUsize,
    pub admin: Option<SocketAddr>,
    pub drain_timeout: Duration,
    pub splice: SpliceMode,
    /// What root becomes after start. `None`: the user `tlsplice` if there is one, else the uid stays.
    pub user: Option<String>,
}

/// How a spliced transfer reaches the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpliceMode {
    /// What is cheaper on this kernel, by the table in `probe.rs`.
    Auto,
    /// POLL_ADD through the ring, then non-blocking `splice(2)` on the worker's thread.
    Inline,
    /// POLL_ADD linked to IORING_OP_SPLICE: the record crypto runs on the ring's own worker threads.
    Ring,
}

/// `[tls]`
#[derive(Debug, Clone, PartialEq)]
pub struct Tls {
    pub policy: Policy,
    /// Folders or files.
    pub certificates: Vec<PathBuf>,
    pub suites: Vec<Suite>,
    pub groups: Vec<Group>,
    pub alpn: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    APlus,
}

/// A cipher suite of the policy, by its IANA name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suite(pub rustls::CipherSuite);

/// A key exchange group of the policy, by its IANA name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group(pub rustls::NamedGroup);

/// `[limits]`
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    pub handshake_timeout: Duration,
    pub connect_timeout: Duration,
    pub idle_timeout: Duration,
    /// Client connections of the whole process.
    pub connections: usize,
    /// Capacity of all pipes of the process, in bytes.
    pub pipe_memory_bytes: usize,
    /// Records that one AES-GCM key may protect before it is renewed, or, where the kernel cannot, before the
    /// connection ends: at most 2^24 (RFC 8446 section 5.5), which is the default.
    pub records_per_key: u64,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq)]
pub struct Log {
    pub format: LogFormat,
    pub level: tracing::Level,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Json,
    Text,
}

/// `[metrics]`
#[derive(Debug, Clone, PartialEq)]
pub struct Metrics {
    pub kernel: KernelMetrics,
    /// The folder of a bpf file system where the kernel's counts stay.
    pub pins: PathBuf,
}

/// Whether the kernel counts connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelMetrics {
    /// Where it can; else it is said once why not.
    Auto,
    /// Refuse to start where it cannot.
    Require,
    Off,
}

/// `[[listener]]`, with its upstream resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct Listener {
    pub address: SocketAddr,
    pub offload: Offload,
    pub offload_after: OffloadAfter,
    pub upstream: Arc<Upstream>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// Offload what the kernel can, count what it cannot.
    Auto,
    /// Refuse to start without kTLS for both directions of every suite of the policy.
    Require,
    Off,
}

/// Plaintext bytes moved in one direction before the connection goes through the door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OffloadAfter {
    /// As measured for this kernel, by the table in `probe.rs`.
    Auto,
    Bytes(u64),
}

/// `[[upstream]]`
#[derive(Debug, Clone, PartialEq)]
pub struct Upstream {
    pub name: String,
    /// Never empty.
    pub servers: Vec<ServerAddress>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ServerAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}
