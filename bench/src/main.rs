//! The command line of `tlsplice-bench`.

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum as _};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use std::net::{SocketAddr, ToSocketAddrs};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tlsplice_bench::client::{Protection, Target, Trust};
use tlsplice_bench::compare::Verdict;
use tlsplice_bench::load::{self, Count, Kind, Load, Outcome};
use tlsplice_bench::measure::{self, Plan};
use tlsplice_bench::peers::{Peer, Programs};
use tlsplice_bench::plain_relay::{self, Mode};
use tlsplice_bench::result::{PERCENTILES, Run};
use tlsplice_bench::{compare, curve, machine, report, table, upstream};

/// What a quick run and a full one may take, less what building and starting take: 5 and 30 minutes are promised.
const QUICK_BUDGET_S: u64 = 270;
const BUDGET_S: u64 = 1680;

/// Sizes of the cost curve.
const CURVE_KIB: &str = "4,16,64,128,256,1024,4096,16384";
/// What it is measured of: the ways that tlsplice can take.
const CURVE_PEERS: [&str; 4] = ["tlsplice-userspace", "tlsplice-kernel", "tlsplice-ring", "tlsplice"];

/// Loads TLS terminators and compares them.
#[derive(Debug, Parser)]
#[command(name = "tlsplice-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Run(RunOptions),
    Load(LoadOptions),
    Upstream(UpstreamOptions),
    Compare(CompareOptions),
    Report(ReportOptions),
    /// The tables of curves that were counted in guests.
    Curve {
        file: PathBuf,
    },
    /// The table of a result again.
    Show {
        file: PathBuf,
    },
    /// A relay without TLS, for the limit.
    #[command(hide = true)]
    PlainRelay(RelayOptions),
    /// What a system call costs here, in ns.
    #[command(hide = true)]
    CallCost,
}

/// Measure tlsplice beside its peers on this machine.
#[derive(Args, Debug)]
struct RunOptions {
    /// Five short rounds, for a first look: a few minutes.
    #[arg(long)]
    quick: bool,
    /// The tlsplice to measure; absent: the one in PATH.
    #[arg(long, value_name = "FILE")]
    tlsplice: Option<PathBuf>,
    /// A folder with Debian's packages of the peers, unpacked with all they need; absent: what is installed.
    #[arg(long, value_name = "FOLDER")]
    peers_root: Option<PathBuf>,
    /// Only these peers, by name.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    peers: Vec<String>,
    /// Only these kinds of work.
    #[arg(long, value_enum, value_delimiter = ',')]
    kinds: Vec<Kind>,
    /// Measure what a connection costs by the KiB that it moves, in place of the comparison; at sizes of your own by =N,N,…
    #[arg(
        long,
        value_name = "KIB",
        value_delimiter = ',',
        num_args = 0..,
        require_equals = true,
        default_missing_value = CURVE_KIB
    )]
    curve: Vec<u64>,
    /// Rounds, in each of which every peer is started afresh.
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds of each measurement.
    #[arg(long, value_parser = seconds)]
    seconds: Option<Duration>,
    /// Threads or processes of each peer.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Do not hold proxies and generator to CPUs.
    #[arg(long)]
    no_pin: bool,
    /// Connections of `idle`.
    #[arg(long)]
    idle_connections: Option<usize>,
    /// MiB that each connection of `up` and `both` sends.
    #[arg(long)]
    upload_mib: Option<u64>,
    /// Measure the floor of this machine too: relays without TLS, and the cipher.
    #[arg(long)]
    limit: bool,
    /// Where the result is written, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the report is written, as HTML.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// What a system call costs on the machine itself, in ns, where this runs in user-mode Linux.
    #[arg(long, value_name = "NS")]
    native_call_ns: Option<f64>,
    /// Mark begins and ends for a plugin that counts instructions, and tell each measurement in a line.
    #[arg(long, hide = true)]
    counted: bool,
    /// The commit that is measured, for the result.
    #[arg(long, default_value = "unknown")]
    commit: String,
    /// Seconds: a round that would not be done by then is not begun.
    #[arg(long)]
    budget: Option<u64>,
}

