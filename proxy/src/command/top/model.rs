//! What is shown: rates between two readings, and the connections, sorted and filtered.

use crate::observe::live::Connection;
use crate::observe::maps::Reading;
use std::collections::BTreeMap;
use std::time::Instant;
use tlsplice_ebpf::{ClassName, ClassSums, EndpointName, Histogram, Sums};

/// By which column tables are sorted, the largest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sort {
    Bytes,
    Live,
    Opened,
    Rtt,
}

impl Sort {
    pub fn next(self) -> Self {
        match self {
            Self::Bytes => Self::Live,
            Self::Live => Self::Opened,
            Self::Opened => Self::Rtt,
            Self::Rtt => Self::Bytes,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Live => "live",
            Self::Opened => "new",
            Self::Rtt => "rtt",
        }
    }
}

/// Which tables are on the screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    All,
    Peers,
    Names,
    Connections,
}

impl Shown {
    pub fn next(self) -> Self {
        match self {
            Self::All => Self::Peers,
            Self::Peers => Self::Names,
            Self::Names => Self::Connections,
            Self::Connections => Self::All,
        }
    }
}

/// A line of the tables with rates.
#[derive(Debug, Clone, PartialEq)]
pub struct Rates {
    pub side: String,
    pub name: String,
    pub live: u64,
    pub opened: f64,
    pub bytes_in: f64,
    pub bytes_out: f64,
    pub retransmits: f64,
    /// Mean of the samples between the readings, in microseconds; `None`: there were none.
    pub rtt_us: Option<f64>,
}

/// Everything that is on the screen.
pub struct View {
    pub paused: bool,
    pub typing: bool,
    pub filter: String,
    pub sort: Sort,
    pub shown: Shown,
    pub scroll: usize,
    before: Option<(Instant, Reading)>,
    peers: Vec<Rates>,
    names: Vec<Rates>,
    connections: Vec<Connection>,
    /// Why there are no connections to show.
    pub untold: Option<String>,
}

impl View {
    pub fn new() -> Self {
        Self {
            paused: false,
            typing: false,
            filter: String::new(),
            sort: Sort::Bytes,
            shown: Shown::All,
            scroll: 0,
            before: None,
            peers: Vec::new(),
            names: Vec::new(),
            connections: Vec::new(),
            untold: None,
        }
    }

    /// A new reading, and what the admin endpoint has told, if there is one.
    pub fn take(&mut self, now: Instant, reading: Reading, told: Option<Result<Vec<Connection>, String>>) {
        if let Some((then, before)) = &self.before {
            let seconds = now.duration_since(*then).as_secs_f64().max(1e-3);
            self.peers = peers(before, &reading, seconds);
            self.names = names(before, &reading, seconds);
        }
        self.before = Some((now, reading));
        (self.connections, self.untold) = match told {
            None => (Vec::new(), Some("no server.admin in the configuration: --admin names one".to_owned())),
            Some(Err(why)) => (Vec::new(), Some(why)),
            Some(Ok(connections)) => (connections, None),
        };
    }

    pub fn peers(&self) -> Vec<&Rates> {
        self.sorted(&self.peers)
    }

    pub fn names(&self) -> Vec<&Rates> {
        self.sorted(&self.names)
    }

    pub fn connections(&self) -> Vec<&Connection> {
        let fits = |c: &&Connection| {
            [&c.peer, &c.server_name, &c.suite, &c.offload, &c.listener].iter().any(|text| self.fits(text))
        };
        let mut connections: Vec<&Connection> = self.connections.iter().filter(fits).collect();
        connections.sort_by_key(|c| {
            let key = match self.sort {
                Sort::Bytes | Sort::Live => c.bytes_in + c.bytes_out,
                // The youngest first.
                Sort::Opened => u64::MAX - (c.age_seconds * 1e3) as u64,
                Sort::Rtt => u64::from(c.rtt_us),
            };
            std::cmp::Reverse(key)
        });
        connections
    }

    fn sorted<'a>(&'a self, rates: &'a [Rates]) -> Vec<&'a Rates> {
        let mut rates: Vec<&Rates> = rates.iter().filter(|r| self.fits(&r.name) || self.fits(&r.side)).collect();
        let key = |r: &Rates| match self.sort {
            Sort::Bytes => r.bytes_in + r.bytes_out,
            Sort::Live => r.live as f64,
            Sort::Opened => r.opened,
            Sort::Rtt => r.rtt_us.unwrap_or(0.0),
        };
        rates.sort_by(|a, b| key(b).total_cmp(&key(a)).then_with(|| (&a.side, &a.name).cmp(&(&b.side, &b.name))));
        rates
    }

    fn fits(&self, text: &str) -> bool {
        self.filter.is_empty() || text.to_lowercase().contains(&self.filter.to_lowercase())
    }
}

