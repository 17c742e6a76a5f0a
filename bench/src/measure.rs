//! Measures peers side by side: in each round all of them are started afresh, and each kind of work meets one after the other
//! before the next kind begins, so that what else the machine does meets all of them alike.
//!
//!   round ─▶ start all ─▶ kind ─▶ peer, peer, peer (another first one each round) ─▶ … ─▶ end all
//!
//! A peer that cannot be started or fails at some work is left out of that and named in the remarks; it does not end the run.

use crate::certificate::{Certificate, NAME};
use crate::client::{self, Protection, Target, Trust};
use crate::load::{self, Kind, Load, Mark, Unit};
use crate::machine::{self, Machine};
use crate::peers::{self, Peer, Program, Programs, Setup, Started};
use crate::process::Usage;
use crate::progress::Progress;
use crate::result::{FORMAT, Figure, Limit, Point, Round, Run, Series, Settings, is_own};
use crate::{insn_mark, statistics, upstream};
use anyhow::{Context, Result, bail, ensure};
use rustls::pki_types::ServerName;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// What is passed through each peer and compared before anything is measured.
const CHECK_BYTES: u64 = 3 << 20;
/// Between two measurements: what the last one left behind is done by then.
const PAUSE: Duration = Duration::from_millis(30);
/// What programs still do once they listen is done by then: they share a CPU, and where instructions are counted the first
/// measurement of a round had twice to six times what it should.
const SETTLE: Duration = Duration::from_millis(500);
/// The open loop's rate, as a share of the best peer's rate in the closed loop.
pub const OPEN_LOOP_SHARE: f64 = 0.7;
/// Where instructions are counted, a download takes so many times as long as other work: what lies in buffers when it begins and
/// when it ends must weigh little against what flows, and the clock of a guest is a slow one.
const COUNTED_DOWNLOAD_FACTOR: f64 = 6.0;
/// Buffers of the cipher's own measurement.
const CIPHER_BUFFER_BYTES: usize = 16 << 10;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    pub programs: Programs,
    pub peers: Vec<Peer>,
    pub kinds: Vec<Kind>,
    /// Bytes of the connections of the cost curve; none: it is not measured.
    pub curve: Vec<u64>,
    pub rounds: usize,
    pub seconds: f64,
    pub workers: usize,
    /// Held to CPUs, the proxies to the last ones.
    pub pin: bool,
    pub idle_connections: usize,
    pub upload_bytes: u64,
    pub limit: bool,
    /// What a system call costs on the machine itself, where this is not it.
    pub native_call_ns: Option<f64>,
    /// In a guest whose instructions are counted: begins and ends are marked, and each measurement is told in a line.
    pub counted: bool,
    pub folder: PathBuf,
    pub commit: String,
    /// Rounds that would not be done by then are not begun; the first always is.
    pub budget: Duration,
}

/// Measures all of it.
pub fn run(plan: &Plan) -> Result<Run> {
    let has_work = !plan.kinds.is_empty() || !plan.curve.is_empty();
    ensure!(plan.rounds > 0 && !plan.peers.is_empty() && has_work, "there is nothing to measure");
    let descriptors = machine::raise_descriptor_limit();
    let machine = Machine::look();
    let call_ns = plan.native_call_ns.map(|native| (native, machine::call_ns()));
    let cpus = cpus(plan)?;
    if let Some((_, load)) = &cpus {
        machine::hold_to(load)?;
    }
    let certificate = Certificate::make(&plan.folder)?;
    let upstream = upstream::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let setup = Setup {
        programs: plan.programs.clone(),
        certificate,
        upstream,
        workers: plan.workers,
        cpus: cpus.as_ref().map(|(proxy, _)| proxy.clone()),
        bound_to_us: !plan.counted,
        descriptors,
        folder: plan.folder.clone(),
        kernel_tls: machine.kernel_tls,
    };
    let settings = Settings {
        rounds: plan.rounds,
        seconds: plan.seconds,
        workers: plan.workers,
        proxy_cpus: setup.cpus.as_deref().map(peers::listed),
        load_cpus: cpus.as_ref().map(|(_, load)| peers::listed(load)),
        protection: "TLS 1.3, TLS_AES_256_GCM_SHA384, X25519MLKEM768, ECDSA P-256".into(),
        call_ns,
        open_rate: None,
        idle_connections: Some(plan.idle_connections),
        upload_bytes: Some(plan.upload_bytes),
    };
    let mut run = Run {
        format: FORMAT,
        taken_at: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        machine,
        settings,
        versions: Vec::new(),
        commit: plan.commit.clone(),
        series: Vec::new(),
        curve: Vec::new(),
        limit: None,
        remarks: Vec::new(),
    };
    Measuring { plan, setup, run: &mut run, peers: Vec::new(), started: Instant::now() }.all()?;
    run.machine.load_after = machine::load();
    Ok(run)
}