/// Put load on any host that speaks HTTP/1.1 over TLS.
///
/// Connections that the server ends are opened anew, which is told. What fails (no connection, no handshake, a status from 400
/// on, an answer cut short) is counted, the first of it is told, and the load goes on; exit status 1 then.
#[derive(Args, Debug)]
struct LoadOptions {
    /// HOST:PORT.
    target: String,
    #[arg(long, value_enum, default_value = "request")]
    kind: Kind,
    /// Connections at once.
    #[arg(long)]
    connections: Option<NonZeroUsize>,
    /// How long; `up` and `both` end when --upload-mib are through.
    #[arg(long, default_value = "10", value_parser = seconds)]
    seconds: Duration,
    /// Requests per second of an open loop.
    #[arg(long, default_value_t = 1000.0)]
    rate: f64,
    /// A path of the server's own; absent: those of `tlsplice-bench upstream`. Downloads of it are repeated until the time is up.
    #[arg(long)]
    path: Option<String>,
    /// The name to ask for (SNI, Host) and to verify; absent: the host.
    #[arg(long)]
    name: Option<String>,
    /// Certificates to trust, as PEM.
    #[arg(long, default_value = "/etc/ssl/certs/ca-certificates.crt")]
    ca: PathBuf,
    /// Take any certificate.
    #[arg(long, conflicts_with = "ca")]
    insecure: bool,
    /// No TLS at all.
    #[arg(long)]
    plain: bool,
    /// Only TLS_AES_256_GCM_SHA384 and X25519MLKEM768, as in comparisons.
    #[arg(long)]
    strict: bool,
    /// MiB that each connection of `up` and `both` sends.
    #[arg(long, default_value_t = 64)]
    upload_mib: u64,
    /// KiB that each connection of `fetch` and `store` moves.
    #[arg(long, default_value_t = 64)]
    transfer_kib: u64,
    /// One JSON object on standard output instead of lines for people.
    #[arg(long)]
    json: bool,
}

/// The server that the comparison has behind every peer, for a host of your own.
#[derive(Args, Debug)]
struct UpstreamOptions {
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
}

/// Say whether the second result is worse than the first, or lacks what the first has; exit status 1 if so.
#[derive(Args, Debug)]
struct CompareOptions {
    before: PathBuf,
    after: PathBuf,
    /// Only these kinds of work, where the second run was not asked for all.
    #[arg(long, value_enum, value_delimiter = ',')]
    kinds: Vec<Kind>,
}

