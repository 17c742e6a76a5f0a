//! What is done to a target, and for how long. Each kind of work is a file in `load/`; all run through `drive.rs`.
//!
//! What fails before the work begins ends it: there is no load. What fails in it is counted and told, and the load goes on.

mod bulk;
mod connections;
mod download;
mod drive;
#[cfg(test)]
mod fickle;
mod mixed;
mod open_loop;
mod requests;
mod transfers;
mod waiting;

use crate::client::Target;
use anyhow::{Context, Result};
pub use drive::drive;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Latencies from 1 µs to a minute, to three digits.
const LATENCY_LIMIT_US: u64 = 60_000_000;
const LATENCY_DIGITS: u8 = 3;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// New connections: a full handshake, one request of one byte, close.
    Handshake,
    /// The same with a resumed session.
    Resumed,
    /// Connect, full handshake, 1 KiB, close, and wait for the other side's close.
    Churn,
    /// Small requests over kept connections, each as soon as the last was answered.
    Request,
    /// Small requests at a fixed rate; latency counts from when each was due.
    OpenLoop,
    /// Bulk from the upstream to the client.
    Down,
    /// Bulk from the client to the upstream.
    Up,
    /// Half of the connections one way, half the other.
    Both,
    /// Connections that wait after one request.
    Idle,
    /// Clients that read far slower than the upstream sends.
    Slow,
    /// New and kept connections, nine small answers for each large one.
    Mixed,
    /// New connections, each of which takes so many bytes and ends.
    Fetch,
    /// The same the other way.
    Store,
}

/// What a kind is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Connection,
    Request,
    Byte,
}

impl Kind {
    /// All of them, in the order of a table.
    pub const ALL: [Self; 13] = [
        Self::Handshake,
        Self::Resumed,
        Self::Churn,
        Self::Request,
        Self::Down,
        Self::Up,
        Self::Both,
        Self::Mixed,
        Self::Idle,
        Self::Slow,
        Self::OpenLoop,
        Self::Fetch,
        Self::Store,
    ];

    /// Whether a comparison has it unless others are named: what depends on a size of its own is for the cost curve.
    pub fn is_compared(self) -> bool {
        !matches!(self, Self::Fetch | Self::Store)
    }

    pub fn unit(self) -> Unit {
        match self {
            Self::Handshake | Self::Resumed | Self::Churn | Self::Idle | Self::Fetch | Self::Store => Unit::Connection,
            Self::Request | Self::OpenLoop | Self::Mixed => Unit::Request,
            Self::Down | Self::Up | Self::Both | Self::Slow => Unit::Byte,
        }
    }

    /// Whether it asks for what connections hold.
    pub fn holds_memory(self) -> bool {
        matches!(self, Self::Idle | Self::Slow)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Handshake => "handshake",
            Self::Resumed => "resumed",
            Self::Churn => "churn",
            Self::Request => "request",
            Self::OpenLoop => "open-loop",
            Self::Down => "down",
            Self::Up => "up",
            Self::Both => "both",
            Self::Idle => "idle",
            Self::Slow => "slow",
            Self::Mixed => "mixed",
            Self::Fetch => "fetch",
            Self::Store => "store",
        }
    }
}

/// One piece of work.
#[derive(Clone, Debug)]
pub struct Load {
    pub kind: Kind,
    /// Connections at once.
    pub connections: usize,
    pub duration: Duration,
    /// Bytes of one answer, where a kind has small answers.
    pub answer_bytes: u64,
    /// Bytes that one connection uploads.
    pub upload_bytes: u64,
    /// Bytes that a connection of `fetch` and `store` moves.
    pub transfer_bytes: u64,
    /// Requests in a second, of all connections together.
    pub rate: f64,
    /// Another path than our upstream's.
    pub path: Option<String>,
}