/// The CPUs of the proxies and of the generator.
fn cpus(plan: &Plan) -> Result<Option<(Vec<usize>, Vec<usize>)>> {
    let all = machine::cpus()?;
    if !plan.pin || all.len() <= plan.workers {
        return Ok(None);
    }
    let (load, proxy) = all.split_at(all.len() - plan.workers);
    Ok(Some((proxy.to_vec(), load.to_vec())))
}

/// A kind of work, of a size of its own on the cost curve.
#[derive(Clone, Copy, Debug)]
struct Work {
    kind: Kind,
    bytes: Option<u64>,
}

impl Work {
    fn name(self) -> String {
        self.bytes.map_or_else(|| self.kind.name().into(), |bytes| format!("{}:{bytes}", self.kind.name()))
    }
}

struct Measuring<'a> {
    plan: &'a Plan,
    setup: Setup,
    run: &'a mut Run,
    peers: Vec<Peer>,
    started: Instant,
}

impl Measuring<'_> {
    fn all(mut self) -> Result<()> {
        self.peers = self.checked()?;
        if !self.run.machine.bpf_file_system && self.peers.iter().any(|peer| is_own(peer.name())) {
            self.remark(
                "tlsplice does not count in the kernel, which saves it 4 to 6 % of a short connection: \
                 mount -t bpf bpf /sys/fs/bpf, as every host with systemd has it",
            );
        }
        // The open loop comes last: its rate follows from the closed one.
        let works = self.plan.kinds.iter().map(|kind| Work { kind: *kind, bytes: None });
        let (open, mut closed): (Vec<Work>, Vec<Work>) = works.partition(|work| work.kind == Kind::OpenLoop);
        for kind in [Kind::Fetch, Kind::Store] {
            closed.extend(self.plan.curve.iter().map(|bytes| Work { kind, bytes: Some(*bytes) }));
        }
        let steps = self.plan.rounds * (closed.len() + open.len()) * self.peers.len();
        let mut progress = Progress::new(steps as u64);
        let share = closed.len() as f64 / (closed.len() + open.len()) as f64;
        self.rounds(&closed, self.plan.budget.mul_f64(share), &mut progress)?;
        if self.plan.limit {
            match self.limit(&progress) {
                Ok(limit) => self.run.limit = Some(limit),
                Err(error) => self.remark(&format!("limit: left out: {error:#}")),
            }
        }
        if !open.is_empty() {
            let best = self.run.best_peer(Kind::Request, Figure::Rate).and_then(|s| s.median(Figure::Rate));
            let own = self.run.series.iter().find(|s| s.kind == Kind::Request).and_then(|s| s.median(Figure::Rate));
            match best.or(own) {
                Some(rate) => {
                    self.run.settings.open_rate = Some(rate * OPEN_LOOP_SHARE);
                    self.rounds(&open, self.plan.budget, &mut progress)?;
                }
                None => self.run.remarks.push("open-loop: left out, its rate follows from `request`".into()),
            }
        }
        Ok(())
    }

    /// Peers that start, pass bytes on unchanged, and have a version.
    fn checked(&mut self) -> Result<Vec<Peer>> {
        let mut good = Vec::new();
        for peer in &self.plan.peers {
            match self.check(*peer) {
                Ok(()) => good.push(*peer),
                Err(error) => self.remark(&format!("{}: left out: {error:#}", peer.name())),
            }
        }
        if good.is_empty() {
            bail!("no peer is left: {}", self.run.remarks.join("; "));
        }
        Ok(good)
    }

    fn check(&mut self, peer: Peer) -> Result<()> {
        let name = match peer.program() {
            Program::Tlsplice => "tlsplice",
            Program::Nginx => "nginx",
            Program::Haproxy => "haproxy",
            Program::Hitch => "hitch",
            Program::Ourselves => "tlsplice-bench",
        };
        if !self.run.versions.iter().any(|(known, _)| known == name) {
            let version = self.setup.programs.version(peer.program())?;
            self.run.versions.push((name.into(), version));
        }
        let started = self.setup.start(peer)?;
        let target = target(&self.setup, &started)?;
        client::check(&target, CHECK_BYTES).with_context(|| format!("it said: {}", started.process.said()))
    }

    fn remark(&mut self, text: &str) {
        if !self.run.remarks.iter().any(|known| known == text) {
            eprintln!("{text}");
            self.run.remarks.push(text.to_owned());
        }
    }

    /// As many rounds as were asked for and fit into the time.
    fn rounds(&mut self, works: &[Work], until: Duration, progress: &mut Progress) -> Result<()> {
        let mut longest = Duration::ZERO;
        for number in 0..self.plan.rounds {
            if number > 0 && self.started.elapsed() + longest > until {
                let names = works.iter().map(|work| work.name()).collect::<Vec<_>>().join(", ");
                self.remark(&format!("{number} of {} rounds: the time was up ({names})", self.plan.rounds));
                break;
            }
            let since = Instant::now();
            self.round(number, works, progress)?;
            longest = longest.max(since.elapsed());
        }
        Ok(())
    }

    /// All that start; a round may be without one.
    fn start_all(&mut self, number: usize) -> Vec<Started> {
        let mut all = Vec::with_capacity(self.peers.len());
        for peer in self.peers.clone() {
            match self.setup.start(peer) {
                Ok(started) => all.push(started),
                Err(error) => self.remark(&format!("round {}: {}: {error:#}", number + 1, peer.name())),
            }
        }
        std::thread::sleep(SETTLE);
        all
    }

    fn round(&mut self, number: usize, works: &[Work], progress: &mut Progress) -> Result<()> {
        let shared = self.start_all(number);
        ensure!(!shared.is_empty(), "no peer starts any more: {}", self.run.remarks.join("; "));
        if self.plan.counted
            && let Some(first) = works.first()
        {
            // What programs do once they are started falls to whoever is first in a round, who has had twice what it should,
            // and dozens of times in a guest's first: once for nothing.
            measure(&self.setup, &shared[number % shared.len()], &self.load(*first), None, None)?;
        }
        for work in works {
            let load = self.load(*work);
            // Memory is asked of programs that have done nothing yet: what earlier work has freed would be taken again.
            let fresh = work.kind.holds_memory().then(|| self.start_all(number));
            let started = fresh.as_ref().unwrap_or(&shared);
            // Another one comes first in each round.
            let mut order: Vec<&Started> = started.iter().collect();
            order.rotate_left(number % started.len().max(1));
            for peer in order {
                progress.step(&format!("round {}, {}, {}", number + 1, work.name(), peer.peer.name()));
                std::thread::sleep(PAUSE);
                let told = self.plan.counted.then(|| work.name());
                match measure(&self.setup, peer, &load, self.run.settings.call_ns, told.as_deref()) {
                    Ok(round) => self.keep(*work, peer.peer, Round { number: Some(number), ..round }),
                    Err(error) => {
                        let said = peer.process.said();
                        progress.note(&format!("{}: {error:#}; it said: {said}", peer.peer.name()));
                        self.run.remarks.push(format!("round {}: {}: {error:#}", number + 1, peer.peer.name()));
                    }
                }
            }
        }
        Ok(())
    }

    fn load(&self, work: Work) -> Load {
        let mut load = Load::of(work.kind, Duration::from_secs_f64(self.plan.seconds));
        load.upload_bytes = self.plan.upload_bytes;
        if self.plan.counted && work.kind == Kind::Down {
            load.duration = load.duration.mul_f64(COUNTED_DOWNLOAD_FACTOR);
        }
        load.transfer_bytes = work.bytes.unwrap_or(load.transfer_bytes);
        if work.kind == Kind::Idle {
            load.connections = self.plan.idle_connections;
            // What they hold does not change while they wait.
            load.duration = Duration::ZERO;
        }
        if let Some(rate) = self.run.settings.open_rate {
            load.rate = rate;
        }
        load
    }

    fn keep(&mut self, work: Work, peer: Peer, round: Round) {
        let kind = work.kind;
        if let Some(bytes) = work.bytes {
            let is_it = |point: &&mut Point| point.kind == kind && point.bytes == bytes && point.peer == peer.name();
            match self.run.curve.iter_mut().find(is_it) {
                Some(point) => point.rounds.push(round),
                None => self.run.curve.push(Point { kind, bytes, peer: peer.name().into(), rounds: vec![round] }),
            }
            return;
        }
        let known = self.run.series.iter_mut().find(|s| s.kind == kind && s.peer == peer.name());
        match known {
            Some(series) => series.rounds.push(round),
            None => self.run.series.push(Series { kind, peer: peer.name().into(), rounds: vec![round] }),
        }
    }

    /// The floor: relays without TLS, and the cipher alone.
    fn limit(&mut self, progress: &Progress) -> Result<Limit> {
        progress.note("limit: a relay without TLS, and the cipher");
        let mut limit = Limit {
            copy_down: Vec::new(),
            copy_up: Vec::new(),
            splice_down: Vec::new(),
            splice_up: Vec::new(),
            cipher: Vec::new(),
        };
        for _ in 0..self.plan.rounds {
            for peer in [Peer::CopyRelay, Peer::SpliceRelay] {
                let started = self.setup.start(peer)?;
                for kind in [Kind::Down, Kind::Up] {
                    std::thread::sleep(PAUSE);
                    let round = measure(
                        &self.setup,
                        &started,
                        &self.load(Work { kind, bytes: None }),
                        self.run.settings.call_ns,
                        None,
                    )?;
                    let values = match (peer, kind) {
                        (Peer::CopyRelay, Kind::Down) => &mut limit.copy_down,
                        (Peer::CopyRelay, _) => &mut limit.copy_up,
                        (_, Kind::Down) => &mut limit.splice_down,
                        (_, _) => &mut limit.splice_up,
                    };
                    values.extend(round.figure(Figure::Cpu, kind));
                }
            }
            limit.cipher.push(cipher_seconds_per_gib()?);
        }
        Ok(limit)
    }
}