fn peers(before: &Reading, now: &Reading, seconds: f64) -> Vec<Rates> {
    let mut peers = Vec::new();
    for (name, sums) in &now.endpoints {
        let was = before.endpoints.iter().find(|(other, _)| other == name).map(|(_, sums)| sums);
        if sums.opened == 0 && sums.refused == 0 && name.side.as_str() == "other" {
            continue;
        }
        let rate = |count: fn(&Sums) -> u64| count(sums).saturating_sub(was.map_or(0, count)) as f64 / seconds;
        peers.push(Rates {
            side: name.side.as_str().to_owned(),
            name: peer_name(name),
            live: live(sums.opened.wrapping_sub(sums.closed)),
            opened: rate(|s| s.opened),
            bytes_in: rate(|s| s.bytes_in),
            bytes_out: rate(|s| s.bytes_out),
            retransmits: rate(|s| s.retransmits),
            rtt_us: mean(was.map(|s| &s.rtt), &sums.rtt),
        });
    }
    peers
}

fn peer_name(name: &EndpointName) -> String {
    match name.upstream.as_str() {
        "" => name.listener.as_str().to_owned(),
        upstream => format!("{upstream} {}", name.server.as_str()),
    }
}

/// Classes with one server name are one line.
fn names(before: &Reading, now: &Reading, seconds: f64) -> Vec<Rates> {
    let mut names: BTreeMap<&str, Rates> = BTreeMap::new();
    for (class, sums) in &now.classes {
        if is_unused(sums) {
            continue;
        }
        let was = before.classes.iter().find(|(other, _)| other == class).map(|(_, sums)| sums);
        let rate = |count: fn(&ClassSums) -> u64| count(sums).saturating_sub(was.map_or(0, count)) as f64 / seconds;
        let line = names.entry(class.server_name.as_str()).or_insert_with(|| Rates {
            side: "name".to_owned(),
            name: shown_name(class),
            live: 0,
            opened: 0.0,
            bytes_in: 0.0,
            bytes_out: 0.0,
            retransmits: 0.0,
            rtt_us: None,
        });
        line.live += live(sums.live);
        line.opened += rate(|s| s.opened);
        line.bytes_in += rate(|s| s.bytes_in);
        line.bytes_out += rate(|s| s.bytes_out);
        line.retransmits += rate(|s| s.retransmits);
    }
    names.into_values().collect()
}

/// A class may have connections that were opened in another: behind the door they are in one of their own.
fn is_unused(sums: &ClassSums) -> bool {
    let ClassSums { opened, closed, live, bytes_in, bytes_out, retransmits } = *sums;
    [opened, closed, live, bytes_in, bytes_out, retransmits] == [0; 6]
}

fn shown_name(class: &ClassName) -> String {
    match class.server_name.as_str() {
        "" => "(none)".to_owned(),
        name => name.to_owned(),
    }
}

/// A sum over CPUs that was read in the middle of a change may be one too few.
fn live(difference: u64) -> u64 {
    u64::try_from(difference.cast_signed()).unwrap_or(0)
}

fn mean(before: Option<&Histogram>, now: &Histogram) -> Option<f64> {
    let count = |h: &Histogram| h.buckets.iter().sum::<u64>();
    let samples = count(now).saturating_sub(before.map_or(0, count));
    let sum = now.sum.saturating_sub(before.map_or(0, |h| h.sum));
    (samples > 0).then(|| sum as f64 / samples as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tlsplice_ebpf::Text;

    fn class(offload: &str) -> ClassName {
        ClassName {
            used: Text::new("yes"),
            server_name: Text::new("a.example"),
            version: Text::new("TLSv1.3"),
            suite: Text::new("TLS_AES_128_GCM_SHA256"),
            group: Text::new("X25519"),
            resumed: Text::new("no"),
            offload: Text::new(offload),
        }
    }

    #[test]
    fn a_name_has_its_connections_on_both_sides_of_the_door() {
        let unused = ClassSums { opened: 0, closed: 0, live: 0, bytes_in: 0, bytes_out: 0, retransmits: 0 };
        let reading = |bytes_out| Reading {
            classes: vec![
                (class("userspace"), ClassSums { opened: 3, live: 1, bytes_out: 100, ..unused }),
                (class("kernel"), ClassSums { live: 2, bytes_out, ..unused }),
            ],
            ..Reading::default()
        };
        let lines = names(&reading(0), &reading(8_000), 2.0);
        let lines: Vec<_> = lines.iter().map(|line| (line.name.as_str(), line.live, line.bytes_out)).collect();
        assert_eq!(lines, [("a.example", 3, 4_000.0)]);
        let nobody = Reading { classes: vec![(class("kernel"), unused)], ..Reading::default() };
        assert_eq!(names(&nobody, &nobody, 1.0), []);
    }
}
