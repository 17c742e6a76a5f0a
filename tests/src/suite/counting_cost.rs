//! What counting in the kernel costs, in CPU time of tlsplice and in runs of the program.

use super::kernel_metrics::{Pins, default_relay};
use crate::counted::{Kind, Server, Truth, client_config, connect, storm};
use crate::environment::Environment;
use crate::proxy::{Proxy, Settings};
use crate::run::{Context, Test};
use crate::scrape::Threads;
use anyhow::{Result, ensure};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

pub fn tests(env: &Environment) -> Vec<Test> {
    // Times under emulation mean nothing.
    if !env.counts_in_kernel() || env.is_guest() {
        return Vec::new();
    }
    let mut test = Test::new(env, "what_counting_in_the_kernel_costs_is_told", cost);
    test.limit = env.scale(Duration::from_secs(240), Duration::from_secs(900));
    vec![test]
}

/// Pairs of a run without counting and one with it, each compared within itself.
const COST_PAIRS: usize = 9;
/// Far above what was ever measured (7 %), and below what a mistake in the program would cost: this machine may be busy.
const COST_LIMIT: f64 = 1.5;

/// CPU of tlsplice.
#[derive(Default)]
struct Spent {
    /// For each connection of a storm, in nanoseconds.
    connection: Vec<u64>,
    /// For each MiB of one long download, in nanoseconds.
    mebibyte: Vec<u64>,
}

fn cost(ctx: &Context) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let config = client_config(ctx)?;
    let (count, mebibytes) = (1_000, 256);
    let (mut without, mut with, mut runs) = (Spent::default(), Spent::default(), None);
    for run in 0..2 * COST_PAIRS {
        let mut settings = Settings::new(ctx, default_relay(ctx))?.listen(50_000, &server.address.to_string())?;
        let spent = if run % 2 == 1 { &mut with } else { &mut without };
        if run % 2 == 1 {
            pins.settings(&mut settings);
        }
        let proxy = Proxy::start(ctx, settings)?;
        let spent_since =
            |before: &Threads| -> Result<u64> { Ok(Threads::of(proxy.pid())?.cpu_since(before).as_nanos() as u64) };
        let storm = |count| -> Result<u64> {
            let before = Threads::of(proxy.pid())?;
            storm(4, count, |_, random| {
                let sizes = (random.range(1, 4_000), random.range(1, 4_000));
                connect(&config, proxy.address(0), &truth, Kind::Clean, sizes)
            })?;
            proxy.settled()?;
            spent_since(&before)
        };
        storm(50)?;
        spent.connection.push(storm(count)? / count);
        let before = Threads::of(proxy.pid())?;
        connect(&config, proxy.address(0), &truth, Kind::Clean, (0, mebibytes << 20))?;
        spent.mebibyte.push(spent_since(&before)? / mebibytes);
        if run == 2 * COST_PAIRS - 1 {
            runs = program_runs(ctx, &pins, || storm(count).map(drop))?;
        }
        proxy.finish(ctx)?;
    }
    let (ratio, storm) = compared(&without.connection, &with.connection);
    let (bulk_ratio, bulk) = compared(&without.mebibyte, &with.mebibyte);
    let (each, ns) = runs.map_or((0.0, 0.0), |(n, seconds)| (n / count as f64, seconds / n * 1e9));
    ctx.note(&format!(
        "CPU of tlsplice, {COST_PAIRS} pairs: a connection {storm}; a MiB of bulk {bulk}; bpf_stats: {each:.1} runs a connection, {ns:.0} ns each"
    ));
    ensure!(
        ratio < COST_LIMIT && bulk_ratio < COST_LIMIT,
        "counting costs {ratio:.2} and {bulk_ratio:.2} times as much"
    );
    Ok(())
}

/// How many times as much it is with counting: the median of the pairs' ratios, and all of it in words.
fn compared(without: &[u64], with: &[u64]) -> (f64, String) {
    let middle = |series: &[u64]| {
        let mut sorted = series.to_vec();
        sorted.sort_unstable();
        sorted[sorted.len() / 2]
    };
    let mut ratios: Vec<f64> = without.iter().zip(with).map(|(off, on)| *on as f64 / *off as f64).collect();
    ratios.sort_unstable_by(f64::total_cmp);
    let ratio = ratios[ratios.len() / 2];
    let percent = |ratio: f64| 100.0 * (ratio - 1.0);
    let said = format!(
        "{} ns without, {} ns with ({:+.1} %; {:+.1} to {:+.1})",
        middle(without),
        middle(with),
        percent(ratio),
        percent(ratios[0]),
        percent(ratios[ratios.len() - 1])
    );
    (ratio, said)
}

/// How often the program runs in this load and for how many seconds; `None` where the kernel tells of no runs.
fn program_runs(ctx: &Context, pins: &Pins, load: impl FnOnce() -> Result<()>) -> Result<Option<(f64, f64)>> {
    let stats = Path::new("/proc/sys/kernel/bpf_stats_enabled");
    if fs::write(stats, "1").is_err() {
        return Ok(None);
    }
    let fetch = || -> Result<[f64; 2]> {
        let text = pinned_text(ctx, &pins.folder())?;
        Ok(["tlsplice_ebpf_runs_total", "tlsplice_ebpf_run_seconds_total"].map(|name| float(&text, name)))
    };
    let then = fetch()?;
    let loaded = load();
    let now = fetch()?;
    let _ = fs::write(stats, "0");
    loaded?;
    ensure!(now[0] > then[0], "the program has not run: {now:?}");
    Ok(Some((now[0] - then[0], now[1] - then[1])))
}

fn pinned_text(ctx: &Context, pins: &Path) -> Result<String> {
    let output = Command::new(&ctx.environment.bin).arg("metrics").arg("--pins").arg(pins).output()?;
    ensure!(output.status.success(), "tlsplice metrics: {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// The value of a sample without labels; 0 if there is none.
fn float(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.parse().ok()).unwrap_or(0.0)
}
