//! SIGHUP: the file and the certificates are read again, and the workers get a new snapshot.
//!
//!   read ─▶ kernel still enough? ─▶ bind what is new ─▶ snapshot to every worker ─▶ log level
//!
//! All or nothing: up to the snapshot every failure leaves the old configuration serving. Sockets of an address that
//! stays are not touched; only its settings change. Connections keep what they started with.

use super::notify::{State, notify};
use super::staples::{self, Answers, Staples};
use super::start::{Loaded, Terminator, read_certificates, read_config, refuse_if_required, warn_of_v4};
use super::upkeep::Watched;
use crate::accept::SYN_GRACE;
use crate::config::{Config, Listener, Ocsp};
use crate::exit::Failure;
use crate::listen::{self, BindError};
use crate::tls::policy;
use crate::worker::{Bound, Command, Snapshot};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often an address in use is tried again.
const BIND_RETRY: Duration = Duration::from_millis(20);
/// A listener that closes takes this much longer than its last SYN may, at most.
const CLOSING_SLACK: Duration = Duration::from_millis(500);

const ONLY_BY_A_RESTART: &str = "one port changes its address only by a restart";

/// What a reload has read.
pub(super) struct Fresh {
    config: Config,
    loaded: Loaded,
    answers: Answers,
}

impl Fresh {
    /// Blocks on the file system.
    pub(super) fn read(file: &Path) -> Result<Self, Failure> {
        let config = read_config(file)?;
        let loaded = read_certificates(&config)?;
        if let Some(faults) = &loaded.instead_of {
            // What is served is as good as the copy.
            return Err(Failure::Usage(format!("the certificates cannot be served:\n{faults}")));
        }
        let answers = staples::beside_all(&loaded.certificates, config.tls.ocsp);
        Ok(Self { config, loaded, answers })
    }
}

impl Terminator {
    pub(super) async fn reload(&mut self, read: Result<Fresh, Failure>) {
        let applied = match read {
            Ok(fresh) => self.apply(fresh).await,
            Err(error) => Err(error),
        };
        match applied {
            Ok(()) => {
                self.figures.reloaded(true);
                tracing::info!(listeners = self.config.listeners.len(), "reloaded");
            }
            Err(error) => {
                self.figures.reloaded(false);
                tracing::error!(%error, "reload: refused, the old configuration goes on serving");
            }
        }
        notify(State::Ready);
    }

    async fn apply(&mut self, fresh: Fresh) -> Result<(), Failure> {
        let Fresh { mut config, loaded: Loaded { certificates, source, .. }, answers } = fresh;
        refuse_if_required(&config, &self.kernel)?;
        let grade = self.refuse_lower_grade(&config, &certificates).map_err(Failure::Usage)?;
        let certificates = self.staples.put_to(certificates, &answers, &config.tls);
        let tls = policy::server_config(&config.tls, certificates.resolver(), &self.resumption)
            .map_err(|e| Failure::Usage(format!("[tls]: {e}")))?;
        refuse_if_v4_changes(&self.config, &config)?;
        let new = added(&self.config, &config);
        let open = self.bind(&new, &config.listeners).await.map_err(|e| self.refused(&e))?;
        for setting in keep_fixed(&self.config, &mut config) {
            tracing::warn!(setting, "reload: changes only by a restart; the old value stays");
        }
        self.log.set_level(config.log.level);
        warn_of_v4(&new, &config.listeners);
        self.figures.set(&config, &certificates);
        self.config = Arc::new(config);
        (self.certificates, self.grade) = (certificates, grade);
        if self.config.tls.ocsp == Ocsp::Off {
            // Nobody looks whether they are still good.
            self.staples = Staples::default();
        }
        self.watched = Watched::serving(source.as_ref());
        if let Some(source) = source {
            self.keep(&source);
        }
        let snapshot = Snapshot::new(Arc::clone(&self.config), tls);
        for (worker, open) in self.workers.iter().zip(open) {
            worker.send(Command::Reload { snapshot: snapshot.clone(), open });
        }
        Ok(())
    }

    /// An address that a reload has just taken away may still be closing: that is waited for.
    async fn bind(&self, new: &[Arc<Listener>], all: &[Arc<Listener>]) -> Result<Vec<Vec<Bound>>, BindError> {
        let until = Instant::now() + SYN_GRACE + CLOSING_SLACK;
        loop {
            match listen::bind(new, all, self.workers.len(), self.counting.maps().map(AsRef::as_ref)) {
                Err(e) if e.is_in_use() && Instant::now() < until => {
                    tokio::time::sleep(BIND_RETRY).await;
                }
                result => return result,
            }
        }
    }