fn target(setup: &Setup, started: &Started) -> Result<Target> {
    let protection =
        || anyhow::Ok(Protection { trust: Trust::Roots(Arc::new(setup.certificate.roots()?)), any_parameters: false });
    Ok(Target {
        address: started.address,
        name: ServerName::try_from(NAME).context("the certificate's name")?,
        tls: if started.peer.is_plain() { None } else { Some(protection()?) },
    })
}

/// One peer, one kind of work, once. Where instructions are counted it is told under a name, in a line.
fn measure(
    setup: &Setup,
    started: &Started,
    load: &Load,
    call_ns: Option<(f64, f64)>,
    told: Option<&str>,
) -> Result<Round> {
    let target = target(setup, started)?;
    if let Some(cpus) = &setup.cpus {
        started.process.hold_to(cpus)?;
    }
    let mut usages: Vec<(Mark, Usage)> = Vec::new();
    let outcome = load::run(&target, load, &mut |mark| {
        if told.is_some() && mark == Mark::End {
            insn_mark::end();
        }
        usages.push((mark, started.process.usage()?));
        if told.is_some() && mark == Mark::Begin {
            insn_mark::begin();
        }
        Ok(())
    });
    // What was marked has to be told, even if it came to nothing, or marks and lines no longer meet.
    if let Some(name) = told
        && usages.iter().any(|(mark, _)| *mark == Mark::End)
    {
        let done = outcome.as_ref().ok().filter(|outcome| outcome.count.failure.is_none());
        let units = done.map_or(0, |outcome| outcome.count.units);
        println!("COUNTED {name} {} {units}", started.peer.name());
    }
    let load::Outcome { elapsed, count } = outcome?;
    if let Some(failure) = &count.failure {
        bail!("{} of {} failed, the first: {failure}", count.failed, load.kind.name());
    }
    let at = |mark: Mark| usages.iter().find(|(m, _)| *m == mark).map(|(_, usage)| usage);
    let (Some(before), Some(begin), Some(end)) = (at(Mark::Before), at(Mark::Begin), at(Mark::End)) else {
        bail!("the run told not when it began and ended");
    };
    let cpu = end.since(begin);
    let calls = end.calls.saturating_sub(begin.calls);
    let excess = call_ns.map_or(0.0, |(native, here)| (here - native).max(0.0) * calls as f64);
    let holds = load.kind.holds_memory();
    let per_connection = |after: u64, before: u64| (after as f64 - before as f64) / load.connections as f64;
    let latency = &count.latency;
    let percentile = |share: f64| latency.value_at_quantile(share) as f64;
    Ok(Round {
        number: None,
        units: count.units,
        seconds: elapsed.as_secs_f64(),
        cpu_ns: cpu.total_ns as f64 - excess,
        gross_cpu_ns: cpu.total_ns as f64,
        user_share: cpu.user_share,
        calls,
        resumed: count.resumed,
        pss_per_connection: holds.then(|| per_connection(end.pss_bytes, before.pss_bytes)),
        slab_per_connection: (load.kind == Kind::Idle).then(|| per_connection(end.slab_bytes, before.slab_bytes)),
        latency_us: (!latency.is_empty())
            .then(|| [percentile(0.5), percentile(0.9), percentile(0.99), percentile(0.999), latency.max() as f64]),
    })
}

