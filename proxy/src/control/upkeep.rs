//! What goes on while it serves: certificates are looked at and replaced, ticket keys are read and rotated.
//!
//!   poll, with jitter ─▶ hash ─same twice, and new─▶ judge ─▶ no name lost, no grade lost ─▶ snapshot ─▶ last good copy
//!
//! No notification is trusted, since network file systems have none. Whatever is missing, half-written or wrong leaves
//! what is served as it is, is said once, and is judged again at each look, for its time may come. Each look runs on a
//! thread of its own, so a hanging share holds up nothing.

use super::staples::{self, Answers};
use super::start::Terminator;
use crate::config::{Config, Ocsp};
use crate::exit::Failure;
use crate::tls::certificates::{Certificates, Faults};
use crate::tls::grade::{self, Grade};
use crate::tls::policy;
use crate::tls::source::Source;
use crate::tls::tickets::Ticketer;
use crate::tls::tickets::folder::Shared;
use crate::worker::{Command, Snapshot};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinHandle;

/// What has changed is looked at again after this, or after a poll if that is sooner: it may still be being written.
const SETTLE: Duration = Duration::from_secs(1);
/// A look that takes longer is said: the share hangs.
pub(super) const SLOW_LOOK: Duration = Duration::from_secs(30);
/// How long a start waits for another node that is just writing the first keys.
const FIRST_KEYS: Duration = Duration::from_secs(2);

/// What is known about the files.
#[derive(Default)]
pub(super) struct Watched {
    /// The content that is served.
    served: Option<[u8; 32]>,
    /// Seen once, and new.
    candidate: Option<[u8; 32]>,
    /// Seen twice and said already, with its reason.
    refused: Option<([u8; 32], String)>,
}

/// What a look has found.
pub(super) struct Look {
    source: Source,
    /// Beside what is not served yet.
    answers: Answers,
}

impl Watched {
    /// `None`: what is served came from the last good copy, or from no file.
    pub(super) fn serving(source: Option<&Source>) -> Self {
        Self { served: source.map(|source| source.hash), ..Self::default() }
    }
}

/// A wait that differs by up to a fifth, so that a fleet does not look all at once.
pub(super) fn jittered(wait: Duration) -> Duration {
    let mut random = [0; 2];
    // Without randomness the wait is merely exact.
    let _ = aws_lc_rs::rand::fill(&mut random);
    wait.mul_f64(0.8 + 0.4 * f64::from(u16::from_be_bytes(random)) / f64::from(u16::MAX))
}

impl Terminator {
    /// When to look next.
    pub(super) fn next_look(&self) -> Duration {
        let poll = self.config.tls.poll;
        if self.watched.candidate.is_some() { poll.min(SETTLE) } else { jittered(poll) }
    }

    /// Reads the files on a thread of its own.
    pub(super) fn look(&self) -> JoinHandle<Look> {
        let (paths, served) = (self.config.tls.certificates.clone(), self.watched.served);
        let wants_staples = self.config.tls.ocsp != Ocsp::Off;
        tokio::task::spawn_blocking(move || {
            let source = Source::read(&paths);
            let is_new = wants_staples && Some(source.hash) != served;
            let answers = if is_new { staples::beside(source.paths()) } else { Answers::new() };
            Look { source, answers }
        })
    }

    /// Decides about what a look has found.
    pub(super) fn looked(&mut self, look: &Look) {
        let hash = look.source.hash;
        if Some(hash) == self.watched.served {
            if self.watched.refused.take().is_some() {
                tracing::info!("certificates: the files are again what is served");
            }
            self.watched.candidate = None;
            return;
        }
        let is_known = self.watched.refused.as_ref().is_some_and(|(refused, _)| *refused == hash);
        if !is_known && Some(hash) != self.watched.candidate {
            self.watched.candidate = Some(hash);
            return;
        }
        self.watched.candidate = None;
        match self.replace(look) {
            Ok(names) => {
                self.watched.served = Some(hash);
                self.watched.refused = None;
                tracing::info!(names, "certificates: replaced");
            }
            Err(reason) => {
                if !self.watched.refused.as_ref().is_some_and(|(_, said)| is_known && *said == reason) {
                    tracing::error!(reason, "certificates: the new ones are refused, the old ones go on");
                }
                self.watched.refused = Some((hash, reason));
            }
        }
    }

    /// Says which names are served now.
    fn replace(&mut self, Look { source, answers }: &Look) -> Result<String, String> {
        let certificates =
            Certificates::of_source(source, &self.config.tls).map_err(|faults: Faults| faults.to_string())?;
        if let Some(name) = self.certificates.names().find(|name| !certificates.resolver().covers(name)) {
            return Err(format!("{name} would have no certificate any more; if that is meant: SIGHUP"));
        }
        let grade = self.refuse_lower_grade(&self.config, &certificates)?;
        let names = certificates.names().collect::<Vec<_>>().join(" ");
        let config = Arc::clone(&self.config);
        let certificates = self.staples.put_to(certificates, answers, &config.tls);
        self.serve(certificates).map_err(|e| e.to_string())?;
        self.grade = grade;
        self.keep(source);
        Ok(names)
    }

