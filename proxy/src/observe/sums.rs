//! Connections as samples: what the kernel has counted, what user space counts in its stead, and handshakes.
//!
//! Names and labels are the contract's. One family holds both sources, told apart by `source`.

use super::counters::{Count, Counters};
use super::maps::Reading;
use super::sockets::{Endpoint, Facts, UserSums, group_name, suite_name, version_name};
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use rustls::{CipherSuite, NamedGroup, ProtocolVersion};
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tlsplice_ebpf::{BUCKETS, ClassName, ClassSums, EndpointName, Histogram, Sums};

/// Shown bounds of round trips and first bytes: 16 µs to 16 s. All are counted, the rest is in the next that is shown.
const MICROSECOND_BOUNDS: RangeInclusive<u32> = 4..=24;
/// Of durations: 1 ms to 18 hours.
const MILLISECOND_BOUNDS: RangeInclusive<u32> = 0..=26;

/// The suites of the policy; what is not among them comes behind.
const SUITES: [CipherSuite; 9] = [
    CipherSuite::TLS13_AES_256_GCM_SHA384,
    CipherSuite::TLS13_AES_128_GCM_SHA256,
    CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
];
const GROUPS: [NamedGroup; 4] =
    [NamedGroup::X25519MLKEM768, NamedGroup::X25519, NamedGroup::secp256r1, NamedGroup::secp384r1];
/// None, the groups, and any other.
const GROUP_PLACES: usize = GROUPS.len() + 2;
const SUITE_PLACES: usize = SUITES.len() + 1;

/// Complete handshakes of one worker.
#[derive(Debug)]
pub struct Handshakes {
    by: [[[Count; 2]; GROUP_PLACES]; SUITE_PLACES],
    microseconds: Count,
    buckets: [Count; BUCKETS],
}

impl Default for Handshakes {
    fn default() -> Self {
        Self {
            by: Default::default(),
            microseconds: Count::default(),
            buckets: std::array::from_fn(|_| Count::default()),
        }
    }
}

impl Handshakes {
    pub fn add(&self, facts: &Facts, took: Duration) {
        let suite = SUITES.iter().position(|suite| *suite == facts.suite).unwrap_or(SUITES.len());
        let group = match facts.group {
            None => 0,
            Some(group) => 1 + GROUPS.iter().position(|g| *g == group).unwrap_or(GROUPS.len()),
        };
        self.by[suite][group][usize::from(facts.resumed)].add(1);
        let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.microseconds.add(microseconds);
        self.buckets[bucket(microseconds)].add(1);
    }
}

/// As the eBPF program finds it: values up to 2^n.
fn bucket(value: u64) -> usize {
    let bits = u64::BITS - value.saturating_sub(1).leading_zeros();
    usize::try_from(bits).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// Handshakes of all workers.
pub fn handshakes(to: &mut DescriptorEncoder<'_>, workers: &[Arc<Counters>], failed: u64) -> fmt::Result {
    let mut family =
        to.encode_descriptor("tlsplice_handshakes", "TLS handshakes, by what they gave", None, MetricType::Counter)?;
    for suite in 0..SUITE_PLACES {
        for group in 0..GROUP_PLACES {
            for resumed in 0..2 {
                let n = workers.iter().map(|w| w.handshakes_by.by[suite][group][resumed].get()).sum::<u64>();
                if n == 0 {
                    continue;
                }
                let name = SUITES.get(suite).map_or_else(|| "other".to_owned(), |suite| suite_name(*suite));
                let version = if suite < 3 { ProtocolVersion::TLSv1_3 } else { ProtocolVersion::TLSv1_2 };
                let group = match group.checked_sub(1) {
                    None => "",
                    Some(n) => GROUPS.get(n).map_or("other", |group| group_name(Some(*group))),
                };
                let labels = [
                    ("result", "ok"),
                    ("version", version_name(version)),
                    ("suite", &name),
                    ("group", group),
                    ("resumed", if resumed == 1 { "yes" } else { "no" }),
                ];
                ConstCounter::new(n).encode(family.encode_family(&labels)?)?;
            }
        }
    }
    let none = [("result", "failed"), ("version", ""), ("suite", ""), ("group", ""), ("resumed", "")];
    ConstCounter::new(failed).encode(family.encode_family(&none)?)?;
    let mut took = Histogram { sum: 0, buckets: [0; BUCKETS] };
    for worker in workers {
        took.sum += worker.handshakes_by.microseconds.get();
        for (to, n) in took.buckets.iter_mut().zip(&worker.handshakes_by.buckets) {
            *to += n.get();
        }
    }
    let help = "Time from the accept to the end of a complete handshake";
    let mut family = to.encode_descriptor("tlsplice_handshake_duration_seconds", help, None, MetricType::Histogram)?;
    Bounded { histogram: &took, unit: 1e-6, shown: MICROSECOND_BOUNDS }.encode(family.encode_family(&NO_LABELS)?)
}

const NO_LABELS: [(&str, &str); 0] = [];

/// A log2 histogram in units of `unit` seconds.
struct Bounded<'a> {
    histogram: &'a Histogram,
    unit: f64,
    shown: RangeInclusive<u32>,
}

