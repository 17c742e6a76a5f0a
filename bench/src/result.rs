//! A run as data: what was measured, where, with which versions. Written as JSON, with every round, so that it can be looked
//! at again in another way.

use crate::load::{Kind, Unit};
use crate::machine::Machine;
use crate::statistics;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;

/// The format of the file; another number, another meaning.
pub const FORMAT: u32 = 1;
/// The name under which tlsplice is measured.
pub const OURS: &str = "tlsplice";

/// Everything about one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    pub format: u32,
    /// Seconds since 1970.
    pub taken_at: u64,
    pub machine: Machine,
    pub settings: Settings,
    /// Program and version, of each that took part.
    pub versions: Vec<(String, String)>,
    pub commit: String,
    pub series: Vec<Series>,
    /// The cost curve, if it was measured.
    #[serde(default)]
    pub curve: Vec<Point>,
    pub limit: Option<Limit>,
    /// What was left out and why.
    pub remarks: Vec<String>,
}

/// How it was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    pub rounds: usize,
    pub seconds: f64,
    pub workers: usize,
    /// The CPUs of the proxies and of the generator, if they were held to some.
    pub proxy_cpus: Option<String>,
    pub load_cpus: Option<String>,
    pub protection: String,
    /// ns of a system call on the machine itself and here, where the difference was taken off.
    pub call_ns: Option<(f64, f64)>,
    /// Requests per second of the open loop.
    pub open_rate: Option<f64>,
    /// Connections of `idle`, and what each of `up` and `both` sends; absent from files of earlier versions.
    #[serde(default)]
    pub idle_connections: Option<usize>,
    #[serde(default)]
    pub upload_bytes: Option<u64>,
}

/// One peer under one kind of work, in all rounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Series {
    pub kind: Kind,
    pub peer: String,
    pub rounds: Vec<Round>,
}

/// Connections of one size through one peer, in all rounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Point {
    /// `fetch` or `store`.
    pub kind: Kind,
    /// What each connection moved.
    pub bytes: u64,
    pub peer: String,
    pub rounds: Vec<Round>,
}

/// One measurement.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Round {
    /// Which round of the run it was, from 0: one that failed leaves a gap. Absent from files of earlier versions, where it
    /// is the place in the series.
    #[serde(default)]
    pub number: Option<usize>,
    /// Connections, requests or bytes.
    pub units: u64,
    pub seconds: f64,
    /// The proxy's own CPU between the marks, of which what system calls cost too much there was taken off.
    pub cpu_ns: f64,
    /// The same, as it was measured.
    pub gross_cpu_ns: f64,
    pub user_share: f64,
    pub calls: u64,
    pub resumed: u64,
    /// Of the proxy, between before the first connection and the end, per connection.
    pub pss_per_connection: Option<f64>,
    /// Kernel slab of the machine, both ends of all sockets.
    pub slab_per_connection: Option<f64>,
    /// p50, p90, p99, p99.9 and the worst, in µs.
    pub latency_us: Option<[f64; 5]>,
}

/// Names of [`Round::latency_us`].
pub const PERCENTILES: [&str; 5] = ["p50", "p90", "p99", "p99.9", "worst"];

/// The floor of this machine: CPU-s per GiB.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Limit {
    pub copy_down: Vec<f64>,
    pub copy_up: Vec<f64>,
    pub splice_down: Vec<f64>,
    pub splice_up: Vec<f64>,
    /// AES-256-GCM on buffers of 16 KiB, in place.
    pub cipher: Vec<f64>,
}

/// Which of a round's figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// µs per connection or request, s per GiB.
    Cpu,
    /// Per second; MiB per second for bulk.
    Rate,
    /// KiB per connection.
    Memory,
    /// µs.
    P99,
}

impl Figure {
    /// The unit, for a kind of work.
    pub fn unit(self, kind: Kind) -> &'static str {
        match (self, kind.unit()) {
            (Self::Cpu, Unit::Connection) => "µs CPU per connection",
            (Self::Cpu, Unit::Request) => "µs CPU per request",
            (Self::Cpu, Unit::Byte) => "s CPU per GiB",
            (Self::Rate, Unit::Connection) => "connections/s",
            (Self::Rate, Unit::Request) => "requests/s",
            (Self::Rate, Unit::Byte) => "MiB/s",
            (Self::Memory, _) => "KiB per connection",
            (Self::P99, _) => "µs, p99",
        }
    }

    /// Which of them a kind of work is about first of all.
    pub fn of(kind: Kind) -> Self {
        match kind {
            // What a slow client takes in a second comes out of buffers that were filled before: its CPU says nothing.
            Kind::Idle | Kind::Slow => Self::Memory,
            Kind::OpenLoop => Self::P99,
            Kind::Handshake
            | Kind::Resumed
            | Kind::Churn
            | Kind::Request
            | Kind::Down
            | Kind::Up
            | Kind::Both
            | Kind::Mixed
            | Kind::Fetch
            | Kind::Store => Self::Cpu,
        }
    }

    /// Whether less is better.
    pub fn less_is_better(self) -> bool {
        self != Self::Rate
    }
}

