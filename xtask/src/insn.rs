//! Counts the instructions that tlsplice and its peers cost on their own virtual CPU, in guests with counted time.
//!
//!   plugin, static programs, peers ─▶ guest: `tlsplice-bench run --counted` ─▶ marks (plugin) + lines (bench) ─▶ table, check
//!
//! The proxy is held to the last virtual CPU and everything else to the first. A count repeats to a few per cent whatever else the
//! machine does, so it is also the guard that noise cannot fool: `--check` against `bench/results/insn.json`. Instructions are
//! no time: a processor has caches, wider ciphers, and waits.

use crate::first_process::{self, cargo, target_folder, workspace};
use crate::kernels::{self, Choice, Kernel};
use crate::qemu::{Counted, Guest, GuestEnded};
use crate::rootfs::{self, Contents};
use crate::setup::{self, Group};
use crate::suite::{self, Workplace};
use crate::{peers, process, progress};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Measured unless others are named: our ways, and the peers that relay the same.
const PEERS: &str = "tlsplice,tlsplice-kernel,tlsplice-ring,tlsplice-userspace,nginx-stream-ktls,nginx-stream,nginx-http-ktls,\
    nginx-http,haproxy-tcp";
const KINDS: &str = "handshake,request,down,up";
/// Bytes that one counted instruction moves in a repeated string instruction: what an unrolled copy does.
const BYTES_PER_INSTRUCTION: f64 = 4.0;
/// The virtual CPU of the proxies.
const PROXY_CPU: usize = 1;
/// Where the peers lie in the guest.
const PEERS_ROOT: &str = "/peers";
/// By how much a figure may exceed the recorded one.
const TOLERANCE: f64 = 0.05;
const GIB: f64 = (1_u64 << 30) as f64;

/// Count instructions per unit of work on the proxy's own CPU, in guests.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// A series such as 6.12, "newest", or "all". 6.1 hangs under counted time.
    #[arg(long, default_value = "newest", value_parser = Choice::parse)]
    kernel: Choice,
    /// Names of peers, with commas.
    #[arg(long, default_value = PEERS)]
    peers: String,
    /// Kinds of work, with commas.
    #[arg(long, default_value = KINDS)]
    kinds: String,
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds of counted time of each measurement: so many thousand million instructions.
    #[arg(long, default_value_t = 0.15)]
    seconds: f64,
    /// Fail if tlsplice takes more than recorded.
    #[arg(long)]
    check: bool,
    /// Record what was counted.
    #[arg(long, conflicts_with = "check")]
    record: bool,
    /// Seconds that one guest may take.
    #[arg(long, default_value_t = 3000)]
    timeout: u64,
    /// MiB of memory of one guest.
    #[arg(long, default_value_t = 3072)]
    memory: u32,
}

/// `cargo xtask insn`.
pub fn command(options: &Options) -> Result<i32> {
    setup::make_sure(&[Group::Build, Group::Guests, Group::Peers])?;
    let found = kernels::obtain(&options.kernel)?;
    let plugin = plugin()?;
    let built = first_process::static_build(&[
        "--package",
        "tlsplice",
        "--package",
        "tlsplice-bench",
        "--bin",
        "tlsplice",
        "--bin",
        "tlsplice-bench",
    ])?;
    let work = Workplace::new()?;
    let mut failed = false;
    for kernel in &found.kernels {
        let counts = count(kernel, &built, &plugin, options, &work)?;
        counts.show(&kernel.series);
        let file = workspace().join("bench/results/insn.json");
        if options.record {
            counts.record(&file, &kernel.series)?;
        }
        if options.check {
            failed |= !counts.check(&file, &kernel.series)?;
        }
    }
    Ok(i32::from(failed))
}

/// The plugin as a shared object.
fn plugin() -> Result<PathBuf> {
    let mut build = Command::new(cargo());
    build.args(["build", "--release", "--package", "tlsplice-bench", "--example", "insn-plugin"]);
    process::run(build.current_dir(workspace()))?;
    Ok(target_folder().join("release/examples/libinsn_plugin.so"))
}

