//! What was counted in one guest: the plugin's marks beside what the bench has told, as a table, and as figures to check against.

use crate::progress;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Bytes that one counted instruction moves in a repeated string instruction: what an unrolled copy does.
const BYTES_PER_INSTRUCTION: f64 = 4.0;
/// The virtual CPU of the proxies.
const PROXY_CPU: usize = 1;
/// By how much a figure may exceed the recorded one.
const TOLERANCE: f64 = 0.05;
const GIB: f64 = (1_u64 << 30) as f64;

/// One measurement, per unit.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    total: f64,
    /// Outside blocks that hold the cipher's instructions.
    rest: f64,
    user: f64,
    kernel: f64,
}

/// By peer and kind. An empty series: it was tried and came to nothing.
#[derive(Debug, Default)]
pub struct Counts(BTreeMap<(String, String), Vec<Count>>);

impl Counts {
    /// Puts what the bench has told beside what the plugin has counted.
    pub fn pair(told: &[String], marks: &str) -> Result<Self> {
        let marks: Vec<Value> =
            marks.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("read the marks")?;
        let pairs: Vec<(&Value, &Value)> = marks
            .windows(2)
            .filter(|two| two[0]["mark"] == 1 && two[1]["mark"] == 2)
            .map(|two| (&two[0]["cpus"][PROXY_CPU], &two[1]["cpus"][PROXY_CPU]))
            .collect();
        ensure!(
            pairs.len() == told.len() && !told.is_empty(),
            "the guest told of {} measurements, the plugin of {}: one of them failed",
            told.len(),
            pairs.len()
        );
        let mut counts = Self::default();
        for (line, (begin, end)) in told.iter().zip(pairs) {
            let mut words = line.split(' ');
            let (Some(kind), Some(peer), Some(units)) = (words.next(), words.next(), words.next()) else {
                bail!("{line:?} is no measurement");
            };
            let units: f64 = units.parse().with_context(|| format!("{line:?} has no number of units"))?;
            let series = counts.0.entry((peer.into(), kind.into())).or_default();
            // A peer may wait for a timer of TCP's longer than it is counted: that is no figure, and no reason to lose the others'.
            if units == 0.0 {
                progress::line(&format!("{peer}: no {kind} was done in the counted time: this round is left out"));
                continue;
            }
            let units = if ["down", "up", "both"].contains(&kind) { units / GIB } else { units };
            let of = |field: &str| (end[field].as_f64().unwrap_or(0.0) - begin[field].as_f64().unwrap_or(0.0)) / units;
            let user = of("user") + of("user_moved") / BYTES_PER_INSTRUCTION;
            let kernel = of("kernel") + of("kernel_moved") / BYTES_PER_INSTRUCTION;
            let (in_user, in_kernel) = (of("user_cipher"), of("kernel_cipher"));
            let count = Count {
                total: user + kernel + in_user + in_kernel,
                rest: user + kernel,
                user: user + in_user,
                kernel: kernel + in_kernel,
            };
            series.push(count);
        }
        Ok(counts)
    }

    /// What came to something.
    fn measured(&self) -> impl Iterator<Item = (&(String, String), &Vec<Count>)> {
        self.0.iter().filter(|(_, counts)| !counts.is_empty())
    }

    pub fn show(&self, series: &str) {
        progress::line(&format!(
            "\nLinux {series}: instructions on the proxy's own CPU, median [outside the cipher; user + kernel] (spread)"
        ));
        for ((peer, kind), counts) in &self.0 {
            let (scale, unit) = scale(kind);
            if counts.is_empty() {
                progress::line(&format!(
                    "{peer:20} {kind:10} {:>8} {unit:9} nothing was done in the counted time",
                    "-"
                ));
                continue;
            }
            let of = |pick: fn(&Count) -> f64| median(counts, pick) / scale;
            let totals = counts.iter().map(|c| c.total);
            let spread =
                (totals.clone().fold(0.0, f64::max) - totals.fold(f64::MAX, f64::min)) / median(counts, |c| c.total);
            progress::line(&format!(
                "{peer:20} {kind:10} {:8.3} {unit:9} [{:7.3}; {:7.3} + {:7.3}] ({:.1} %)",
                of(|c| c.total),
                of(|c| c.rest),
                of(|c| c.user),
                of(|c| c.kernel),
                spread * 100.0
            ));
        }
    }