impl Round {
    /// One figure, if this round has it.
    pub fn figure(&self, figure: Figure, kind: Kind) -> Option<f64> {
        let units = (self.units > 0).then_some(self.units as f64)?;
        match figure {
            Figure::Cpu => Some(match kind.unit() {
                Unit::Connection | Unit::Request => self.cpu_ns / 1e3 / units,
                Unit::Byte => self.cpu_ns / 1e9 / (units / GIB),
            }),
            Figure::Rate => Some(match kind.unit() {
                Unit::Connection | Unit::Request => units / self.seconds,
                Unit::Byte => units / f64::from(1 << 20) / self.seconds,
            }),
            Figure::Memory => self.pss_per_connection.map(|bytes| bytes / 1024.0),
            Figure::P99 => self.latency_us.map(|latency| latency[2]),
        }
    }
}

/// Bytes.
pub const GIB: f64 = (1_u64 << 30) as f64;

/// Rounds with their numbers, by which those of other series are found: a shared disturbance meets all of one number.
pub fn numbered(rounds: &[Round]) -> impl Iterator<Item = (usize, &Round)> {
    rounds.iter().enumerate().map(|(place, round)| (round.number.unwrap_or(place), round))
}

impl Series {
    /// The round of a number, unless it failed.
    pub fn round(&self, number: usize) -> Option<&Round> {
        numbered(&self.rounds).find(|(known, _)| *known == number).map(|(_, round)| round)
    }

    /// One figure of every round.
    pub fn values(&self, figure: Figure) -> Vec<f64> {
        self.rounds.iter().filter_map(|round| round.figure(figure, self.kind)).collect()
    }

    pub fn median(&self, figure: Figure) -> Option<f64> {
        statistics::median(&self.values(figure))
    }

    /// Whether resumption took place where it was asked for, in 9 of 10 connections at least: otherwise something else was
    /// measured than the title says.
    pub fn is_what_it_says(&self) -> bool {
        self.kind != Kind::Resumed || self.rounds.iter().all(|round| round.resumed * 10 >= round.units * 9)
    }

    /// Whether most of the CPU time is a correction, not a measurement.
    pub fn is_rough(&self) -> bool {
        let left: Vec<f64> = self.rounds.iter().map(|round| round.cpu_ns / round.gross_cpu_ns).collect();
        statistics::median(&left).is_some_and(|share| share < 0.5)
    }
}

