//! Runs the tests one after the other, bounds each in time, prints what came of it, and sums up.
//!
//!     ok NAME (seconds) | FAILED NAME: why | again NAME: why | note: figures
//!     SUMMARY {"kernel":…,"passed":…,"failed":…,"offloaded":…,"spliced_bytes":…,"copied_bytes":…}

use crate::certificate::Certificates;
use crate::environment::{Environment, Kernel, Relay};
use crate::scrape::Metrics;
use crate::{process, suite};
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

type Claim = dyn Fn(&Context) -> Result<()> + Send + Sync;

/// One claim, and the time that it may take.
pub struct Test {
    pub name: String,
    pub limit: Duration,
    pub run: Arc<Claim>,
}

/// For tests that say nothing else: natively, and under emulation.
const LIMIT_NATIVE: Duration = Duration::from_secs(60);
const LIMIT_GUEST: Duration = Duration::from_secs(180);

impl Test {
    pub fn new(env: &Environment, name: &str, run: impl Fn(&Context) -> Result<()> + Send + Sync + 'static) -> Self {
        Self { name: name.to_owned(), limit: env.scale(LIMIT_NATIVE, LIMIT_GUEST), run: Arc::new(run) }
    }

    /// The same claim for each relay of this run: for what the relays do themselves. Under emulation, where every second
    /// counts, the default runs in every guest, and each that can be asked for in one of four.
    pub fn each_relay(env: &Environment, name: &str, run: fn(&Context, Relay) -> Result<()>) -> Vec<Self> {
        let mut relays = env.relays().to_vec();
        if let Kernel::Guest(series) = env.kernel {
            let second = [Some(Relay::Inline), None, Some(Relay::Ring), None][(turn(series) + name.len()) % 4];
            relays.retain(|relay| *relay == Relay::Auto || Some(*relay) == second);
        }
        relays.into_iter().map(|relay| Self::by_relay(env, name, relay, run)).collect()
    }

    /// The same for a claim about what is the same behind every relay: under emulation one of them runs, and the guests
    /// take turns at which.
    pub fn one_relay(env: &Environment, name: &str, run: fn(&Context, Relay) -> Result<()>) -> Vec<Self> {
        let relays = match env.kernel {
            Kernel::Guest(series) => std::slice::from_ref(&env.relays()[turn(series) % env.relays().len()]),
            Kernel::Host | Kernel::Uml => env.relays(),
        };
        relays.iter().map(|relay| Self::by_relay(env, name, *relay, run)).collect()
    }

    /// The same for a claim that the kernel has little to do with: every second guest makes it.
    pub fn some_guests(env: &Environment, name: &str, run: fn(&Context, Relay) -> Result<()>) -> Vec<Self> {
        match env.kernel {
            Kernel::Guest(series) if (turn(series) + name.len()) % 2 == 1 => Vec::new(),
            _ => Self::one_relay(env, name, run),
        }
    }

    fn by_relay(env: &Environment, name: &str, relay: Relay, run: fn(&Context, Relay) -> Result<()>) -> Self {
        Self::new(env, &format!("{name}[{}]", relay.name()), move |ctx: &Context| run(ctx, relay))
    }
}

/// Where a guest is in what the guests share among them.
fn turn(series: &str) -> usize {
    match series {
        "6.12" => 0,
        "6.1" => 1,
        "6.18" => 2,
        _ => 3,
    }
}

/// What a test is given.
pub struct Context {
    pub environment: Environment,
    pub certificates: Certificates,
    pub totals: Totals,
    test: Mutex<String>,
    logs: Mutex<Vec<PathBuf>>,
}

/// Over all tlsplices that were stopped in order.
#[derive(Debug, Default)]
pub struct Totals {
    offloaded: AtomicU64,
    spliced: AtomicU64,
    copied: AtomicU64,
}

impl Totals {
    pub fn add(&self, metrics: &Metrics) {
        self.offloaded.fetch_add(metrics.offloaded(), Relaxed);
        self.spliced.fetch_add(metrics.spliced(), Relaxed);
        self.copied.fetch_add(metrics.copied(), Relaxed);
    }
}

impl Context {
    /// The running test, as a file name.
    pub fn test(&self) -> String {
        let name = self.test.lock().expect("no holder panics").clone();
        name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' }).collect()
    }

    /// An empty folder of this name: a test that is repeated finds nothing of the first time.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.environment.tmp.join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    pub fn note(&self, text: &str) {
        println!("note: {}: {text}", self.test.lock().expect("no holder panics"));
    }

    /// A log to be shown if the test fails.
    pub fn watch_log(&self, path: &Path) {
        let mut logs = self.logs.lock().expect("no holder panics");
        if !logs.iter().any(|log| log == path) {
            logs.push(path.to_owned());
        }
    }

    fn begin(&self, name: &str) {
        name.clone_into(&mut self.test.lock().expect("no holder panics"));
        self.logs.lock().expect("no holder panics").clear();
    }

    fn log_tails(&self) -> String {
        let logs = self.logs.lock().expect("no holder panics");
        logs.iter().map(|log| format!("  log {}:\n{}\n", log.display(), tail(log))).collect()
    }

    fn remove_logs(&self) {
        for log in self.logs.lock().expect("no holder panics").iter() {
            // In a guest they would fill its memory.
            let _ = fs::remove_file(log);
            let _ = fs::remove_file(log.with_extension("toml"));
        }
    }
}

