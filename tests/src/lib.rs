//! Tests of the real `tlsplice` over real sockets, in one binary that runs on the host, in user-mode Linux and in
//! guests of each kernel series.
//!
//!     client (ours, or openssl, gnutls-cli, curl, java) ──TLS──▶ tlsplice ──TCP or unix──▶ upstream (ours, or nginx)
//!         client.rs, client/*                            proxy.rs                     upstream.rs, http.rs
//!
//! `run.rs` runs the tests of `suite/`, one after the other, each bounded by a watchdog. A test has a `Proxy` started,
//! moves bytes of a known pattern through it, and has the proxy's own counts, the kernel's counts, its descriptors, its
//! log and its exit status checked when it stops it (`Proxy::finish`).

pub mod authority;
pub mod certificate;
pub mod client;
pub mod counted;
pub mod environment;
pub mod exchange;
pub mod http;
pub mod nfs;
pub mod pattern;
pub mod process;
pub mod proxy;
pub mod run;
pub mod scrape;
pub mod suite;
pub mod talk;
pub mod upstream;
