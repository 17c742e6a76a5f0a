//! The cost curve of offloading: what a connection costs by the bytes that it moves, the kernel's way beside userspace's.
//!
//!   points (way, direction, bytes, cost in each round) ─▶ what the door costs, what a byte behind it saves ─▶ after how many it pays
//!
//! Both ways have the handshake and the close in them, so their difference is the door and the bytes alone. It is taken round by
//! round, and a line is laid through it whose errors count by what the whole connection costs: small connections say where it
//! begins, large ones how steep it is.

use crate::load::Kind;
use crate::result::{Figure, GIB, OURS, Run, numbered};
use crate::statistics;
use crate::table::{aligned, number};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// What every other way is held against.
const USERSPACE: &str = "tlsplice-userspace";

/// A curve, in one unit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Curve {
    /// Of a connection: `µs` or `k instructions`.
    pub unit: String,
    /// Of a GiB, and how many of the other one it is.
    pub bulk_unit: (String, f64),
    pub points: Vec<Point>,
}

/// Connections of one size through one way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Point {
    /// `fetch` or `store`.
    pub kind: Kind,
    pub bytes: u64,
    pub way: String,
    /// What a connection cost, in each round.
    pub costs: Vec<f64>,
}

/// What a way costs and gains against userspace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trade {
    /// Of a connection, whatever it moves.
    pub door: f64,
    /// Of a byte.
    pub saved: f64,
}

impl Trade {
    /// After how many bytes it has paid; `None`: never.
    pub fn pays_after(self) -> Option<f64> {
        match (self.door > 0.0, self.saved > 0.0) {
            (_, false) => None,
            (false, true) => Some(0.0),
            (true, true) => Some(self.door / self.saved),
        }
    }
}

impl Curve {
    /// The curve in a run, in time.
    pub fn of(run: &Run) -> Self {
        // Ways are held against each other round by round: one that failed in one way is nobody's.
        let is_everybodys = |kind: Kind, bytes: u64, number: usize| {
            let mut same = run.curve.iter().filter(|point| point.kind == kind && point.bytes == bytes);
            same.all(|point| numbered(&point.rounds).any(|(known, _)| known == number))
        };
        let costs = |point: &crate::result::Point| {
            let rounds = numbered(&point.rounds).filter(|(number, _)| is_everybodys(point.kind, point.bytes, *number));
            rounds.filter_map(|(_, round)| round.figure(Figure::Cpu, point.kind)).collect()
        };
        let points = run.curve.iter().map(|point| Point {
            kind: point.kind,
            bytes: point.bytes,
            way: point.peer.clone(),
            costs: costs(point),
        });
        Self { unit: "µs".into(), bulk_unit: ("s".into(), 1e6), points: points.collect() }
    }

    pub fn point(&self, kind: Kind, bytes: u64, way: &str) -> Option<&Point> {
        self.points.iter().find(|point| point.kind == kind && point.bytes == bytes && point.way == way)
    }

