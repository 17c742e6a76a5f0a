//! Everything that is counted, as one text, added up at the moment of a scrape.
//!
//!   workers' counters ─▶ + what earlier processes have kept ─┐
//!   pinned maps of the kernel ───────────────────────────────┴▶ OpenMetrics, or the Prometheus text format

use super::alerts;
use super::counters::{Class, Count, Counters, Decline, End, Label};
use super::figures::Figures;
use super::kept::Kept;
use super::log::DroppedLines;
use super::maps::{Maps, Reading};
use super::sums;
use crate::control::upkeep::TicketGauges;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::{MetricType, info::Info};
use prometheus_client::registry::Registry;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Everything that a scrape shows.
#[derive(Debug)]
pub struct Metrics {
    workers: Vec<Arc<Counters>>,
    dropped_lines: Option<DroppedLines>,
    kernel: Option<Arc<Maps>>,
    kept: Option<Kept>,
    figures: Arc<Figures>,
    tickets: Option<Arc<TicketGauges>>,
}

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("write the metrics: {0}")]
    Format(#[from] fmt::Error),
    #[error("read the pinned maps: {0}")]
    Maps(#[from] io::Error),
}

impl Metrics {
    /// `kernel`: the pinned maps, where the kernel counts.
    pub fn new(
        workers: Vec<Arc<Counters>>,
        dropped_lines: Option<DroppedLines>,
        kernel: Option<Arc<Maps>>,
        figures: Arc<Figures>,
        tickets: Option<Arc<TicketGauges>>,
    ) -> Self {
        let kept = kernel.as_ref().and_then(|maps| match Kept::new(Arc::clone(maps)) {
            Ok(kept) => Some(kept),
            Err(error) => {
                tracing::warn!(%error, "the counts of earlier processes cannot be read: user space begins at zero");
                None
            }
        });
        Self { workers, dropped_lines, kernel, kept, figures, tickets }
    }

    /// OpenMetrics.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn text(&self) -> Result<String, TextError> {
        let reading = self.kernel.as_ref().map(|maps| maps.read()).transpose()?;
        let text = self.render(reading)?;
        Ok(self.kept.as_ref().map_or_else(|| text.clone(), |kept| kept.with_earlier(&text)))
    }

    /// Keeps what user space has counted, for later processes.
    pub fn keep(&self) {
        let Some(kept) = &self.kept else { return };
        let kept = self.render(None).map_err(TextError::from).and_then(|text| Ok(kept.save(&text)?));
        if let Err(error) = kept {
            tracing::debug!(%error, "counts are not kept");
        }
    }

    fn render(&self, reading: Option<Reading>) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("tlsplice_build", "The running program", version);
        registry.register_collector(Box::new(Workers {
            workers: self.workers.clone(),
            dropped_lines: self.dropped_lines.clone(),
            reading,
            figures: Arc::clone(&self.figures),
            tickets: self.tickets.clone(),
        }));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// Sums over workers. Each worker is the only writer of its own counters, so a sum is never behind by more than what
/// happens while it is read.
#[derive(Debug)]
struct Workers {
    workers: Vec<Arc<Counters>>,
    dropped_lines: Option<DroppedLines>,
    tickets: Option<Arc<TicketGauges>>,
    reading: Option<Reading>,
    figures: Arc<Figures>,
}

type Labels<'a> = &'a [(&'static str, &'static str)];

impl Workers {
    fn sum(&self, count: impl Fn(&Counters) -> &Count) -> u64 {
        // Wrapping: a gauge's words may be taken in the middle of a change.
        self.workers.iter().map(|worker| count(worker).get()).fold(0, u64::wrapping_add)
    }

    fn connections(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        counter(to, "tlsplice_connections_accepted", "Client connections accepted", self.sum(|c| &c.accepted))?;
        sums::connections(to, &self.workers, self.reading.as_ref())?;
        let refused: Labels<'_> = &[("reason", "limit")];
        family(
            to,
            "tlsplice_connections_refused",
            "Client connections closed at once, at limits.connections",
            &[(refused, self.sum(|c| &c.refused_limit))],
        )?;
        let pauses = self.sum(|c| &c.accept_pauses);
        counter(to, "tlsplice_accept_pauses", "Pauses of accept for want of descriptors or memory", pauses)?;
        let ended: Vec<_> =
            End::ALL.iter().map(|how| ([("how", how.name())], self.sum(|c| &c.ended[how.index()]))).collect();
        let ended: Vec<(Labels<'_>, u64)> = ended.iter().map(|(labels, n)| (&labels[..], *n)).collect();
        family(to, "tlsplice_connections_ended", "Client connections that have ended, by how", &ended)
    }

    fn tls(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let failed = self.sum(|c| &c.ended[End::HandshakeFailed.index()])
            + self.sum(|c| &c.ended[End::HandshakeTimeout.index()]);
        sums::handshakes(to, &self.workers, failed)?;
        alerts::encode(to, &self.workers)?;
        let mut offload = vec![([("state", "offloaded"), ("reason", "")], self.sum(|c| &c.offloaded))];
        offload.extend(
            Decline::ALL
                .iter()
                .map(|why| ([("state", "declined"), ("reason", why.name())], self.sum(|c| &c.declined[why.index()]))),
        );
        let offload: Vec<(Labels<'_>, u64)> = offload.iter().map(|(labels, n)| (&labels[..], *n)).collect();
        family(
            to,
            "tlsplice_offload",
            "Connections handed to kernel TLS, and those that were not, by reason",
            &offload,
        )?;
        let (received, sent): (Labels<'_>, Labels<'_>) = (&[("direction", "received")], &[("direction", "sent")]);
        let updates = [(received, self.sum(|c| &c.key_updates_received)), (sent, self.sum(|c| &c.key_updates_sent))];
        family(to, "tlsplice_key_updates", "TLS 1.3 KeyUpdates past the door", &updates)
    }

    fn http(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let requests: Vec<_> =
            Class::ALL.iter().map(|c| ([("status", c.name())], self.sum(|w| &w.requests[c.index()]))).collect();
        let requests: Vec<(Labels<'_>, u64)> = requests.iter().map(|(labels, n)| (&labels[..], *n)).collect();
        family(to, "tlsplice_http_requests", "Requests of mode http and redirect, by what was answered", &requests)?;
        let (new, reused): (Labels<'_>, Labels<'_>) = (&[("state", "new")], &[("state", "reused")]);
        let upstream = [(new, self.sum(|c| &c.upstream_new)), (reused, self.sum(|c| &c.upstream_reused))];
        family(to, "tlsplice_http_upstream_connections", "Upstream connections that requests were sent on", &upstream)
    }

    fn tickets(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Some(tickets) = &self.tickets else { return Ok(()) };
        let generation = tickets.generation.load(Ordering::Relaxed);
        gauge(to, "tlsplice_ticket_keys_generation", "Generation of the fleet's ticket keys", generation)?;
        let leads = tickets.leads.load(Ordering::Relaxed);
        gauge(to, "tlsplice_ticket_keys_leader", "1 if this process rotates them", leads)?;
        let skew = ConstGauge::new(tickets.skew_ms.load(Ordering::Relaxed));
        let (name, help) =
            ("tlsplice_ticket_clock_skew_milliseconds", "Clock of the file server less that of this host");
        skew.encode(to.encode_descriptor(name, help, None, MetricType::Gauge)?)
    }

    fn payload(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        const IN_SPLICED: Labels<'_> = &[("direction", "in"), ("path", "spliced")];
        const IN_COPIED: Labels<'_> = &[("direction", "in"), ("path", "copied")];
        const OUT_SPLICED: Labels<'_> = &[("direction", "out"), ("path", "spliced")];
        const OUT_COPIED: Labels<'_> = &[("direction", "out"), ("path", "copied")];
        let bytes = [
            (IN_SPLICED, self.sum(|c| &c.up_spliced)),
            (IN_COPIED, self.sum(|c| &c.up_copied)),
            (OUT_SPLICED, self.sum(|c| &c.down_spliced)),
            (OUT_COPIED, self.sum(|c| &c.down_copied)),
        ];
        family(to, "tlsplice_payload_bytes", "Plaintext handed on: in is client to upstream", &bytes)?;
        let denied = self.sum(|c| &c.pipe_denied);
        counter(to, "tlsplice_pipe_denied", "Transfers that copied because no pipe was to be had", denied)?;
        gauge(to, "tlsplice_pipe_bytes", "Capacity of all pipes", self.sum(|c| &c.pipe_bytes))
    }
}

impl Collector for Workers {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        self.connections(&mut to)?;
        self.tls(&mut to)?;
        self.http(&mut to)?;
        self.payload(&mut to)?;
        self.tickets(&mut to)?;
        self.figures.encode(&mut to)?;
        let Some(dropped) = &self.dropped_lines else { return Ok(()) };
        counter(&mut to, "tlsplice_log_lines_dropped", "Log lines that nobody read in time", dropped.get())
    }
}

/// One value without labels; the encoder adds `_total` to the name.
fn counter(to: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    ConstCounter::new(value).encode(to.encode_descriptor(name, help, None, MetricType::Counter)?)
}

/// One value for each set of labels.
fn family(to: &mut DescriptorEncoder<'_>, name: &str, help: &str, values: &[(Labels<'_>, u64)]) -> fmt::Result {
    let mut family = to.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in values {
        ConstCounter::new(*value).encode(family.encode_family(labels)?)?;
    }
    Ok(())
}

fn gauge(to: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    let value = ConstGauge::new(i64::try_from(value).unwrap_or(0));
    value.encode(to.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_adds_up_workers_under_the_names_of_the_contract() {
        let (one, two) = (Arc::new(Counters::default()), Arc::new(Counters::default()));
        one.accepted.add(2);
        two.accepted.add(3);
        one.live.add(1);
        one.declined(Decline::NoUlp);
        two.ended(End::Clean);
        two.up_copied.add(7);
        one.pipe_bytes.add(65536);
        let text = Metrics::new(vec![one, two], None, None, Arc::default(), None).text().expect("a string");
        for line in [
            "tlsplice_build_info{version=\"0.1.0\"} 1",
            "tlsplice_connections_accepted_total 5",
            "tlsplice_connections_refused_total{reason=\"limit\"} 0",
            "tlsplice_accept_pauses_total 0",
            "tlsplice_handshakes_total{result=\"failed\",version=\"\",suite=\"\",group=\"\",resumed=\"\"} 0",
            "tlsplice_offload_total{state=\"offloaded\",reason=\"\"} 0",
            "tlsplice_offload_total{state=\"declined\",reason=\"no_ulp\"} 1",
            "tlsplice_connections_ended_total{how=\"clean\"} 1",
            "tlsplice_payload_bytes_total{direction=\"in\",path=\"copied\"} 7",
            "tlsplice_payload_bytes_total{direction=\"out\",path=\"spliced\"} 0",
            "tlsplice_key_updates_total{direction=\"received\"} 0",
            "tlsplice_pipe_denied_total 0",
            "tlsplice_pipe_bytes 65536",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