    /// The grade of a candidate, if it is not below the running one.
    pub(super) fn refuse_lower_grade(&self, config: &Config, certificates: &Certificates) -> Result<Grade, String> {
        let report = grade::configuration::grade(config, certificates, &[]);
        if report.grade.is_below(self.grade) {
            let why = report.reasons().join("; ");
            return Err(format!(
                "the grade would fall from {} to {}: {why}; if that is meant, restart",
                self.grade, report.grade
            ));
        }
        Ok(report.grade)
    }

    /// Gives the workers these certificates, with everything else as it is.
    pub(super) fn serve(&mut self, certificates: Certificates) -> Result<(), Failure> {
        let tls = policy::server_config(&self.config.tls, certificates.resolver(), &self.resumption)
            .map_err(|e| Failure::Usage(format!("[tls]: {e}")))?;
        self.figures.set(&self.config, &certificates);
        self.certificates = certificates;
        let snapshot = Snapshot::new(Arc::clone(&self.config), tls);
        for worker in &self.workers {
            worker.send(Command::Reload { snapshot: snapshot.clone(), open: Vec::new() });
        }
        Ok(())
    }

    /// Keeps the last good copy, if the configuration has a place for it.
    pub(super) fn keep(&self, source: &Source) {
        keep(&self.config.tls, source);
        for warning in self.certificates.warnings() {
            tracing::warn!(file = %warning.file.display(), "certificates: {}", warning.message);
        }
    }
}

/// Keeps the last good copy, if the configuration has a place for it.
pub(super) fn keep(tls: &crate::config::Tls, source: &Source) {
    if let Some(folder) = &tls.last_good
        && let Err(error) = source.keep(folder)
    {
        tracing::warn!(%error, folder = %folder.display(), "certificates: no last good copy could be kept");
    }
}

/// Ticket keys of the fleet.
pub struct Tickets {
    shared: Shared,
    ticketer: Arc<Ticketer>,
    gauges: Arc<TicketGauges>,
}

/// For the metrics.
#[derive(Debug, Default)]
pub struct TicketGauges {
    pub generation: AtomicU64,
    pub leads: AtomicU64,
    pub skew_ms: AtomicI64,
}

impl Tickets {
    /// Reads the keys, or writes the first ones. Where that fails tickets are not sealed until a later poll succeeds.
    ///
    /// # Errors
    /// The random source failed.
    pub fn start(tls: &crate::config::Tls) -> Result<Option<Self>, Failure> {
        let Some(folder) = tls.tickets.clone() else { return Ok(None) };
        let shared = Shared::new(folder, tls.ticket_lifetime)
            .map_err(|e| Failure::Host(format!("make keys for session tickets: {e}")))?;
        let ticketer = Arc::new(Ticketer::new(tls.ticket_lifetime));
        let mut tickets = Self { shared, ticketer, gauges: Arc::default() };
        let deadline = std::time::Instant::now() + FIRST_KEYS;
        while let Err(reason) = tickets.poll() {
            if std::time::Instant::now() > deadline || !reason.contains("another node") {
                tracing::error!(reason, "tickets: no keys yet, every handshake is a full one");
                break;
            }
            std::thread::sleep(FIRST_KEYS / 40);
        }
        Ok(Some(tickets))
    }

    pub fn ticketer(&self) -> Arc<Ticketer> {
        Arc::clone(&self.ticketer)
    }

    pub fn gauges(&self) -> Arc<TicketGauges> {
        Arc::clone(&self.gauges)
    }

    fn poll(&mut self) -> Result<(), String> {
        let polled = self.shared.poll();
        self.ticketer.destroy_old();
        let polled = polled?;
        let led = self.gauges.leads.swap(polled.leads.into(), Ordering::Relaxed) == 1;
        if polled.leads != led {
            tracing::info!(leads = polled.leads, generation = polled.generation, "tickets: the lead has changed");
        }
        self.gauges.generation.store(polled.generation, Ordering::Relaxed);
        self.gauges.skew_ms.store(polled.skew.milliseconds, Ordering::Relaxed);
        self.ticketer.set(polled.epochs, polled.skew);
        Ok(())
    }

    /// Polls until the runtime ends. The lease is given back when `self` is dropped.
    pub(super) async fn run(self) {
        let interval = self.shared.poll_interval();
        let mut tickets = self;
        let mut said: Option<String> = None;
        loop {
            tokio::time::sleep(jittered(interval)).await;
            let task = tokio::task::spawn_blocking(move || {
                let polled = tickets.poll();
                (tickets, polled)
            });
            let Ok((back, polled)) = task.await else { return };
            tickets = back;
            match polled {
                Ok(()) => {
                    if said.take().is_some() {
                        tracing::info!("tickets: the folder is back");
                    }
                }
                Err(reason) if said.as_ref() != Some(&reason) => {
                    tracing::error!(reason, "tickets: the keys that are known stay");
                    said = Some(reason);
                }
                Err(_) => {}
            }
        }
    }
}

impl Drop for Tickets {
    fn drop(&mut self) {
        self.shared.resign();
    }
}
