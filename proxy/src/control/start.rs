//! From a configuration to a running terminator.
//!
//!   descriptors ─▶ probe ─▶ require ─▶ eBPF ─▶ bind ─▶ root ends ─▶ files still readable? ─▶ log ─▶ workers
//!
//! The order is the point. The probe loads the kernel's tls module and ports below 1024 are bound while the process is
//! root; every thread, the log's and the runtime's too, starts after root has ended and inherits that.

use super::staples::{self, Staples};
use super::upkeep::{TicketGauges, Tickets, Watched};
use crate::config::{Config, KernelMetrics, Listener, Offload, SpliceMode};
use crate::exit::Failure;
use crate::listen;
use crate::observe::counters::Counters;
use crate::observe::ebpf::Counting;
use crate::observe::figures::Figures;
use crate::observe::log::Logging;
use crate::observe::metrics::Metrics;
use crate::probe::Kernel;
use crate::sys::limits::{self, OpenFiles};
use crate::sys::privilege::{self, User};
use crate::tls::certificates::{Certificates, Faults};
use crate::tls::grade::{self, Grade};
use crate::tls::policy::{self, Resumption};
use crate::tls::source::Source;
use crate::worker::{Snapshot, Worker};
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The user that root becomes if the configuration names none.
const DEFAULT_USER: &str = "tlsplice";
/// A proxied connection is one descriptor to the client and one to the upstream.
const DESCRIPTORS_PER_CONNECTION: u64 = 2;
/// Listeners, rings, pipes, log and admin.
const DESCRIPTORS_BESIDE: u64 = 1024;

/// A terminator that serves.
pub struct Terminator {
    pub(super) config: Arc<Config>,
    /// What SIGHUP reads again.
    pub(super) file: Option<PathBuf>,
    pub(super) kernel: Arc<Kernel>,
    pub(super) counting: Counting,
    pub(super) figures: Arc<Figures>,
    pub(super) resumption: Resumption,
    pub(super) certificates: Certificates,
    pub(super) watched: Watched,
    pub(super) staples: Staples,
    /// Of what is served; a reload may not lower it.
    pub(super) grade: Grade,
    pub(super) tickets: Option<Tickets>,
    ticket_gauges: Option<Arc<TicketGauges>>,
    pub(super) workers: Vec<Worker>,
    pub(super) log: Logging,
    pub(super) admin: Option<TcpListener>,
}

/// Reads and parses the file.
///
/// # Errors
/// `Usage`: the file cannot be read, or all that is wrong with it.
pub fn read_config(file: &Path) -> Result<Config, Failure> {
    let text = std::fs::read_to_string(file)
        .map_err(|e| Failure::Usage(format!("{}: cannot be read: {e}", file.display())))?;
    Config::parse(file, &text).map_err(|e| Failure::Usage(format!("the configuration is not valid:\n{e}")))
}

/// Certificates that were read, and what they were read from.
pub struct Loaded {
    pub certificates: Certificates,
    pub source: Option<Source>,
    /// The files would not do, for these faults, and the last good copy stands in.
    pub instead_of: Option<Faults>,
}

/// Reads the certificates that the configuration names, or the last good copy of them.
///
/// # Errors
/// `Usage`: all that is wrong with them.
pub fn read_certificates(config: &Config) -> Result<Loaded, Failure> {
    let tls = &config.tls;
    let source = Source::read(&tls.certificates);
    let faults = match Certificates::of_source(&source, tls) {
        Ok(certificates) => return Ok(Loaded { certificates, source: Some(source), instead_of: None }),
        Err(faults) => faults,
    };
    let kept = tls.last_good.as_ref().and_then(|folder| Source::kept(folder, &tls.certificates));
    match kept.map(|kept| Certificates::of_source(&kept, tls)) {
        Some(Ok(certificates)) => Ok(Loaded { certificates, source: None, instead_of: Some(faults) }),
        Some(Err(_)) | None => Err(Failure::Usage(format!("the certificates cannot be served:\n{faults}"))),
    }
}