    /// Sizes, in rising order.
    pub fn sizes(&self, kind: Kind) -> Vec<u64> {
        let mut sizes: Vec<u64> = self.points.iter().filter(|p| p.kind == kind).map(|p| p.bytes).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    /// Ways, userspace first.
    pub fn ways(&self) -> Vec<&str> {
        let mut ways = vec![USERSPACE];
        for point in &self.points {
            if !ways.contains(&point.way.as_str()) {
                ways.push(&point.way);
            }
        }
        ways
    }

    /// By how much a connection costs more than in userspace, as each round saw it.
    pub fn more_than_userspace(&self, kind: Kind, bytes: u64, way: &str) -> Vec<f64> {
        self.round_by_round(kind, bytes, way, |way, userspace| way - userspace)
    }

    /// How many times what it costs in userspace, as each round saw it.
    pub fn times_userspace(&self, kind: Kind, bytes: u64, way: &str) -> Vec<f64> {
        self.round_by_round(kind, bytes, way, |way, userspace| way / userspace)
    }

    fn round_by_round(&self, kind: Kind, bytes: u64, way: &str, of: fn(f64, f64) -> f64) -> Vec<f64> {
        let costs = |way: &str| self.point(kind, bytes, way).map(|point| point.costs.clone()).unwrap_or_default();
        costs(way).iter().zip(costs(USERSPACE)).map(|(way, userspace)| of(*way, userspace)).collect()
    }

    /// The line through the differences.
    pub fn trade(&self, kind: Kind, way: &str) -> Option<Trade> {
        let sizes = self.sizes(kind).into_iter();
        let points: Vec<(f64, f64, f64)> = sizes
            .filter_map(|bytes| {
                let difference = statistics::median(&self.more_than_userspace(kind, bytes, way))?;
                let whole = statistics::median(&self.point(kind, bytes, USERSPACE)?.costs)?;
                Some((bytes as f64, difference, whole.powi(-2)))
            })
            .collect();
        let (start, slope) = line(&points)?;
        Some(Trade { door: start, saved: -slope })
    }
}

/// The start and the slope of the line through (x, y, weight) with the least squares.
fn line(points: &[(f64, f64, f64)]) -> Option<(f64, f64)> {
    if points.len() < 2 {
        return None;
    }
    let sum = |of: fn(&(f64, f64, f64)) -> f64| points.iter().map(of).sum::<f64>();
    let weight = sum(|p| p.2);
    let (x, y) = (sum(|p| p.2 * p.0) / weight, sum(|p| p.2 * p.1) / weight);
    let spread: f64 = points.iter().map(|p| p.2 * (p.0 - x).powi(2)).sum();
    let slope = points.iter().map(|p| p.2 * (p.0 - x) * (p.1 - y)).sum::<f64>() / spread;
    (spread > 0.0).then_some((y - slope * x, slope))
}

/// The curves of a file, by kernel.
pub fn show_file(file: &Path) -> Result<String> {
    let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let curves: BTreeMap<String, Curve> =
        serde_json::from_str(&text).with_context(|| format!("{} holds no curves", file.display()))?;
    Ok(curves.iter().map(|(kernel, curve)| format!("\nLinux {kernel}{}", show(curve))).collect())
}

/// A curve as tables.
pub fn show(curve: &Curve) -> String {
    let mut text = String::new();
    for kind in [Kind::Fetch, Kind::Store] {
        let sizes = curve.sizes(kind);
        if sizes.is_empty() {
            continue;
        }
        let ways = curve.ways();
        let mut rows = vec![head(&ways)];
        for bytes in sizes {
            let mut row = vec![size(bytes)];
            for way in &ways {
                let cost = curve.point(kind, bytes, way).and_then(|point| statistics::median(&point.costs));
                row.push(cost.map_or_else(|| "-".into(), number));
                if *way != USERSPACE {
                    row.push(difference(&curve.more_than_userspace(kind, bytes, way)));
                }
            }
            rows.push(row);
        }
        text += &format!(
            "\nA new connection that {} so many bytes, {} (median; [more than userspace, round by round])\n{}",
            if kind == Kind::Fetch { "takes" } else { "gives" },
            curve.unit,
            aligned(&rows)
        );
        for way in ways.into_iter().filter(|way| *way != USERSPACE) {
            if let Some(trade) = curve.trade(kind, way) {
                text += &format!("{}: {}\n", short(way), told(curve, trade));
            }
        }
    }
    text
}

fn head(ways: &[&str]) -> Vec<String> {
    let mut head = vec![String::new()];
    for way in ways {
        head.push(short(way).to_owned());
        if *way != USERSPACE {
            head.push(String::new());
        }
    }
    head
}

/// The line of one way in words.
pub fn told(curve: &Curve, trade: Trade) -> String {
    let (bulk, scale) = &curve.bulk_unit;
    let unit = &curve.unit;
    let (door, saved) = (number(trade.door), number(trade.saved.abs() * GIB / scale));
    match trade.pays_after() {
        None => format!("costs {door} {unit} a connection and {saved} {bulk} a GiB more: it never pays"),
        Some(bytes) => format!(
            "costs {door} {unit} a connection and saves {saved} {bulk} a GiB: it pays after {:.0} KiB",
            bytes / 1024.0
        ),
    }
}

fn difference(values: &[f64]) -> String {
    let (Some(middle), Some((low, high))) = (statistics::median(values), statistics::range(values)) else {
        return "-".into();
    };
    format!("[{}; {}..{}]", signed(middle), signed(low), signed(high))
}

fn signed(value: f64) -> String {
    if value > 0.0 { format!("+{}", number(value)) } else { number(value) }
}

/// A way's name without what all have in common.
pub fn short(way: &str) -> &str {
    if way == OURS { "default" } else { way.trim_start_matches("tlsplice-") }
}

/// A size as people say it.
pub fn size(bytes: u64) -> String {
    if bytes >= 1 << 20 { format!("{} MiB", bytes >> 20) } else { format!("{} KiB", bytes >> 10) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(door: f64, of_a_byte: f64) -> Curve {
        let mut points = Vec::new();
        for bytes in [4 << 10, 64 << 10, 1 << 20_u64] {
            let userspace = 300.0 + bytes as f64 * 4e-4;
            let kernel = 300.0 + door + bytes as f64 * of_a_byte;
            // A disturbed round meets both.
            for (way, cost) in [(USERSPACE, userspace), ("tlsplice-kernel", kernel)] {
                let costs = vec![cost, cost + 100.0, cost];
                points.push(Point { kind: Kind::Fetch, bytes, way: way.into(), costs });
            }
        }
        Curve { unit: "µs".into(), bulk_unit: ("s".into(), 1e6), points }
    }

    #[test]
    fn the_door_is_where_the_line_begins_and_pays_where_it_crosses() {
        let trade = curve(20.0, 2e-4).trade(Kind::Fetch, "tlsplice-kernel").unwrap();
        assert!((trade.door - 20.0).abs() < 1e-6 && (trade.saved - 2e-4).abs() < 1e-9, "{trade:?}");
        assert_eq!(trade.pays_after().map(f64::round), Some(100_000.0));
        assert_eq!(curve(20.0, 5e-4).trade(Kind::Fetch, "tlsplice-kernel").unwrap().pays_after(), None);
        assert!(curve(20.0, 2e-4).trade(Kind::Store, "tlsplice-kernel").is_none());
    }

    #[test]
    fn a_size_that_one_way_lacks_is_left_out() {
        let mut lacking = curve(20.0, 2e-4);
        lacking.points.pop();
        assert!(lacking.trade(Kind::Fetch, "tlsplice-kernel").is_some());
        assert!(show(&lacking).contains("1 MiB"), "{}", show(&lacking));
    }
}
