//! A tlsplice of a test: its configuration, its start, and all that has to hold when it stops.

use crate::environment::{Environment, Relay};
use crate::process::{self, Guarded};
use crate::run::Context;
use crate::scrape::{Descriptors, Metrics, TlsStat};
use anyhow::{Result, bail, ensure};
use rustix::process::Signal;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// For a hundred handshakes at once and more: a guest that shares its processors with others takes longer for them than an
/// operator would allow.
pub const PATIENT_HANDSHAKE: &str = "handshake_timeout = \"60s\"";

/// One `[[listener]]` with an upstream of its own.
#[derive(Debug, Clone)]
pub struct Listener {
    pub address: SocketAddr,
    pub mode: &'static str,
    pub offload: &'static str,
    /// Plaintext bytes before the door.
    pub offload_after: u64,
    /// As the configuration writes it: `127.0.0.1:1` or `unix:/path`.
    pub server: String,
}

/// A configuration file in the making.
#[derive(Debug, Clone)]
pub struct Settings {
    pub relay: Relay,
    pub admin: SocketAddr,
    pub listeners: Vec<Listener>,
    /// Lines of `[server]`, `[limits]` and `[tls]` beside the harness's own.
    pub server: Vec<String>,
    pub limits: Vec<String>,
    pub http: Vec<String>,
    /// The whole of `[log]`.
    pub log: Vec<String>,
    pub tls: Vec<String>,
    pub certificates: Vec<PathBuf>,
    /// Lines of `[metrics]`. Counts in the kernel outlive a tlsplice, so tests of other things go without.
    pub metrics: Vec<String>,
}

impl Settings {
    pub fn new(ctx: &Context, relay: Relay) -> Result<Self> {
        let ecdsa = &ctx.certificates.ecdsa;
        Ok(Self {
            relay,
            admin: loopback(process::free_port()?),
            listeners: Vec::new(),
            server: vec!["drain_timeout = \"20s\"".into()],
            limits: Vec::new(),
            // Short, so that a tlsplice that stops has no descriptor left.
            http: vec!["upstream_idle = \"1s\"".into()],
            log: Vec::new(),
            tls: Vec::new(),
            certificates: vec![ecdsa.chain.clone(), ecdsa.key.clone()],
            metrics: vec!["kernel = \"off\"".into()],
        })
    }

    /// A listener on 127.0.0.1 that goes through the door after so many bytes.
    pub fn listen(mut self, offload_after: u64, server: &str) -> Result<Self> {
        let offload = if self.relay.offloads() { "require" } else { "off" };
        let address = loopback(process::free_port()?);
        self.listeners.push(Listener { address, mode: "tcp", offload, offload_after, server: server.to_owned() });
        Ok(self)
    }

    /// Every listener so far is one of this mode.
    pub fn mode(mut self, mode: &'static str) -> Self {
        self.listeners.iter_mut().for_each(|listener| listener.mode = mode);
        self
    }

    /// A line of `[http]`, instead of one with the same key.
    pub fn http(mut self, line: &str) -> Self {
        let key = line.split('=').next().unwrap_or_default();
        self.http.retain(|l| !l.starts_with(key));
        self.http.push(line.to_owned());
        self
    }

    pub fn limit(mut self, line: &str) -> Self {
        self.limits.push(line.to_owned());
        self
    }

    /// A line of `[tls]`.
    pub fn tls(mut self, line: &str) -> Self {
        self.tls.push(line.to_owned());
        self
    }

    /// Replaces a line of `[server]` that has the same key.
    pub fn server(mut self, line: &str) -> Self {
        let key = line.split('=').next().unwrap_or_default();
        self.server.retain(|l| !l.starts_with(key));
        self.server.push(line.to_owned());
        self
    }

    pub fn text(&self) -> String {
        let splice = match self.relay {
            Relay::Userspace | Relay::Auto => "auto",
            Relay::Inline => "inline",
            Relay::Ring => "ring",
        };
        let files: Vec<String> = self.certificates.iter().map(|f| format!("{:?}", f.display().to_string())).collect();
        let mut text = format!("[server]\nadmin = \"{}\"\nsplice = \"{splice}\"\n", self.admin);
        let mut lines = |lines: &[String]| {
            for line in lines {
                let _ = writeln!(text, "{line}");
            }
        };
        lines(&self.server);
        lines(&["[tls]".into(), format!("certificates = [{}]", files.join(", "))]);
        lines(&self.tls);
        lines(&["[limits]".into()]);
        lines(&self.limits);
        lines(&["[http]".into()]);
        lines(&self.http);
        lines(&["[log]".into()]);
        lines(&self.log);
        lines(&["[metrics]".into()]);
        lines(&self.metrics);
        for (index, listener) in self.listeners.iter().enumerate() {
            let Listener { address, mode, offload, offload_after, server } = listener;
            if *mode == "redirect" {
                let _ = write!(text, "[[listener]]\naddress = \"{address}\"\nmode = \"redirect\"\n");
                continue;
            }
            let _ = write!(
                text,
                "[[listener]]\naddress = \"{address}\"\nmode = \"{mode}\"\noffload = \"{offload}\"\noffload_after = {offload_after}\n\
                 upstream = \"u{index}\"\n[[upstream]]\nname = \"u{index}\"\nservers = [{server:?}]\n"
            );
        }
        text
    }
}

pub fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// A running tlsplice.
#[derive(Debug)]
pub struct Proxy {
    pub settings: Settings,
    pub config: PathBuf,
    log: PathBuf,
    process: Guarded,
    idle: Descriptors,
    tls_stat: Option<TlsStat>,
    /// By earlier processes, whose counts the pins have kept.
    offloaded_before: u64,
    environment: Environment,
}