impl Terminator {
    /// Starts. `file` is where `config` came from; without one there is no reload.
    ///
    /// # Errors
    /// `Host`: what the host refuses, and what mends it.
    pub fn start(config: Config, loaded: Loaded, file: Option<PathBuf>) -> Result<Self, Failure> {
        let open_files =
            limits::raise_open_files().map_err(|e| Failure::Host(format!("setrlimit(RLIMIT_NOFILE): {e}")))?;
        let kernel = Kernel::probe();
        refuse_if_required(&config, &kernel)?;
        let counting = Counting::start(&config.metrics);
        refuse_if_uncounted(&config, &counting)?;
        let maps = counting.maps();
        let mut open =
            listen::bind(&config.listeners, &config.listeners, config.server.workers.get(), maps.map(AsRef::as_ref))
                .map_err(|e| Failure::Host(e.to_string()))?;
        let admin = config.server.admin.map(listen::bind_admin).transpose();
        let admin = admin.map_err(|e| Failure::Host(format!("server.admin: {e}")))?;
        let credentials = end_root(config.server.user.as_deref())?;
        let Loaded { certificates, source, instead_of } = loaded;
        if let Some(file) = &file {
            refuse_if_unreadable(file, &config, &certificates, source.is_some(), &credentials)?;
        }

        let log = Logging::start(&config.log);
        credentials.log();
        log_counting(&counting);
        warn_of_limits(&config, &kernel, open_files);
        warn_of_v4(&config.listeners, &config.listeners);
        if let Some(faults) = &instead_of {
            tracing::error!(reason = %faults, "certificates: the files will not do, the last good copy serves");
        }
        let tickets = Tickets::start(&config.tls)?;
        let resumption = match &tickets {
            Some(tickets) => Resumption::shared(tickets.ticketer()),
            None => Resumption::of_this_process()
                .map_err(|e| Failure::Host(format!("make keys for session tickets: {e}")))?,
        };
        let mut staples = Staples::default();
        let answers = staples::beside_all(&certificates, config.tls.ocsp);
        let certificates = staples.put_to(certificates, &answers, &config.tls);
        let tls = policy::server_config(&config.tls, certificates.resolver(), &resumption)
            .map_err(|e| Failure::Usage(format!("[tls]: {e}")))?;
        let figures = Arc::new(Figures::default());
        figures.set(&config, &certificates);
        let (config, kernel) = (Arc::new(config), Arc::new(kernel));
        let snapshot = Snapshot::new(Arc::clone(&config), tls);
        let workers = open.drain(..).enumerate().map(|(index, sockets)| {
            Worker::spawn(index, snapshot.clone(), sockets, Arc::clone(&kernel), counting.maps().cloned())
                .map_err(|e| Failure::Host(format!("start worker {index}: {e}")))
        });
        let workers = workers.collect::<Result<Vec<_>, _>>()?;
        let grade = grade::configuration::grade(&config, &certificates, &[]).grade;
        let watched = Watched::serving(source.as_ref());
        let ticket_gauges = tickets.as_ref().map(Tickets::gauges);
        let terminator = Self {
            config,
            file,
            kernel,
            counting,
            figures,
            resumption,
            certificates,
            watched,
            staples,
            grade,
            tickets,
            ticket_gauges,
            workers,
            log,
            admin,
        };
        if let Some(source) = source {
            terminator.keep(&source);
        }
        Ok(terminator)
    }

    /// What each worker counts.
    pub fn counters(&self) -> Vec<Arc<Counters>> {
        self.workers.iter().map(|worker| Arc::clone(&worker.counters)).collect()
    }

    pub(super) fn metrics(&self) -> Metrics {
        Metrics::new(
            self.counters(),
            Some(self.log.dropped()),
            self.counting.maps().cloned(),
            Arc::clone(&self.figures),
            self.ticket_gauges.clone(),
        )
    }
}