fn count(kernel: &Kernel, built: &Path, plugin: &Path, options: &Options, work: &Workplace) -> Result<Counts> {
    let marks = work.folder("marks")?.join(format!("{}.json", kernel.series));
    let bin = Path::new("/usr/bin");
    let taskset = process::find("taskset").context("taskset is missing: run cargo xtask setup")?;
    let programs = vec![
        (bin.join("tlsplice"), built.join("tlsplice")),
        (bin.join("tlsplice-bench"), built.join("tlsplice-bench")),
        (bin.join("taskset"), taskset),
    ];
    let words = ["tlsplice-bench", "run", "--counted", "--tlsplice", "/usr/bin/tlsplice", "--peers-root", PEERS_ROOT];
    let mut command: Vec<OsString> = words.map(OsString::from).to_vec();
    for (option, value) in [
        ("--peers", options.peers.clone()),
        ("--kinds", options.kinds.clone()),
        ("--rounds", options.rounds.to_string()),
        ("--seconds", options.seconds.to_string()),
        ("--upload-mib", "4".into()),
        ("--budget", "100000".into()),
    ] {
        command.extend([option.into(), value.into()]);
    }
    let env = vec![("PATH".into(), "/usr/sbin:/usr/bin".into()), ("HOME".into(), "/root".into())];
    let contents = Contents { programs, files: peer_files()?, env, command };
    let image = work.folder("images")?.join(format!("{}.cpio", kernel.series));
    rootfs::write(kernel, &contents, &image).with_context(|| format!("make the image for {}", kernel.series))?;
    let guest = Guest {
        kernel: kernel.vmlinux(),
        image,
        console: suite::log_path(&kernel.series, "console")?,
        memory_mib: options.memory,
        cpus: 2,
        limit: Duration::from_secs(options.timeout),
        counted: Some(Counted { plugin: plugin.to_owned(), marks: marks.clone() }),
    };
    progress::note(&format!("[{}] counting in {}", kernel.series, kernel.version()?));
    let mut told = Vec::new();
    let ended = guest.run(|line| match line.strip_prefix("COUNTED ") {
        Some(rest) => told.push(rest.to_owned()),
        None => progress::note(&format!("[{}] {line}", kernel.series)),
    })?;
    match ended {
        GuestEnded::Exited(0) => {}
        other => bail!("[{}] the guest ended by {other:?}; its kernel said:\n{}", kernel.series, guest.console_tail()?),
    }
    let marks = fs::read_to_string(&marks).with_context(|| format!("read {}", marks.display()))?;
    Counts::pair(&told, &marks)
}

/// What the peers need to run in the guest: programs, modules, libraries, loader.
fn peer_files() -> Result<Vec<(PathBuf, PathBuf)>> {
    let root = peers::newest()?;
    let mut files = Vec::new();
    let mut take = |folder: &str, wanted: &dyn Fn(&str) -> bool| -> Result<()> {
        let from = root.join(folder);
        let Ok(entries) = fs::read_dir(&from) else { return Ok(()) };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // Links are followed: a copy under the name that is looked for does.
            if wanted(&name) && entry.path().is_file() {
                files.push((Path::new(PEERS_ROOT).join(folder).join(&name), entry.path()));
            }
        }
        Ok(())
    };
    take("usr/sbin", &|name| ["nginx", "haproxy", "hitch"].contains(&name))?;
    take("usr/lib/nginx/modules", &|name| name == peers::STREAM_MODULE)?;
    for folder in ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib64", "lib64"] {
        take(folder, &|name| name.contains(".so"))?;
    }
    ensure!(!files.is_empty(), "{} holds no peers", root.display());
    Ok(files)
}

/// One measurement, per unit.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    total: f64,
    /// Outside blocks that hold the cipher's instructions.
    rest: f64,
    user: f64,
    kernel: f64,
}

#[derive(Debug, Default)]
struct Counts(BTreeMap<(String, String), Vec<Count>>);

impl Counts {
    /// Puts what the bench has told beside what the plugin has counted.
    fn pair(told: &[String], marks: &str) -> Result<Self> {
        let marks: Vec<Value> =
            marks.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("read the marks")?;
        let pairs: Vec<(&Value, &Value)> = marks
            .windows(2)
            .filter(|two| two[0]["mark"] == 1 && two[1]["mark"] == 2)
            .map(|two| (&two[0]["cpus"][PROXY_CPU], &two[1]["cpus"][PROXY_CPU]))
            .collect();
        ensure!(
            pairs.len() == told.len() && !told.is_empty(),
            "the guest told of {} measurements, the plugin of {}: one of them failed",
            told.len(),
            pairs.len()
        );
        let mut counts = Self::default();
        for (line, (begin, end)) in told.iter().zip(pairs) {
            let mut words = line.split(' ');
            let (Some(kind), Some(peer), Some(units)) = (words.next(), words.next(), words.next()) else {
                bail!("{line:?} is no measurement");
            };
            let units: f64 = units.parse().with_context(|| format!("{line:?} has no number of units"))?;
            ensure!(units > 0.0, "{line:?}: nothing was done");
            let units = if ["down", "up", "both"].contains(&kind) { units / GIB } else { units };
            let of = |field: &str| (end[field].as_f64().unwrap_or(0.0) - begin[field].as_f64().unwrap_or(0.0)) / units;
            let user = of("user") + of("user_moved") / BYTES_PER_INSTRUCTION;
            let kernel = of("kernel") + of("kernel_moved") / BYTES_PER_INSTRUCTION;
            let (in_user, in_kernel) = (of("user_cipher"), of("kernel_cipher"));
            let count = Count {
                total: user + kernel + in_user + in_kernel,
                rest: user + kernel,
                user: user + in_user,
                kernel: kernel + in_kernel,
            };
            counts.0.entry((peer.into(), kind.into())).or_default().push(count);
        }
        Ok(counts)
    }