    /// The port may be one of our own: of a listener that stays, or of one that is still closing.
    fn refused(&self, error: &BindError) -> Failure {
        let port = error.address.port();
        let ours = self.config.listeners.iter().find(|l| l.address.port() == port);
        let hint = ours.map_or(String::new(), |listener| {
            format!("; this process has {} itself, and {ONLY_BY_A_RESTART}", listener.address)
        });
        Failure::Host(format!("{error}{hint}"))
    }
}

/// A socket of `[::]` takes IPv4 or not from its bind on, so one that stays could not take over what the file moves to it.
fn refuse_if_v4_changes(old: &Config, new: &Config) -> Result<(), Failure> {
    let changes = |address| listen::is_v6only(address, &old.listeners) != listen::is_v6only(address, &new.listeners);
    let stays = |address: &SocketAddr| old.listeners.iter().any(|other| other.address == *address);
    match new.listeners.iter().map(|listener| listener.address).filter(stays).find(|address| changes(*address)) {
        None => Ok(()),
        Some(address) => {
            let now = if listen::is_v6only(address, &old.listeners) { "without" } else { "with" };
            Err(Failure::Host(format!("this process has {address} {now} IPv4, and {ONLY_BY_A_RESTART}")))
        }
    }
}

/// Listeners whose address is new.
fn added(old: &Config, new: &Config) -> Vec<Arc<Listener>> {
    let is_new = |listener: &&Arc<Listener>| old.listeners.iter().all(|other| other.address != listener.address);
    new.listeners.iter().filter(is_new).cloned().collect()
}

/// Puts back what cannot change while the process runs, and names it.
fn keep_fixed(old: &Config, new: &mut Config) -> Vec<&'static str> {
    fn keep<T: PartialEq + Clone>(old: &T, new: &mut T, name: &'static str) -> Option<&'static str> {
        if old == new {
            return None;
        }
        *new = old.clone();
        Some(name)
    }
    let (server, log, tls, metrics) = (&mut new.server, &mut new.log, &mut new.tls, &mut new.metrics);
    [
        keep(&old.server.workers, &mut server.workers, "server.workers"),
        keep(&old.server.user, &mut server.user, "server.user"),
        keep(&old.server.admin, &mut server.admin, "server.admin"),
        keep(&old.server.splice, &mut server.splice, "server.splice"),
        keep(&old.metrics.kernel, &mut metrics.kernel, "metrics.kernel"),
        keep(&old.metrics.pins, &mut metrics.pins, "metrics.pins"),
        keep(&old.log.format, &mut log.format, "log.format"),
        keep(&old.tls.tickets, &mut tls.tickets, "tls.tickets"),
        keep(&old.tls.ticket_lifetime, &mut tls.ticket_lifetime, "tls.ticket_lifetime"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SpliceMode;

    const FILE: &str = r#"
        [tls]
        certificates = ["/tls"]
        [[listener]]
        address = "127.0.0.1:1443"
        upstream = "app"
        [[listener]]
        address = "127.0.0.1:2443"
        upstream = "app"
        [[upstream]]
        name = "app"
        servers = ["127.0.0.1:8080"]
    "#;

    fn config(text: &str) -> Config {
        Config::parse(Path::new("tlsplice.toml"), text).expect("valid")
    }

    #[test]
    fn only_an_address_that_is_new_is_bound() {
        let (old, new) = (config(FILE), config(&FILE.replace("2443", "3443")));
        let added: Vec<u16> = added(&old, &new).iter().map(|l| l.address.port()).collect();
        assert_eq!(added, [3443]);
    }

    #[test]
    fn any_v6_that_stays_neither_gains_nor_loses_v4() {
        let any = FILE.replace("127.0.0.1:1443", "[::]:443");
        let (alone, beside) = (config(&any), config(&any.replace("127.0.0.1:2443", "0.0.0.0:443")));
        for (old, new, now) in [(&alone, &beside, "with IPv4"), (&beside, &alone, "without IPv4")] {
            let refused = refuse_if_v4_changes(old, new).expect_err("it cannot be done").to_string();
            assert!(refused.contains(now) && refused.contains(ONLY_BY_A_RESTART), "{refused}");
        }
        assert!(refuse_if_v4_changes(&beside, &beside).is_ok());
        // One that is new is bound as the file says.
        assert!(refuse_if_v4_changes(&config(FILE), &beside).is_ok());
    }

    #[test]
    fn what_cannot_change_is_put_back_and_named() {
        let old = config(FILE);
        let text = format!("[server]\nsplice = \"ring\"\nadmin = \"127.0.0.1:1\"\ndrain_timeout = \"1s\"\n{FILE}");
        let mut new = config(&text);
        assert_eq!(keep_fixed(&old, &mut new), ["server.admin", "server.splice"]);
        assert_eq!((new.server.splice, new.server.admin), (SpliceMode::Auto, None));
        assert_eq!(new.server.drain_timeout.as_secs(), 1);
    }
}