impl Proxy {
    /// Starts it and waits until it answers.
    pub fn start(ctx: &Context, settings: Settings) -> Result<Self> {
        Self::start_as(ctx, settings, &[])
    }

    /// The same by another program, which is given tlsplice's own command line.
    pub fn start_as(ctx: &Context, settings: Settings, by: &[&str]) -> Result<Self> {
        let stem = ctx.environment.tmp.join(format!("{}-{}", ctx.test(), settings.admin.port()));
        let (config, log) = (stem.with_extension("toml"), stem.with_extension("log"));
        fs::write(&config, settings.text())?;
        let mut command = match by.split_first() {
            None => Command::new(&ctx.environment.bin),
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg("--").arg(&ctx.environment.bin);
                command
            }
        };
        command.args(["run", "--config"]).arg(&config).stdin(Stdio::null()).stdout(Stdio::null());
        let process = Guarded::spawn(command.stderr(File::create(&log)?))?;
        let environment = ctx.environment.clone();
        let idle = Descriptors { sockets: 0, pipes: 0, others: 0 };
        let mut proxy = Self { settings, config, log, process, idle, tls_stat: None, offloaded_before: 0, environment };
        ctx.watch_log(&proxy.log);
        proxy.wait_ready()?;
        proxy.idle = Descriptors::of(proxy.pid())?;
        proxy.tls_stat = TlsStat::read();
        proxy.offloaded_before = proxy.metrics()?.offloaded();
        Ok(proxy)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + self.environment.patience();
        loop {
            if let Some(status) = self.process.exited()? {
                bail!("tlsplice ended at its start, {status}: {}", self.log_tail());
            }
            if crate::scrape::http_get(self.settings.admin, "/ready").is_ok_and(|(status, _)| status == 200) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "tlsplice is not ready: {}", self.log_tail());
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Where the listener of that place listens.
    pub fn address(&self, index: usize) -> SocketAddr {
        self.settings.listeners[index].address
    }

    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::fetch(self.settings.admin)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The log once it says this: another thread writes it.
    pub fn log_with(&self, words: &str) -> Result<String> {
        let deadline = Instant::now() + self.environment.patience();
        loop {
            let log = self.log();
            if log.contains(words) {
                return Ok(log);
            }
            ensure!(Instant::now() < deadline, "the log does not say {words:?}: {}", self.log_tail());
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn log_tail(&self) -> String {
        crate::run::tail(&self.log)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Writes the settings to the file, sends SIGHUP.
    pub fn reload(&mut self, settings: Settings) -> Result<()> {
        fs::write(&self.config, settings.text())?;
        self.settings = settings;
        self.signal(Signal::HUP)
    }

    /// Polls the metrics until they say so.
    pub fn wait_for(&self, what: &str, says: impl Fn(&Metrics) -> bool) -> Result<Metrics> {
        let deadline = Instant::now() + self.environment.patience();
        let mut pause = Duration::from_millis(1);
        loop {
            let metrics = self.metrics()?;
            if says(&metrics) {
                return Ok(metrics);
            }
            if Instant::now() > deadline {
                bail!(
                    "waited in vain for {what}: opened {}, live {}, offloaded {}, ended {}",
                    metrics.opened(),
                    metrics.live(),
                    metrics.offloaded(),
                    metrics.endings()
                );
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// The metrics once no connection is left.
    pub fn settled(&self) -> Result<Metrics> {
        self.wait_for("all connections to end", |m| m.live() == 0 && m.ended_any() == m.opened())
    }

    /// Ends it by SIGTERM and checks what every tlsplice owes: no panic, no descriptor left, kernel and metrics agree
    /// about what was offloaded, exit status 0.
    pub fn finish(mut self, ctx: &Context) -> Result<Metrics> {
        let metrics = self.settled()?;
        self.check_descriptors()?;
        self.check_kernel_count(&metrics)?;
        ctx.totals.add(&metrics);
        self.signal(Signal::TERM)?;
        let status = self.wait_exit()?;
        self.check_end(status)?;
        Ok(metrics)
    }

    pub fn wait_exit(&mut self) -> Result<ExitStatus> {
        self.process.wait(self.environment.patience() + Duration::from_secs(20))
    }

    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        self.process.exited()
    }

    pub fn check_end(&self, status: ExitStatus) -> Result<()> {
        let log = self.log();
        ensure!(!log.contains("panicked"), "tlsplice panicked: {}", self.log_tail());
        ensure!(status.success(), "tlsplice ended with {status}: {}", self.log_tail());
        Ok(())
    }

    /// Sockets and other descriptors are back to what they were; pipes may wait in their pool, within its cap.
    fn check_descriptors(&self) -> Result<()> {
        let deadline = Instant::now() + self.environment.patience();
        loop {
            let now = Descriptors::of(self.pid())?;
            if now.sockets <= self.idle.sockets && now.others <= self.idle.others {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "descriptors leak: at start {:?}, now {now:?}", self.idle);
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Others key sockets meanwhile, so the kernel's count is not this one's.
    pub fn beside_others(&mut self) {
        self.tls_stat = None;
    }

    /// `TlsTxSw` and `TlsRxSw` rose by one for each connection that went through the door.
    fn check_kernel_count(&self, metrics: &Metrics) -> Result<()> {
        let (Some(before), Some(now)) = (self.tls_stat, TlsStat::read()) else { return Ok(()) };
        let (tx, rx, counted) = (now.tx - before.tx, now.rx - before.rx, metrics.offloaded() - self.offloaded_before);
        ensure!(
            tx == counted && rx == counted,
            "the kernel keyed {tx} senders and {rx} receivers, tlsplice counts {counted} offloaded"
        );
        Ok(())
    }
}