impl Load {
    /// The defaults of the comparison.
    pub fn of(kind: Kind, duration: Duration) -> Self {
        let connections = match kind {
            Kind::Handshake | Kind::Resumed => 8,
            Kind::Churn => 16,
            Kind::Request | Kind::OpenLoop => 32,
            Kind::Down | Kind::Up | Kind::Both | Kind::Mixed | Kind::Fetch | Kind::Store => 4,
            Kind::Idle => 1000,
            Kind::Slow => 64,
        };
        let answer_bytes = match kind {
            Kind::Handshake | Kind::Resumed => 1,
            Kind::Churn | Kind::Request | Kind::OpenLoop | Kind::Idle | Kind::Mixed => 1024,
            Kind::Fetch | Kind::Store => TRANSFER_BYTES,
            Kind::Down | Kind::Up | Kind::Both | Kind::Slow => ENDLESS_BYTES,
        };
        let upload_bytes = 64 << 20;
        let transfer_bytes = TRANSFER_BYTES;
        Self { kind, connections, duration, answer_bytes, upload_bytes, transfer_bytes, rate: 1000.0, path: None }
    }

    fn request(&self, target: &Target) -> Vec<u8> {
        match &self.path {
            Some(path) => target.get_path(path),
            None => target.get(self.answer_bytes),
        }
    }
}

/// After a failure, before the next try: a server that refuses everything is asked, not flooded.
const FAILURE_PAUSE: Duration = Duration::from_millis(20);
/// What a connection moves unless it is said.
const TRANSFER_BYTES: u64 = 64 << 10;
/// A download that no run finishes.
const ENDLESS_BYTES: u64 = 1 << 42;

/// A moment of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Before anything was done to the target.
    Before,
    Begin,
    End,
}

/// What a run came to.
#[derive(Debug)]
pub struct Outcome {
    pub elapsed: Duration,
    /// Of all threads.
    pub count: Count,
}

/// An empty histogram.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_LIMIT_US, LATENCY_DIGITS).expect("the bounds and digits are constants")
}

/// What was done.
#[derive(Debug)]
pub struct Count {
    /// Connections, requests or bytes.
    pub units: u64,
    /// How many of the sessions were resumed.
    pub resumed: u64,
    /// In µs; empty where a kind has none.
    pub latency: Histogram<u64>,
    /// Connections that followed one which the server had ended.
    pub reopened: u64,
    /// What failed, and how the first of it did.
    pub failed: u64,
    pub failure: Option<String>,
}

impl Count {
    fn new() -> Self {
        Self { units: 0, resumed: 0, latency: histogram(), reopened: 0, failed: 0, failure: None }
    }

    fn took(&mut self, since: Instant) {
        self.latency.saturating_record(since.elapsed().as_micros().try_into().unwrap_or(u64::MAX));
    }

    fn failed(&mut self, error: &anyhow::Error) {
        self.failed += 1;
        self.failure.get_or_insert_with(|| format!("{error:#}"));
    }

    fn add(&mut self, other: Self) -> Result<()> {
        self.units += other.units;
        self.resumed += other.resumed;
        self.reopened += other.reopened;
        self.failed += other.failed;
        self.failure = self.failure.take().or(other.failure);
        self.latency.add(&other.latency).context("add up latencies")
    }

    /// Does it again and again until the time is up.
    fn until(&mut self, window: Window, mut once: impl FnMut(&mut Self) -> Result<()>) {
        while Instant::now() < window.end {
            let since = Instant::now();
            match once(self) {
                Ok(()) => {
                    self.took(since);
                    self.units += 1;
                }
                Err(error) => {
                    self.failed(&error);
                    std::thread::sleep(FAILURE_PAUSE.min(window.end.saturating_duration_since(Instant::now())));
                }
            }
        }
    }
}

/// Does the work and tells when it begins and ends.
pub fn run(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    on_mark(Mark::Before)?;
    match load.kind {
        Kind::Handshake | Kind::Resumed | Kind::Churn => connections::run(target, load, on_mark),
        Kind::Request => requests::run(target, load, on_mark),
        Kind::OpenLoop => open_loop::run(target, load, on_mark),
        Kind::Down => bulk::down(target, load, on_mark),
        Kind::Up => bulk::up(target, load, on_mark),
        Kind::Both => bulk::both(target, load, on_mark),
        Kind::Idle => waiting::idle(target, load, on_mark),
        Kind::Slow => waiting::slow(target, load, on_mark),
        Kind::Mixed => mixed::run(target, load, on_mark),
        Kind::Fetch | Kind::Store => transfers::run(target, load, on_mark),
    }
    .with_context(|| format!("{} on {}", load.kind.name(), target.address))
}

/// When a run began and when it ends.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    pub begin: Instant,
    pub end: Instant,
}