/// Make an HTML page of a result: one file that opens from disk.
#[derive(Args, Debug)]
struct ReportOptions {
    file: PathBuf,
    /// The page; absent: beside the result.
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct RelayOptions {
    #[arg(long, value_enum)]
    mode: Mode,
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    upstream: SocketAddr,
}

fn main() -> ExitCode {
    match perform(Cli::parse().command) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn perform(task: Task) -> Result<ExitCode> {
    match task {
        Task::Run(options) => run(&options)?,
        Task::Load(options) => return put_load(&options),
        Task::Upstream(options) => {
            let address = upstream::start(options.listen)?;
            println!("listening on {address}: GET /bytes/N, POST /");
            loop {
                std::thread::park();
            }
        }
        Task::Compare(options) => {
            let (before, after) = (Run::read(&options.before)?, Run::read(&options.after)?);
            let mut changes = compare::compare(&before, &after);
            changes.retain(|change| options.kinds.is_empty() || options.kinds.contains(&change.kind));
            if changes.iter().all(|change| change.verdict == Verdict::Missing) {
                bail!("the two results have no row of tlsplice's in common");
            }
            for difference in compare::differences(&before, &after) {
                eprintln!("measured differently: {difference}");
            }
            print!("{}", compare::show(&changes));
            if changes.iter().any(|change| change.verdict.is_bad()) {
                return Ok(ExitCode::FAILURE);
            }
        }
        Task::Report(options) => {
            let out = options.out.unwrap_or_else(|| options.file.with_extension("html"));
            write_report(&Run::read(&options.file)?, &out)?;
        }
        Task::Curve { file } => print!("{}", curve::show_file(&file)?),
        Task::Show { file } => print!("{}", table::show(&Run::read(&file)?)),
        Task::PlainRelay(options) => plain_relay::serve(options.mode, options.listen, options.upstream)?,
        Task::CallCost => println!("{:.1}", machine::call_ns()),
    }
    Ok(ExitCode::SUCCESS)
}

fn write_report(run: &Run, out: &Path) -> Result<()> {
    std::fs::write(out, report::page(run)).with_context(|| format!("write {}", out.display()))?;
    eprintln!("report: {}", out.display());
    Ok(())
}

/// A folder for one run, removed at its end.
struct Workplace(PathBuf);

impl Workplace {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("tlsplice-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn absolute(path: Option<&Path>) -> Result<Option<PathBuf>> {
    path.map(|path| std::path::absolute(path).with_context(|| format!("find {}", path.display()))).transpose()
}

fn run(options: &RunOptions) -> Result<()> {
    let work = Workplace::new()?;
    let line_up = Peer::line_up(machine::Machine::look().kernel_tls);
    let mut peers = line_up.clone();
    if options.peers.is_empty() && !options.curve.is_empty() {
        peers.retain(|peer| CURVE_PEERS.contains(&peer.name()));
    }
    if !options.peers.is_empty() {
        let known = line_up.iter().map(|peer| peer.name()).collect::<Vec<_>>();
        if let Some(unknown) = options.peers.iter().find(|name| !known.contains(&name.as_str())) {
            bail!("--peers {unknown}: on this kernel there are {}", known.join(", "));
        }
        peers.retain(|peer| options.peers.iter().any(|name| name == peer.name()));
    }
    let plan = Plan {
        // Peers are started in folders of their own.
        programs: Programs {
            tlsplice: absolute(options.tlsplice.as_deref())?,
            root: absolute(options.peers_root.as_deref())?,
        },
        peers,
        kinds: if options.kinds.is_empty() && options.curve.is_empty() {
            Kind::ALL.into_iter().filter(|kind| kind.is_compared()).collect()
        } else {
            options.kinds.clone()
        },
        curve: options.curve.iter().map(|kib| kib << 10).collect(),
        rounds: options.rounds.unwrap_or(if options.quick { 5 } else { 9 }),
        seconds: options.seconds.map_or(if options.quick { 0.3 } else { 0.8 }, |time| time.as_secs_f64()),
        workers: options.workers,
        pin: !options.no_pin,
        idle_connections: options.idle_connections.unwrap_or(if options.quick { 300 } else { 1000 }),
        upload_bytes: options.upload_mib.unwrap_or(if options.quick { 32 } else { 96 }) << 20,
        limit: options.limit,
        native_call_ns: options.native_call_ns,
        counted: options.counted,
        folder: work.0.clone(),
        commit: options.commit.clone(),
        budget: Duration::from_secs(options.budget.unwrap_or(if options.quick { QUICK_BUDGET_S } else { BUDGET_S })),
    };
    let result = measure::run(&plan)?;
    // Where instructions are counted a time means nothing, and whoever counts them has a table of its own.
    print!("{}", if options.counted { table::head(&result) } else { table::show(&result) });
    if let Some(file) = &options.json {
        result.write(file)?;
        eprintln!("result: {}", file.display());
    }
    if let Some(file) = &options.html {
        write_report(&result, file)?;
    }
    Ok(())
}

fn put_load(options: &LoadOptions) -> Result<ExitCode> {
    let _ = machine::raise_descriptor_limit();
    let address = options.target.to_socket_addrs().with_context(|| format!("{} is no HOST:PORT", options.target))?;
    let address = address.into_iter().next().with_context(|| format!("{} has no address", options.target))?;
    let host = options.target.rsplit_once(':').map_or(options.target.as_str(), |(host, _)| host);
    let name = options.name.clone().unwrap_or_else(|| host.trim_matches(['[', ']']).to_owned());
    let tls = if options.plain {
        None
    } else {
        let trust = if options.insecure { Trust::Anybody } else { trusted(&options.ca)? };
        Some(Protection { trust, any_parameters: !options.strict })
    };
    let target = Target { address, name: ServerName::try_from(name).context("the server's name")?, tls };
    let mut load = Load::of(options.kind, options.seconds);
    load.connections = options.connections.map_or(load.connections, NonZeroUsize::get);
    load.rate = options.rate;
    load.upload_bytes = options.upload_mib << 20;
    load.transfer_bytes = options.transfer_kib << 10;
    load.path.clone_from(&options.path);
    let outcome = load::run(&target, &load, &mut |_| Ok(()))?;
    if options.json {
        println!("{}", said_to_a_script(&load, &outcome));
    } else {
        say(&load, &outcome);
    }
    Ok(if outcome.count.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A time in seconds.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err("a time above 0 s".into()),
    }
}

/// Latency by its names, in µs; none where the kind has none.
fn latencies(count: &Count) -> Vec<(&'static str, u64)> {
    let quantiles = [0.5, 0.9, 0.99, 0.999, 1.0];
    if count.latency.is_empty() {
        return Vec::new();
    }
    PERCENTILES.into_iter().zip(quantiles.map(|share| count.latency.value_at_quantile(share))).collect()
}

fn said_to_a_script(load: &Load, outcome: &Outcome) -> serde_json::Value {
    let (seconds, count) = (outcome.elapsed.as_secs_f64(), &outcome.count);
    let unit = match load.kind.unit() {
        load::Unit::Byte => "bytes",
        load::Unit::Connection => "connections",
        load::Unit::Request => "requests",
    };
    let latency: serde_json::Map<_, _> =
        latencies(count).into_iter().map(|(name, us)| (name.to_owned(), us.into())).collect();
    serde_json::json!({
        "kind": load.kind.to_possible_value().map(|value| value.get_name().to_owned()),
        "unit": unit,
        "units": count.units,
        "seconds": seconds,
        "units_per_second": count.units as f64 / seconds,
        "resumed": count.resumed,
        "reopened": count.reopened,
        "failed": count.failed,
        "failure": count.failure,
        "latency_us": latency,
    })
}

fn say(load: &Load, outcome: &Outcome) {
    let (seconds, count) = (outcome.elapsed.as_secs_f64(), &outcome.count);
    match load.kind.unit() {
        load::Unit::Byte => {
            let mib = count.units as f64 / f64::from(1 << 20);
            println!("{mib:.0} MiB in {seconds:.2} s: {:.1} MiB/s", mib / seconds);
        }
        load::Unit::Connection if load.kind == Kind::Idle => {
            println!("{} connections were held for {seconds:.2} s", count.units);
        }
        load::Unit::Connection | load::Unit::Request => {
            println!("{} in {seconds:.2} s: {:.1} per second", count.units, count.units as f64 / seconds);
        }
    }
    if load.kind == Kind::Resumed {
        println!("{} of {} were resumed", count.resumed, count.units);
    }
    let latency: Vec<String> = latencies(count).into_iter().map(|(name, us)| format!("{name} {us} µs")).collect();
    if !latency.is_empty() {
        println!("latency: {}", latency.join(", "));
    }
    if count.reopened > 0 {
        println!("{} connections were opened anew where the server had ended the last", count.reopened);
    }
    if let Some(failure) = &count.failure {
        println!("{} FAILED, the first of them: {failure}", count.failed);
    }
}

fn trusted(file: &Path) -> Result<Trust> {
    let mut roots = rustls::RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(file)
        .with_context(|| format!("read {}: name a file by --ca, or use --insecure", file.display()))?;
    for certificate in certificates {
        roots.add(certificate.with_context(|| format!("read {}", file.display()))?).context("trust a certificate")?;
    }
    Ok(Trust::Roots(Arc::new(roots)))
}
