//! The counters of user space, kept in the pinned maps beside the kernel's, so that they go on after a restart.
//!
//!   own samples ─▶ rises since the last time ─▶ words of the pinned array (by the sample's name and labels)
//!   words at the start + own samples ─▶ what is shown
//!
//! Once a second and at the end: a process that is killed loses what it counted since. Gauges are of this process alone.

use super::maps::Maps;
use std::collections::HashMap;
use std::fmt::Write;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// Sums of times are kept in microseconds.
const SUM_UNITS: f64 = 1e6;

/// See the module.
#[derive(Debug)]
pub struct Kept {
    maps: Arc<Maps>,
    /// Of earlier processes, by family.
    before: HashMap<String, HashMap<String, u64>>,
    saved: Mutex<HashMap<String, u64>>,
}

impl Kept {
    /// Reads what earlier processes have kept.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn new(maps: Arc<Maps>) -> io::Result<Self> {
        let mut before: HashMap<String, HashMap<String, u64>> = HashMap::new();
        for (sample, value) in maps.kept()? {
            before.entry(family_of(&sample).to_owned()).or_default().insert(sample, value);
        }
        Ok(Self { maps, before, saved: Mutex::default() })
    }

    /// Keeps what the samples of this process, as OpenMetrics text, have risen by.
    ///
    /// # Errors
    /// The maps cannot be written; the rises are kept the next time.
    pub fn save(&self, own: &str) -> io::Result<()> {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rises = Vec::new();
        for line in lines(own) {
            let Line::Count { sample, value } = line else { continue };
            let rise = value.saturating_sub(saved.get(sample).copied().unwrap_or(0));
            if rise > 0 {
                rises.push((sample.to_owned(), rise));
            }
        }
        if rises.is_empty() {
            return Ok(());
        }
        self.maps.keep(&rises)?;
        for (sample, rise) in rises {
            *saved.entry(sample).or_default() += rise;
        }
        Ok(())
    }

    /// The text with the counts of earlier processes in it.
    pub fn with_earlier(&self, own: &str) -> String {
        merge(own, &self.before)
    }
}

fn merge(own: &str, before: &HashMap<String, HashMap<String, u64>>) -> String {
    let mut text = String::with_capacity(own.len() + 1024);
    let mut missing: HashMap<&str, u64> = HashMap::new();
    for line in lines(own) {
        match line {
            Line::Count { sample, value } => {
                let earlier = missing.remove(sample).unwrap_or(0);
                show(&mut text, sample, value + earlier);
            }
            Line::Type { text: line, family, counts } => {
                let of_family = if counts { before.get(family) } else { None };
                text.push_str(line);
                text.push('\n');
                missing = of_family.into_iter().flatten().map(|(sample, value)| (sample.as_str(), *value)).collect();
            }
            Line::Head(line) => {
                // The family before is complete: what only earlier processes have counted belongs to it.
                let mut rest: Vec<_> = std::mem::take(&mut missing).into_iter().collect();
                rest.sort_unstable();
                rest.into_iter().for_each(|(sample, value)| show(&mut text, sample, value));
                text.push_str(line);
                text.push('\n');
            }
            Line::Other(line) => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

fn show(text: &mut String, sample: &str, value: u64) {
    // Writing to a String fails never.
    let _ = if is_sum(sample) {
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 microseconds")]
        let seconds = value as f64 / SUM_UNITS;
        writeln!(text, "{sample} {seconds:?}")
    } else {
        writeln!(text, "{sample} {value}")
    };
}

enum Line<'a> {
    /// A sample that only rises.
    Count {
        sample: &'a str,
        value: u64,
    },
    Type {
        text: &'a str,
        family: &'a str,
        counts: bool,
    },
    /// HELP of the next family, or the end.
    Head(&'a str),
    Other(&'a str),
}

fn lines(text: &str) -> impl Iterator<Item = Line<'_>> {
    let mut counts = false;
    text.lines().map(move |line| {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (family, kind) = kind.split_once(' ').unwrap_or((kind, ""));
            counts = matches!(kind, "counter" | "histogram");
            return Line::Type { text: line, family, counts };
        }
        if line.starts_with("# HELP ") || line == "# EOF" {
            return Line::Head(line);
        }
        let sample = line.rsplit_once(' ').filter(|_| counts && !line.starts_with('#'));
        match sample.and_then(|(sample, value)| Some((sample, number(sample, value)?))) {
            Some((sample, value)) => Line::Count { sample, value },
            None => Line::Other(line),
        }
    })
}

fn number(sample: &str, value: &str) -> Option<u64> {
    if !is_sum(sample) {
        return value.parse().ok();
    }
    let seconds = value.parse::<f64>().ok().filter(|s| (0.0..1e12).contains(s))?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within the range above")]
    Some((seconds * SUM_UNITS).round() as u64)
}

fn is_sum(sample: &str) -> bool {
    sample.split('{').next().is_some_and(|name| name.ends_with("_sum"))
}

fn family_of(sample: &str) -> &str {
    let name = sample.split('{').next().unwrap_or(sample);
    ["_total", "_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn earlier_counts_are_added_and_what_is_no_longer_counted_stays() {
        let own = "# HELP a A.\n# TYPE a counter\na_total{x=\"1\"} 2\n# HELP g G.\n# TYPE g gauge\ng 5\n\
                   # HELP h H.\n# TYPE h histogram\nh_sum 0.25\nh_count 1\nh_bucket{le=\"+Inf\"} 1\n# EOF\n";
        let mut before: HashMap<String, HashMap<String, u64>> = HashMap::new();
        for (sample, value) in [
            ("a_total{x=\"1\"}", 40),
            ("a_total{x=\"2\"}", 7),
            ("g", 9),
            ("h_sum", 500_000),
            ("h_count", 2),
            ("h_bucket{le=\"+Inf\"}", 2),
            ("gone_total", 3),
        ] {
            before.entry(family_of(sample).to_owned()).or_default().insert(sample.to_owned(), value);
        }
        let merged = "# HELP a A.\n# TYPE a counter\na_total{x=\"1\"} 42\na_total{x=\"2\"} 7\n# HELP g G.\n# TYPE g gauge\ng 5\n\
                      # HELP h H.\n# TYPE h histogram\nh_sum 0.75\nh_count 3\nh_bucket{le=\"+Inf\"} 3\n# EOF\n";
        assert_eq!(merge(own, &before), merged);
        assert_eq!(merge(own, &HashMap::new()), own);
    }
}