    /// Adds this kernel's figures to the file, in the stead of older ones.
    pub fn record(&self, file: &Path, series: &str) -> Result<()> {
        let mut all = recorded(file)?;
        let mut figures = Map::new();
        for ((peer, kind), counts) in self.measured() {
            let rounds: Vec<[f64; 2]> = counts.iter().map(|c| [c.total.round(), c.rest.round()]).collect();
            let figure = json!({
                "total": median(counts, |c| c.total).round(),
                "rest": median(counts, |c| c.rest).round(),
                "rounds": rounds,
            });
            figures.insert(format!("{peer} {kind}"), figure);
        }
        all.insert(series.into(), Value::Object(figures));
        let text = serde_json::to_string_pretty(&Value::Object(all)).context("write the figures as JSON")?;
        fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
    }

    /// Adds this kernel's cost curve to the file, in the stead of an older one, as `tlsplice-bench curve` reads it.
    pub fn keep_curve(&self, file: &Path, series: &str) -> Result<()> {
        let points: Vec<Value> = self
            .measured()
            .filter_map(|((peer, kind), counts)| {
                let (kind, bytes) = kind.split_once(':')?;
                let costs: Vec<f64> = counts.iter().map(|count| (count.total / 1e3).round()).collect();
                Some(json!({"kind": kind, "bytes": bytes.parse::<u64>().ok()?, "way": peer, "costs": costs}))
            })
            .collect();
        ensure!(!points.is_empty(), "nothing of the curve was counted");
        let mut all = recorded(file)?;
        all.insert(
            series.into(),
            json!({"unit": "k instructions", "bulk_unit": ["G instructions", 1e6], "points": points}),
        );
        let text = serde_json::to_string_pretty(&Value::Object(all)).context("write the curve as JSON")?;
        fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
    }

    /// Whether tlsplice takes no more than recorded, and does all that was tried.
    pub fn check(&self, file: &Path, series: &str) -> Result<bool> {
        let all = recorded(file)?;
        let figures = all.get(series).with_context(|| format!("{} has no Linux {series}", file.display()))?;
        let mut good = true;
        let mut compared = 0;
        for ((peer, kind), counts) in self.measured().filter(|((peer, _), _)| peer.starts_with("tlsplice")) {
            let Some(old) = figures[&format!("{peer} {kind}")]["total"].as_f64() else { continue };
            let factor = median(counts, |c| c.total) / old;
            compared += 1;
            let verdict = if factor > 1.0 + TOLERANCE { "MORE THAN RECORDED" } else { "as recorded" };
            good &= factor <= 1.0 + TOLERANCE;
            progress::line(&format!("{peer} {kind}: {factor:.3} times the recorded figure: {verdict}"));
        }
        let failed = self.0.iter().filter(|((peer, _), counts)| peer.starts_with("tlsplice") && counts.is_empty());
        for ((peer, kind), _) in failed {
            good = false;
            progress::line(&format!("{peer} {kind}: it came to nothing"));
        }
        ensure!(compared > 0, "nothing that was counted is recorded in {}", file.display());
        Ok(good)
    }
}

fn recorded(file: &Path) -> Result<Map<String, Value>> {
    if !file.exists() {
        return Ok(Map::new());
    }
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} holds no figures", file.display()))
}

fn median(counts: &[Count], pick: fn(&Count) -> f64) -> f64 {
    let mut values: Vec<f64> = counts.iter().map(pick).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn scale(kind: &str) -> (f64, &'static str) {
    match kind {
        "down" | "up" | "both" => (1e9, "G/GiB"),
        "request" | "open-loop" | "mixed" => (1e3, "k/request"),
        _ => (1e6, "M/conn."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(mark: u32, user: u64, moved: u64) -> String {
        let cpu = |user, moved| json!({"user": user, "kernel": 10, "user_cipher": 0, "kernel_cipher": 0, "user_moved": moved, "kernel_moved": 0});
        json!({"mark": mark, "cpus": [cpu(7, 7), cpu(user, moved)]}).to_string()
    }

    #[test]
    fn what_was_told_meets_what_was_counted() {
        let marks = [mark(1, 100, 0), mark(2, 600, 400), mark(1, 600, 400), mark(2, 1800, 400)].join("\n");
        let counts = Counts::pair(&["request a 10".into(), "request a 20".into()], &marks).unwrap();
        let series = &counts.0[&("a".to_owned(), "request".to_owned())];
        assert_eq!(series.iter().map(|c| c.total).collect::<Vec<_>>(), [60.0, 60.0]);
        assert!(Counts::pair(&["request a 10".into()], &marks).is_err(), "a failed measurement is not passed over");
        let stalled = Counts::pair(&["request a 10".into(), "request b 0".into()], &marks).unwrap();
        assert_eq!(stalled.measured().map(|((peer, _), _)| peer.as_str()).collect::<Vec<_>>(), ["a"]);
    }
}