/// What seals a buffer, by one of two libraries that have the same interface and no trait for it.
macro_rules! sealer {
    ($library:ident) => {{
        use $library::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
        let key = UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(|_| anyhow::anyhow!("make a key"))?;
        let key = LessSafeKey::new(key);
        move |buffer: &mut [u8]| {
            let nonce = Nonce::assume_unique_for_key([0; 12]);
            key.seal_in_place_separate_tag(nonce, Aad::empty(), buffer).map(std::hint::black_box).is_ok()
        }
    }};
}

/// AES-256-GCM in place, by the faster of the libraries that tlsplice takes, each where it is.
fn cipher_seconds_per_gib() -> Result<f64> {
    Ok(seconds_per_gib(sealer!(aws_lc_rs))?.min(seconds_per_gib(sealer!(ring))?))
}

fn seconds_per_gib(mut seal: impl FnMut(&mut [u8]) -> bool) -> Result<f64> {
    const TOTAL_BYTES: usize = 512 << 20;
    let mut buffer = vec![0; CIPHER_BUFFER_BYTES];
    let since = Instant::now();
    for _ in 0..TOTAL_BYTES / CIPHER_BUFFER_BYTES {
        anyhow::ensure!(seal(&mut buffer), "seal a buffer");
    }
    Ok(since.elapsed().as_secs_f64() * crate::result::GIB / TOTAL_BYTES as f64)
}

/// What a limit comes to: copying and the cipher, and splice and the cipher; s per GiB, down and up.
pub fn floors(limit: &Limit) -> Option<[(f64, f64); 2]> {
    let cipher = statistics::median(&limit.cipher)?;
    let sum = |values: &[f64]| statistics::median(values).map(|relay| relay + cipher);
    Some([(sum(&limit.copy_down)?, sum(&limit.copy_up)?), (sum(&limit.splice_down)?, sum(&limit.splice_up)?)])
}

/// Whether a kind is counted in bytes.
pub fn is_bulk(kind: Kind) -> bool {
    kind.unit() == Unit::Byte
}