    fn show(&self, series: &str) {
        progress::line(&format!(
            "\nLinux {series}: instructions on the proxy's own CPU, median [outside the cipher; user + kernel] (spread)"
        ));
        for ((peer, kind), counts) in &self.0 {
            let (scale, unit) = scale(kind);
            let of = |pick: fn(&Count) -> f64| median(counts, pick) / scale;
            let totals = counts.iter().map(|c| c.total);
            let spread =
                (totals.clone().fold(0.0, f64::max) - totals.fold(f64::MAX, f64::min)) / median(counts, |c| c.total);
            progress::line(&format!(
                "{peer:20} {kind:10} {:8.3} {unit:9} [{:7.3}; {:7.3} + {:7.3}] ({:.1} %)",
                of(|c| c.total),
                of(|c| c.rest),
                of(|c| c.user),
                of(|c| c.kernel),
                spread * 100.0
            ));
        }
    }

    /// Adds this kernel's figures to the file, in the stead of older ones.
    fn record(&self, file: &Path, series: &str) -> Result<()> {
        let mut all = recorded(file)?;
        let mut figures = Map::new();
        for ((peer, kind), counts) in &self.0 {
            let figure =
                json!({"total": median(counts, |c| c.total).round(), "rest": median(counts, |c| c.rest).round()});
            figures.insert(format!("{peer} {kind}"), figure);
        }
        all.insert(series.into(), Value::Object(figures));
        let text = serde_json::to_string_pretty(&Value::Object(all)).context("write the figures as JSON")?;
        fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
    }

    /// Whether tlsplice takes no more than recorded.
    fn check(&self, file: &Path, series: &str) -> Result<bool> {
        let all = recorded(file)?;
        let figures = all.get(series).with_context(|| format!("{} has no Linux {series}", file.display()))?;
        let mut good = true;
        let mut compared = 0;
        for ((peer, kind), counts) in self.0.iter().filter(|((peer, _), _)| peer.starts_with("tlsplice")) {
            let Some(old) = figures[&format!("{peer} {kind}")]["total"].as_f64() else { continue };
            let factor = median(counts, |c| c.total) / old;
            compared += 1;
            let verdict = if factor > 1.0 + TOLERANCE { "MORE THAN RECORDED" } else { "as recorded" };
            good &= factor <= 1.0 + TOLERANCE;
            progress::line(&format!("{peer} {kind}: {factor:.3} times the recorded figure: {verdict}"));
        }
        ensure!(compared > 0, "nothing that was counted is recorded in {}", file.display());
        Ok(good)
    }
}

fn recorded(file: &Path) -> Result<Map<String, Value>> {
    if !file.exists() {
        return Ok(Map::new());
    }
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} holds no figures", file.display()))
}

fn median(counts: &[Count], pick: fn(&Count) -> f64) -> f64 {
    let mut values: Vec<f64> = counts.iter().map(pick).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn scale(kind: &str) -> (f64, &'static str) {
    match kind {
        "down" | "up" | "both" => (1e9, "G/GiB"),
        "request" | "open-loop" => (1e3, "k/request"),
        _ => (1e6, "M/conn."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(mark: u32, user: u64, moved: u64) -> String {
        let cpu = |user, moved| json!({"user": user, "kernel": 10, "user_cipher": 0, "kernel_cipher": 0, "user_moved": moved, "kernel_moved": 0});
        json!({"mark": mark, "cpus": [cpu(7, 7), cpu(user, moved)]}).to_string()
    }

    #[test]
    fn what_was_told_meets_what_was_counted() {
        let marks = [mark(1, 100, 0), mark(2, 600, 400), mark(1, 600, 400), mark(2, 1800, 400)].join("\n");
        let counts = Counts::pair(&["request a 10".into(), "request a 20".into()], &marks).unwrap();
        let series = &counts.0[&("a".to_owned(), "request".to_owned())];
        assert_eq!(series.iter().map(|c| c.total).collect::<Vec<_>>(), [60.0, 60.0]);
        assert!(Counts::pair(&["request a 10".into()], &marks).is_err(), "a failed measurement is not passed over");
    }
}
