//! What control knows: limits, certificates, reloads, and the kernel's own count of TLS sockets.

use super::counters::Count;
use crate::config::Config;
use crate::tls::certificates::Certificates;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

/// The configuration that is in force, as figures.
#[derive(Debug, Default)]
pub struct Figures {
    reloads_done: Count,
    reloads_refused: Count,
    now: Mutex<Now>,
}

/// Main name and kind of key.
type Labels = (String, String);

#[derive(Debug, Default)]
struct Now {
    limits: Vec<(&'static str, i64)>,
    /// The end of a certificate's time in seconds since 1970.
    certificates: BTreeMap<Labels, i64>,
}

impl Figures {
    /// What is in force from now on.
    pub fn set(&self, config: &Config, certificates: &Certificates) {
        let whole = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let limits = &config.limits;
        let now = Now {
            limits: vec![
                ("connections", whole(limits.connections)),
                ("send_memory_bytes", whole(limits.send_memory_bytes)),
                ("pipe_memory_bytes", whole(limits.pipe_memory_bytes)),
                ("records_per_key", i64::try_from(limits.records_per_key).unwrap_or(i64::MAX)),
                ("workers", whole(config.server.workers.get())),
            ],
            certificates: earliest(certificates.served().iter().map(|one| {
                let name = one.names.first().cloned().unwrap_or_default();
                ((name, one.key_kind.clone()), one.not_after_seconds)
            })),
        };
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }

    pub fn reloaded(&self, done: bool) {
        if done { self.reloads_done.add(1) } else { self.reloads_refused.add(1) }
    }

    pub(super) fn encode(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut family = to.encode_descriptor("tlsplice_reloads", "Reloads, by result", None, MetricType::Counter)?;
        for (result, count) in [("done", &self.reloads_done), ("refused", &self.reloads_refused)] {
            ConstCounter::new(count.get()).encode(family.encode_family(&[("result", result)])?)?;
        }
        let now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let mut family = to.encode_descriptor("tlsplice_limit", "Limits that are in force", None, MetricType::Gauge)?;
        for (name, value) in &now.limits {
            ConstGauge::new(*value).encode(family.encode_family(&[("name", *name)])?)?;
        }
        let (name, help) = ("tlsplice_certificate_expiry_timestamp_seconds", "When a certificate's time is over");
        let mut family = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for ((name, key), end) in &now.certificates {
            ConstGauge::new(*end).encode(family.encode_family(&[("name", name.as_str()), ("key", key.as_str())])?)?;
        }
        let Some(kernel) = std::fs::read_to_string("/proc/net/tls_stat").ok() else { return Ok(()) };
        let help = "The kernel's own counts of TLS, of this network namespace";
        let mut family = to.encode_descriptor("tlsplice_kernel_tls", help, None, MetricType::Gauge)?;
        for (name, value) in kernel.lines().filter_map(tls_stat) {
            ConstGauge::new(value).encode(family.encode_family(&[("name", name)])?)?;
        }
        Ok(())
    }
}

/// Certificates may share their labels, and a sample may be there once: the end that comes first is what matters.
fn earliest(ends: impl Iterator<Item = (Labels, i64)>) -> BTreeMap<Labels, i64> {
    let mut earliest = BTreeMap::new();
    for (labels, end) in ends {
        earliest.entry(labels).and_modify(|first: &mut i64| *first = end.min(*first)).or_insert(end);
    }
    earliest
}

/// `TlsTxSw    12`
fn tls_stat(line: &str) -> Option<(&str, i64)> {
    let mut words = line.split_whitespace();
    Some((words.next()?, words.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_with_the_same_labels_are_one_sample_with_the_end_that_comes_first() {
        let labels = |name: &str, key: &str| (name.to_owned(), key.to_owned());
        let (ecdsa, rsa) = (labels("a.example", "ECDSA P-256"), labels("a.example", "RSA 2048"));
        let ends = [(ecdsa.clone(), 20), (rsa.clone(), 40), (ecdsa.clone(), 10), (ecdsa.clone(), 30)];
        assert_eq!(earliest(ends.into_iter()), BTreeMap::from([(ecdsa, 10), (rsa, 40)]));
    }
}