/// `offload = "require"` on a kernel that cannot.
///
/// # Errors
/// `Host`: what is missing.
pub fn refuse_if_required(config: &Config, kernel: &Kernel) -> Result<(), Failure> {
    let Some(listener) = config.listeners.iter().find(|l| l.offload == Offload::Require) else { return Ok(()) };
    let may = config.tls.policy.lets_the_kernel_protect();
    if may && kernel.offloads_everything() {
        return Ok(());
    }
    let missing = match &kernel.no_ulp {
        _ if !may => "FIPS mode, which the policy wants of it (fips=1 on its command line)".to_owned(),
        Some(why) => why.clone(),
        None => missing_directions(kernel).join(", "),
    };
    Err(Failure::Host(format!(
        "listener {}: offload = \"require\", and this kernel ({}) lacks it: {missing}; \
         `tlsplice doctor` says what mends it, and offload = \"auto\" serves without",
        listener.address, kernel.release
    )))
}

/// `metrics.kernel = "require"` where the kernel does not count.
fn refuse_if_uncounted(config: &Config, counting: &Counting) -> Result<(), Failure> {
    match counting {
        Counting::Off(why) if config.metrics.kernel == KernelMetrics::Require => Err(Failure::Host(format!(
            "metrics.kernel = \"require\", and connections cannot be counted in the kernel: {why}; \
             kernel = \"auto\" serves without"
        ))),
        Counting::On { .. } | Counting::Off(_) | Counting::Unwanted => Ok(()),
    }
}

fn log_counting(counting: &Counting) {
    match counting {
        Counting::On { remarks, .. } => remarks.iter().for_each(|remark| tracing::info!(remark, "kernel metrics")),
        Counting::Off(reason) => {
            tracing::warn!(reason, "the kernel does not count connections: user space counts them without it");
        }
        Counting::Unwanted => {}
    }
}

/// `TLS1.3 AES-256-GCM (receive)` and so on: what kTLS lacks although it is there.
pub fn missing_directions(kernel: &Kernel) -> Vec<String> {
    let lacks = |has: bool, name: &str, direction: &str| (!has).then(|| format!("{name} ({direction})"));
    let of_suite = |s: &crate::probe::SuiteSupport| [lacks(s.tx, s.name, "send"), lacks(s.rx, s.name, "receive")];
    kernel.suites.iter().flat_map(of_suite).flatten().collect()
}

/// Who the process is from now on.
enum Credentials {
    /// It was never root.
    AsStarted,
    User(User),
    /// Uid 0 without capabilities: there was no user to become.
    RootWithoutCapabilities,
}

impl Credentials {
    fn name(&self) -> String {
        match self {
            Self::AsStarted => format!("uid {}", privilege::effective_uid()),
            Self::User(user) => user.name.clone(),
            Self::RootWithoutCapabilities => "root without capabilities".to_owned(),
        }
    }

    fn log(&self) {
        let user = self.name();
        let low_ports = privilege::can_bind_low_ports();
        match self {
            Self::AsStarted | Self::User(_) => tracing::info!(user, low_ports, "runs as"),
            Self::RootWithoutCapabilities => tracing::warn!(
                user,
                low_ports,
                "runs as: there is no user {DEFAULT_USER} and server.user names none; root's files stay within reach"
            ),
        }
    }
}

fn end_root(user: Option<&str>) -> Result<Credentials, Failure> {
    if !privilege::is_root() {
        privilege::give_back_loader_capabilities().map_err(|e| Failure::Host(e.to_string()))?;
        return Ok(Credentials::AsStarted);
    }
    let name = user.unwrap_or(DEFAULT_USER);
    let found = User::find(name).map_err(|e| Failure::Host(format!("look up user {name}: {e}")))?;
    if found.is_none() && user.is_some() {
        return Err(Failure::Host(format!("server.user: {}", privilege::PrivilegeError::NoUser(name.to_owned()))));
    }
    privilege::become_unprivileged(found.as_ref()).map_err(|e| Failure::Host(e.to_string()))?;
    Ok(found.map_or(Credentials::RootWithoutCapabilities, Credentials::User))
}