impl EncodeMetric for Bounded<'_> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let mut shown = Vec::new();
        let mut pending = 0;
        for (n, count) in (0..).zip(self.histogram.buckets) {
            pending += count;
            if self.shown.contains(&n) {
                shown.push((f64::from(2_u32.pow(n)) * self.unit, pending));
                pending = 0;
            }
        }
        shown.push((f64::MAX, pending));
        let count = self.histogram.buckets.iter().sum();
        // Exact up to 2^53 units.
        #[expect(clippy::cast_precision_loss, reason = "a sum of times")]
        let sum = self.histogram.sum as f64 * self.unit;
        encoder.encode_histogram::<[(&str, &str); 0]>(sum, count, &shown, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// A counter's name, its help, and where its value is.
type Counter<S> = (&'static str, &'static str, fn(&S) -> u64);

/// A peer's counts, whoever counts.
struct Row {
    name: EndpointName,
    source: &'static str,
    sums: Sums,
    /// The kernel knows more than user space does.
    has_tcp: bool,
}

impl Row {
    fn labels(&self) -> [(&'static str, String); 5] {
        let EndpointName { side, listener, upstream, server } = &self.name;
        [
            ("side", side.as_str().to_owned()),
            ("listener", listener.as_str().to_owned()),
            ("upstream", upstream.as_str().to_owned()),
            ("server", server.as_str().to_owned()),
            ("source", self.source.to_owned()),
        ]
    }
}

/// Everything by listener, server and what handshakes gave.
pub fn connections(to: &mut DescriptorEncoder<'_>, workers: &[Arc<Counters>], kernel: Option<&Reading>) -> fmt::Result {
    let rows = rows(workers, kernel);
    let counters: [Counter<Sums>; 3] = [
        ("tlsplice_connections_opened", "Connections established", |s| s.opened),
        ("tlsplice_connections_closed", "Connections that are over", |s| s.closed),
        ("tlsplice_connects_failed", "Connects to a server that came to nothing", |s| s.refused),
    ];
    for (name, help, value) in counters {
        let mut family = to.encode_descriptor(name, help, None, MetricType::Counter)?;
        for row in &rows {
            ConstCounter::new(value(&row.sums)).encode(family.encode_family(&row.labels())?)?;
        }
    }
    let mut family =
        to.encode_descriptor("tlsplice_connections_live", "Connections that are open", None, MetricType::Gauge)?;
    for row in &rows {
        let live = row.sums.opened.wrapping_sub(row.sums.closed).cast_signed();
        ConstGauge::new(live.max(0)).encode(family.encode_family(&row.labels())?)?;
    }
    let help =
        "Payload of TCP, to the byte, with TLS records on the client's side; by user space: plaintext, at the end";
    let mut family = to.encode_descriptor("tlsplice_bytes", help, None, MetricType::Counter)?;
    for row in &rows {
        for (direction, n) in [("in", row.sums.bytes_in), ("out", row.sums.bytes_out)] {
            let labels: Vec<_> = row.labels().into_iter().chain([("direction", direction.to_owned())]).collect();
            ConstCounter::new(n).encode(family.encode_family(&labels)?)?;
        }
    }
    let Some(kernel) = kernel else { return Ok(()) };
    runs(to, kernel)?;
    tcp(to, &rows)?;
    classes(to, &kernel.classes)
}

fn rows(workers: &[Arc<Counters>], kernel: Option<&Reading>) -> Vec<Row> {
    let of_kernel = kernel.into_iter().flat_map(|reading| &reading.endpoints);
    let mut rows: Vec<Row> = of_kernel
        .filter(|(name, sums)| name.side.as_str() != "other" || sums.opened > 0)
        .map(|(name, sums)| Row { name: *name, source: "kernel", sums: *sums, has_tcp: true })
        .collect();
    for worker in workers {
        let endpoints = worker.user_endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        for (endpoint, sums) in endpoints.iter() {
            add_user(&mut rows, endpoint, sums);
        }
    }
    rows.sort_by_key(|row| row.labels());
    rows
}

fn add_user(rows: &mut Vec<Row>, endpoint: &Endpoint, sums: &UserSums) {
    let name = endpoint.name();
    let at = rows.iter().position(|row| row.name == name && !row.has_tcp).unwrap_or_else(|| {
        rows.push(Row { name, source: "user", sums: super::maps::ZERO_SUMS, has_tcp: false });
        rows.len() - 1
    });
    let to = &mut rows[at].sums;
    to.opened += sums.opened.get();
    to.closed += sums.closed.get();
    to.refused += sums.refused.get();
    to.bytes_in += sums.bytes_in.get();
    to.bytes_out += sums.bytes_out.get();
}

/// What counting costs, while kernel.bpf_stats_enabled is 1.
fn runs(to: &mut DescriptorEncoder<'_>, kernel: &Reading) -> fmt::Result {
    if kernel.runs.count == 0 {
        return Ok(());
    }
    let help = "Runs of the eBPF program since it was loaded";
    let family = to.encode_descriptor("tlsplice_ebpf_runs", help, None, MetricType::Counter)?;
    ConstCounter::new(kernel.runs.count).encode(family)?;
    let help = "Time in the eBPF program since it was loaded";
    let family = to.encode_descriptor("tlsplice_ebpf_run_seconds", help, None, MetricType::Counter)?;
    #[expect(clippy::cast_precision_loss, reason = "a sum of times")]
    let seconds = kernel.runs.nanoseconds as f64 * 1e-9;
    ConstCounter::new(seconds).encode(family)
}

/// What only the kernel sees.
fn tcp(to: &mut DescriptorEncoder<'_>, rows: &[Row]) -> fmt::Result {
    let rows = || rows.iter().filter(|row| row.has_tcp);
    let counters: [Counter<Sums>; 2] = [
        ("tlsplice_connections_reset", "Connections that ended otherwise than by both sides' FIN", |s| s.reset),
        ("tlsplice_retransmits", "Segments sent again", |s| s.retransmits),
    ];
    for (name, help, value) in counters {
        let mut family = to.encode_descriptor(name, help, None, MetricType::Counter)?;
        for row in rows() {
            ConstCounter::new(value(&row.sums)).encode(family.encode_family(&row.labels())?)?;
        }
    }
    type Part = fn(&Sums) -> &Histogram;
    let histograms: [(&str, &str, f64, RangeInclusive<u32>, Part); 3] = [
        ("tlsplice_connection_duration_seconds", "From the opening to the end", 1e-3, MILLISECOND_BOUNDS, |s| {
            &s.duration
        }),
        (
            "tlsplice_rtt_seconds",
            "Smoothed round trips, sampled while there is traffic",
            1e-6,
            MICROSECOND_BOUNDS,
            |s| &s.rtt,
        ),
        (
            "tlsplice_first_ack_seconds",
            "From the opening to the first acknowledged byte",
            1e-6,
            MICROSECOND_BOUNDS,
            |s| &s.first_ack,
        ),
    ];
    for (name, help, unit, shown, part) in histograms {
        let mut family = to.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for row in rows() {
            let bounded = Bounded { histogram: part(&row.sums), unit, shown: shown.clone() };
            bounded.encode(family.encode_family(&row.labels())?)?;
        }
    }
    Ok(())
}

fn classes(to: &mut DescriptorEncoder<'_>, classes: &[(ClassName, ClassSums)]) -> fmt::Result {
    // A class may have connections that were opened in another.
    let used = || classes.iter().filter(|(_, sums)| *sums != super::maps::ZERO_CLASS);
    let counters: [Counter<ClassSums>; 3] = [
        ("tlsplice_tls_connections_opened", "Client connections, by what the handshake gave first", |s| s.opened),
        ("tlsplice_tls_connections_closed", "Client connections that are over, by what they were last", |s| s.closed),
        ("tlsplice_tls_retransmits", "Segments sent again to clients", |s| s.retransmits),
    ];
    for (name, help, value) in counters {
        let mut family = to.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (class, sums) in used() {
            ConstCounter::new(value(sums)).encode(family.encode_family(&class_labels(class))?)?;
        }
    }
    let help = "Client connections that are open, by what they are now";
    let mut family = to.encode_descriptor("tlsplice_tls_connections_live", help, None, MetricType::Gauge)?;
    for (class, sums) in used() {
        ConstGauge::new(sums.live.cast_signed().max(0)).encode(family.encode_family(&class_labels(class))?)?;
    }
    let help = "Payload of clients' TCP, by what the handshake gave";
    let mut family = to.encode_descriptor("tlsplice_tls_bytes", help, None, MetricType::Counter)?;
    for (class, sums) in used() {
        for (direction, n) in [("in", sums.bytes_in), ("out", sums.bytes_out)] {
            let labels: Vec<_> = class_labels(class).into_iter().chain([("direction", direction)]).collect();
            ConstCounter::new(n).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn class_labels(class: &ClassName) -> [(&'static str, &str); 6] {
    [
        ("server_name", class.server_name.as_str()),
        ("version", class.version.as_str()),
        ("suite", class.suite.as_str()),
        ("group", class.group.as_str()),
        ("resumed", class.resumed.as_str()),
        ("offload", class.offload.as_str()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_takes_values_up_to_its_power_of_two() {
        assert_eq!([0, 1, 2, 3, 4, 5, 1024, 1025].map(bucket), [0, 0, 1, 2, 2, 3, 10, 11]);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }
}