impl Run {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let run: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is no result of tlsplice-bench", path.display()))?;
        ensure!(run.format == FORMAT, "{} has format {}, this program reads {FORMAT}", path.display(), run.format);
        Ok(run)
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string(self).context("write the result as JSON")?;
        fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))
    }

    pub fn series(&self, kind: Kind, peer: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.kind == kind && series.peer == peer)
    }

    /// Peers in the order in which they were measured.
    pub fn peers(&self) -> Vec<&str> {
        let mut peers: Vec<&str> = Vec::new();
        for series in &self.series {
            if !peers.contains(&series.peer.as_str()) {
                peers.push(&series.peer);
            }
        }
        peers
    }

    /// Those of them that are tlsplice, in whatever setting.
    pub fn own(&self) -> Vec<&str> {
        self.peers().into_iter().filter(|peer| is_own(peer)).collect()
    }

    /// Kinds of work that were measured, in the order of a table.
    pub fn kinds(&self) -> Vec<Kind> {
        Kind::ALL.into_iter().filter(|kind| self.series.iter().any(|series| series.kind == *kind)).collect()
    }

    /// The peer that does best at something, tlsplice in any of its settings left out.
    pub fn best_peer(&self, kind: Kind, figure: Figure) -> Option<&Series> {
        let peers = self.series.iter().filter(|s| s.kind == kind && !is_own(&s.peer));
        let known = peers.filter_map(|series| Some((series, series.median(figure)?)));
        let better = |a: &f64, b: &f64| if figure.less_is_better() { a.total_cmp(b) } else { b.total_cmp(a) };
        known.min_by(|(_, a), (_, b)| better(a, b)).map(|(series, _)| series)
    }

    /// How many times better tlsplice is than a peer, round by round: a shared disturbance meets both.
    pub fn advantage(&self, kind: Kind, figure: Figure, ours: &str, peer: &str) -> Vec<f64> {
        let (Some(ours), Some(theirs)) = (self.series(kind, ours), self.series(kind, peer)) else { return Vec::new() };
        let pairs = numbered(&ours.rounds).filter_map(|(number, round)| Some((round, theirs.round(number)?)));
        let values = pairs.filter_map(|(a, b)| Some((a.figure(figure, kind)?, b.figure(figure, kind)?)));
        values.map(|(a, b)| if figure.less_is_better() { b / a } else { a / b }).collect()
    }

    /// Each of tlsplice's settings against the best peer, by kind of work.
    pub fn standings(&self) -> Vec<Standing<'_>> {
        let mut standings = Vec::new();
        for kind in self.kinds() {
            let figure = Figure::of(kind);
            let Some(best) = self.best_peer(kind, figure) else { continue };
            standings.extend(self.own().into_iter().filter_map(|ours| {
                let factors = self.advantage(kind, figure, ours, &best.peer);
                let (factor, range) = (statistics::median(&factors)?, statistics::range(&factors)?);
                let value = |peer: &str| self.series(kind, peer)?.median(figure);
                let (cost, of_best) = (value(ours)?, value(&best.peer)?);
                Some(Standing {
                    kind,
                    figure,
                    ours,
                    best: &best.peer,
                    factor,
                    range,
                    cost,
                    of_best,
                    aim: self.aim(kind),
                })
            }));
        }
        standings
    }

    /// What tlsplice aims at on a machine, as a factor against the best peer; `None` where no factor was set, and in user-mode Linux.
    fn aim(&self, kind: Kind) -> Option<f64> {
        if self.settings.call_ns.is_some() {
            return None;
        }
        match kind {
            Kind::Handshake | Kind::Down => Some(1.9),
            Kind::Request => Some(1.2),
            Kind::Up => Some(1.5),
            Kind::Idle => Some(5.0),
            Kind::OpenLoop => Some(1.0),
            Kind::Resumed | Kind::Churn | Kind::Both | Kind::Slow | Kind::Mixed | Kind::Fetch | Kind::Store => None,
        }
    }
}

/// How tlsplice, in one of its settings, stands against the best peer at something.
#[derive(Clone, Debug)]
pub struct Standing<'a> {
    pub kind: Kind,
    pub figure: Figure,
    pub ours: &'a str,
    pub best: &'a str,
    /// How many times better tlsplice is: the median of the rounds, with the least and the greatest.
    pub factor: f64,
    pub range: (f64, f64),
    /// The figure itself, tlsplice's and the best peer's.
    pub cost: f64,
    pub of_best: f64,
    pub aim: Option<f64>,
}

/// Whether a name is tlsplice's in one of its settings.
pub fn is_own(peer: &str) -> bool {
    peer.starts_with(OURS)
}

/// Runs for tests.
#[cfg(test)]
pub mod sample {
    use super::*;

    /// Requests that cost tlsplice and a peer so many µs in each round.
    pub fn requests(rounds: &[(f64, f64)]) -> Run {
        let series = |peer: &str, cost: fn(&(f64, f64)) -> f64| Series {
            kind: Kind::Request,
            peer: peer.into(),
            rounds: rounds
                .iter()
                .map(|r| Round { units: 1000, seconds: 1.0, cpu_ns: cost(r) * 1e6, ..Round::default() })
                .collect(),
        };
        Run {
            format: FORMAT,
            taken_at: 0,
            machine: Machine::default(),
            settings: Settings {
                rounds: rounds.len(),
                seconds: 1.0,
                workers: 1,
                proxy_cpus: None,
                load_cpus: None,
                protection: String::new(),
                call_ns: None,
                open_rate: None,
                idle_connections: None,
                upload_bytes: None,
            },
            versions: Vec::new(),
            commit: String::new(),
            series: vec![series(OURS, |r| r.0), series("nginx-stream", |r| r.1)],
            curve: Vec::new(),
            limit: None,
            remarks: Vec::new(),
        }
    }
}