const TAIL_LINES: usize = 25;

pub fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_else(|e| e.to_string());
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

struct Arguments {
    filters: Vec<String>,
    /// So many of them are done already, by a run that was broken off.
    done: usize,
    list: bool,
}

fn arguments() -> Result<Arguments> {
    let mut found = Arguments { filters: Vec::new(), done: 0, list: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match (word.as_str(), words.next()) {
            ("--filter", Some(filter)) => found.filters.push(filter),
            ("--done", Some(count)) => found.done = count.parse().context("--done takes a number of tests")?,
            ("--list", None) => found.list = true,
            (other, _) => bail!("{other}: usage: tlsplice-suite [--list] [--done COUNT] [--filter PART_OF_A_NAME]..."),
        }
    }
    Ok(found)
}

const EXIT_USAGE: u8 = 2;

pub fn main() -> ExitCode {
    match start() {
        Ok(code) => code,
        Err(why) => {
            eprintln!("tlsplice-suite: {why:#}");
            ExitCode::from(EXIT_USAGE)
        }
    }
}

fn start() -> Result<ExitCode> {
    let arguments = arguments()?;
    let environment = Environment::from_variables()?;
    let wanted =
        |test: &Test| arguments.filters.is_empty() || arguments.filters.iter().any(|f| test.name.contains(f.as_str()));
    let tests = suite::tests(&environment).into_iter().filter(wanted).skip(arguments.done);
    if arguments.list {
        tests.for_each(|test| println!("{}", test.name));
        fs::remove_dir(&environment.tmp)?;
        return Ok(ExitCode::SUCCESS);
    }
    process::raise_descriptor_limit();
    let certificates = Certificates::make(&environment.tmp)?;
    let (test, logs) = (Mutex::default(), Mutex::default());
    let ctx = Arc::new(Context { environment, certificates, totals: Totals::default(), test, logs });
    let mut counts = [0_u64; 2];
    for test in tests {
        let name = test.name.clone();
        let started = Instant::now();
        let mut verdict = bounded(&ctx, &test);
        if let Err(why) = &verdict {
            // Once more: a machine that is busy elsewhere makes some of these late. What passes then is named all the same.
            println!("again {name}: {why:#}\n{}", ctx.log_tails());
            verdict = bounded(&ctx, &test);
        }
        let seconds = started.elapsed().as_secs_f64();
        counts[report(&ctx, &name, seconds, verdict) as usize] += 1;
    }
    summary(&ctx, counts);
    let failed = counts[Verdict::Failed as usize];
    if failed == 0 {
        fs::remove_dir_all(&ctx.environment.tmp)?;
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
}

/// Runs a test in a thread of its own and gives up on it at its limit.
fn bounded(ctx: &Arc<Context>, test: &Test) -> Result<()> {
    ctx.begin(&test.name);
    let (done, wait) = channel();
    let (limit, inner, run) = (test.limit, ctx.clone(), test.run.clone());
    thread::Builder::new().name("test".into()).spawn(move || {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&inner)));
        let result = result.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(anyhow::anyhow!("the test panicked: {}", text.unwrap_or("?")))
        });
        // Nobody waits any more if the limit has passed.
        let _ = done.send(result);
    })?;
    match wait.recv_timeout(limit) {
        Ok(result) => result,
        Err(RecvTimeoutError::Disconnected) => bail!("the test's thread is gone"),
        Err(RecvTimeoutError::Timeout) => {
            let state = process::end_all();
            // Without its processes it comes to an end by itself, mostly; what it says then explains more.
            let last = wait.recv_timeout(Duration::from_secs(15));
            let last = last
                .map_or_else(|_| "it hangs on".into(), |r| r.err().map_or("it passed".into(), |e| format!("{e:#}")));
            bail!("not done within {limit:?}; state:\n{state}  then: {last}")
        }
    }
}

fn report(ctx: &Context, name: &str, seconds: f64, result: Result<()>) -> Verdict {
    match result {
        Ok(()) => {
            println!("ok {name} ({seconds:.1})");
            ctx.remove_logs();
            Verdict::Passed
        }
        Err(why) => {
            println!("FAILED {name}: {why:#} ({seconds:.1})\n{}", ctx.log_tails());
            Verdict::Failed
        }
    }
}

fn summary(ctx: &Context, counts: [u64; 2]) {
    let figure = |f: &AtomicU64| f.load(Relaxed);
    let summary = serde_json::json!({
        "kernel": ctx.environment.kernel.name(),
        "passed": counts[Verdict::Passed as usize],
        "failed": counts[Verdict::Failed as usize],
        "offloaded": figure(&ctx.totals.offloaded),
        "spliced_bytes": figure(&ctx.totals.spliced),
        "copied_bytes": figure(&ctx.totals.copied),
    });
    println!("SUMMARY {summary}");
}