/// A reload reads everything again, without root: what it could not read then is refused now.
fn refuse_if_unreadable(
    file: &Path,
    config: &Config,
    certificates: &Certificates,
    files_are_good: bool,
    credentials: &Credentials,
) -> Result<(), Failure> {
    let of_pairs = certificates.served().iter().flat_map(|one| [one.certificate_file.as_path(), &one.key_file]);
    // Where the last good copy stands in, the files are missed anyway.
    let configured = config.tls.certificates.iter().map(PathBuf::as_path).filter(|_| files_are_good);
    let paths = std::iter::once(file).chain(configured).chain(of_pairs);
    let user = credentials.name();
    for path in paths {
        if let Err(error) = readable(path) {
            let path = path.display();
            return Err(Failure::Host(format!(
                "{path}: {user}, which the process runs as after its start, cannot read it and so could not reload: \
                 {error}: chown {user} {path}, and let every folder above be passed (namei -l {path})"
            )));
        }
    }
    Ok(())
}

fn readable(path: &Path) -> io::Result<()> {
    if path.is_dir() { std::fs::read_dir(path).map(|_| ()) } else { File::open(path).map(|_| ()) }
}

/// Who asks for `[::]` expects IPv4 with it.
pub(super) fn warn_of_v4(opened: &[Arc<Listener>], all: &[Arc<Listener>]) {
    for (address, other) in listen::short_of_v4(opened, all) {
        tracing::warn!("{address} does not take IPv4, as {other} has that port");
    }
}

fn warn_of_limits(config: &Config, kernel: &Kernel, open_files: OpenFiles) {
    let connections = u64::try_from(config.limits.connections).unwrap_or(u64::MAX);
    let wanted = connections.saturating_mul(DESCRIPTORS_PER_CONNECTION).saturating_add(DESCRIPTORS_BESIDE);
    if open_files.soft < wanted {
        tracing::warn!(
            limit = open_files.soft,
            wanted,
            "limits.connections is more than the open files that this process may have: LimitNOFILE={wanted}"
        );
    }
    let wants_kernel = config.listeners.iter().any(|l| l.offload != Offload::Off);
    if wants_kernel && let Some(why) = &kernel.no_ulp {
        tracing::warn!(why, "no kernel TLS: every connection stays in userspace");
    } else if wants_kernel && !kernel.rekey {
        tracing::info!("this kernel takes no new keys: a client that rekeys past the door is closed cleanly");
    }
    if config.server.splice == SpliceMode::Ring {
        tracing::debug!("splice runs on the ring's own threads");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_shipped_file_names_may_be_written_under_the_shipped_unit() {
        let unit = include_str!("../../dist/tlsplice.service");
        let values = |key: &'static str| unit.lines().filter_map(move |line| line.strip_prefix(key)?.strip_prefix('='));
        // One that is not there would keep the service from its start.
        assert!(values("ReadWritePaths").all(|path| path.starts_with('-')));
        let writable: Vec<PathBuf> = values("ReadWritePaths")
            .map(|path| PathBuf::from(path.trim_start_matches('-')))
            .chain(values("StateDirectory").map(|name| Path::new("/var/lib").join(name)))
            .collect();
        let shipped = include_str!("../../dist/tlsplice.toml").replace("\n#tickets", "\ntickets");
        let config = Config::parse(Path::new("tlsplice.toml"), &shipped).expect("valid");
        let places = [config.tls.last_good, config.tls.tickets, Some(config.metrics.pins)].into_iter().flatten();
        for place in places.chain(config.tls.certificates) {
            assert!(writable.iter().any(|path| place.starts_with(path)), "{}", place.display());
        }
    }
}
