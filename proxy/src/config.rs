//! What an operator may say, after it was parsed: every value here is valid, and no other value can be built.
//!
//! `Config::parse` (in `config/parse.rs`) is the only way in. Names and units are those of the configuration file.

mod hsts;
mod parse;
mod problem;
mod section;
#[cfg(test)]
mod tests;
mod tls;
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
    pub http: Http,
    pub log: Log,
    pub metrics: Metrics,
    pub listeners: Vec<Arc<Listener>>,
}

/// `[server]`
#[derive(Debug, Clone, PartialEq)]
pub struct Server {
    pub workers: NonZeroUsize,
    pub admin: Option<SocketAddr>,
    /// How long a drain goes on accepting, while `/ready` says no: whoever balances has to find out first.
    pub drain_delay: Duration,
    pub drain_timeout: Duration,
    pub splice: SpliceMode,
    /// What root becomes after start. `None`: the user `tlsplice` if there is one, else the uid stays.
    pub user: Option<String>,
}

/// How a spliced transfer reaches the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpliceMode {
    /// What is cheaper on this kernel, by the table in `probe/cost.rs`.
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
    /// Names that no certificate has are refused, as are clients that name none.
    pub strict_sni: bool,
    /// How often files and folders are looked at; each wait differs by up to a fifth.
    pub poll: Duration,
    /// A local folder with a copy of the last good certificates.
    pub last_good: Option<PathBuf>,
    /// A folder whose ticket keys the fleet shares. `None`: keys of this process.
    pub tickets: Option<PathBuf>,
    /// How long a ticket is good for at least; after twice that its key is gone.
    pub ticket_lifetime: Duration,
    pub ocsp: Ocsp,
}

/// What may be negotiated; `tls/policy.rs` says what each has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// TLS 1.2 and 1.3, forward secrecy and AEAD.
    APlus,
    /// TLS 1.3 alone.
    Modern,
    /// 256-bit suites and P-384: four times 100 in the rating guide.
    Labs100,
    /// What the validated module of aws-lc does.
    #[cfg(feature = "fips")]
    Fips,
}

/// Where staples come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ocsp {
    /// The file beside the chain, else the certificate's responder.
    Auto,
    /// The file beside the chain.
    File,
    Off,
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
    /// Bytes that may lie unsent for all clients of the process, beyond what each has of its own.
    pub send_memory_bytes: usize,
    /// Records that one AES-GCM key may protect before it is renewed, or, where the kernel cannot, before the
    /// connection ends: at most 2^24 (RFC 8446 section 5.5), which is the default.
    pub records_per_key: u64,
}

/// `[http]`: what modes http and redirect have in common.
#[derive(Debug, Clone, PartialEq)]
pub struct Http {
    /// The value of Strict-Transport-Security, at least `hsts::AGE_MIN_S`.
    pub hsts: String,
    /// Of a request's or a response's head, and of trailers, in bytes.
    pub head_bytes: usize,
    /// The folder whose files answer `/.well-known/acme-challenge/`, in mode redirect.
    pub acme_challenge: Option<PathBuf>,
    /// From the first byte of a head to its last, and from the handshake to the first request.
    pub head_timeout: Duration,
    /// Between two requests of one connection.
    pub keep_alive: Duration,
    /// From the last byte of a request to the head of its response.
    pub response_timeout: Duration,
    /// How long a connection to an upstream is kept for another request; zero: never.
    pub upstream_idle: Duration,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq)]
pub struct Log {
    pub format: LogFormat,
    pub level: tracing::Level,
    pub client_address: ClientAddress,
}

/// How the log shows a client's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAddress {
    Full,
    /// The network: three bytes of IPv4, six of IPv6, no port.
    Truncated,
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
    pub mode: Mode,
}

impl Listener {
    /// Where its clients' bytes go, if anywhere.
    pub fn upstream(&self) -> Option<&Arc<Upstream>> {
        match &self.mode {
            Mode::Tcp(upstream) | Mode::Http(upstream) => Some(upstream),
            Mode::Redirect => None,
        }
    }
}

/// What a listener does with a connection.
#[derive(Debug, Clone, PartialEq)]
pub enum Mode {
    /// TLS ends here; the bytes go on as they are.
    Tcp(Arc<Upstream>),
    /// TLS ends here; HTTP/1.1 goes on request by request.
    Http(Arc<Upstream>),
    /// No TLS: everybody is sent to https.
    Redirect,
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
