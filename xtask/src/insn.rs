//! Counts the instructions that tlsplice and its peers cost on their own virtual CPU, in guests with counted time.
//!
//!   plugin, static programs, peers ─▶ guest: `tlsplice-bench run --counted` ─▶ marks (plugin) + lines (bench) ─▶ table, check
//!
//! The proxy is held to the last virtual CPU and everything else to the first. A count repeats to a few per cent whatever else the
//! machine does, so it is also the guard that noise cannot fool: `--check` against `bench/results/insn.json`. Instructions are
//! no time: a processor has caches, wider ciphers, and waits. 6.1 hangs when its clock goes by instructions, so there it goes by
//! time: its figures scatter more, and are told and recorded but never checked.

mod counts;

use crate::first_process::{self, Profile, cargo, target_folder, workspace};
use crate::kernels::{self, Choice, Kernel};
use crate::qemu::{Counted, Emulation, Guest, GuestEnded};
use crate::rootfs::{self, Contents};
use crate::setup::{self, Group};
use crate::suite::{self, Workplace};
use crate::{peers, process, progress, side_by_side};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use counts::Counts;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

/// Measured unless others are named: our ways, and the peers that relay the same.
const PEERS: &str = "tlsplice,tlsplice-kernel,tlsplice-inline,tlsplice-ring,tlsplice-userspace,nginx-stream-ktls,nginx-stream,\
    nginx-http-ktls,nginx-http,haproxy-tcp";
const KINDS: &str = "handshake,request,down,up";
/// The cost curve's ways, and its sizes: instructions hardly scatter, so few do.
const CURVE_PEERS: &str = "tlsplice-userspace,tlsplice-kernel";
const CURVE_KIB: &str = "4,64,256,1024,4096";
/// Its guests hang when their clock goes by instructions.
const HANGS_BY_INSTRUCTIONS: &str = "6.1";
/// Where the clock goes by time, a measurement takes so many times as long: in a second a guest does less then.
const BY_TIME_FACTOR: f64 = 5.0;
/// Where the peers lie in the guest.
const PEERS_ROOT: &str = "/peers";

/// Count instructions per unit of work on the proxy's own CPU, in guests.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// A series such as 6.12, "newest", or "all". 6.1 hangs when its clock goes by instructions: its figures scatter, and are
    /// not checked.
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
    /// Seconds of counted time of each measurement: so many thousand million instructions. Downloads repeat to 4 % then; to 15 %
    /// in a third of it.
    #[arg(long, default_value_t = 0.3)]
    seconds: f64,
    /// Fail if tlsplice takes more than recorded.
    #[arg(long)]
    check: bool,
    /// Record what was counted.
    #[arg(long, conflicts_with = "check")]
    record: bool,
    /// Count new connections by what they move instead, in userspace and by the kernel: the cost curve.
    #[arg(long, conflicts_with_all = ["check", "kinds"])]
    curve: bool,
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
    let built = first_process::static_build(
        Profile::Release,
        &["--package", "tlsplice", "--package", "tlsplice-bench", "--bin", "tlsplice", "--bin", "tlsplice-bench"],
    )?;
    let work = Workplace::new()?;
    let file = workspace().join("bench/results/insn.json");
    // The file is read and written by one of them at a time.
    let concluding = Mutex::new(());
    let one = |kernel: &Kernel| -> Result<bool> {
        let counts = count(kernel, &built, &plugin, options, &work);
        let _alone = concluding.lock().expect("no holder of this lock panics");
        conclude(&counts?, kernel, &file, &built, options)
    };
    let good = |kernel: &Kernel| {
        // What one guest came to is not lost by another that fails.
        one(kernel).unwrap_or_else(|error| {
            progress::line(&format!("[{}] failed: {error:#}", kernel.series));
            false
        })
    };
    // Where the clock goes by instructions company changes nothing; where it goes by time there is none.
    let (counted, timed): (Vec<&Kernel>, Vec<&Kernel>) =
        found.kernels.iter().partition(|kernel| by_instructions(kernel));
    let mut all = side_by_side::perform(counted, side_by_side::processors(), good);
    all.extend(side_by_side::perform(timed, 1, good));
    Ok(i32::from(!all.into_iter().all(|good| good)))
}

/// Shows what one guest came to, keeps it and judges it, as far as is asked for.
fn conclude(counts: &Counts, kernel: &Kernel, file: &Path, built: &Path, options: &Options) -> Result<bool> {
    if options.curve {
        curve(counts, &kernel.series, built, options.record)?;
        return Ok(true);
    }
    counts.show(&kernel.series);
    if options.record {
        counts.record(file, &kernel.series)?;
    }
    if options.check && !by_instructions(kernel) {
        progress::line(&format!("[{}] not checked: its clock goes by time, and its figures scatter", kernel.series));
    } else if options.check {
        return counts.check(file, &kernel.series);
    }
    Ok(true)
}

/// Keeps the curve of one kernel beside those of others, and shows it.
fn curve(counts: &Counts, series: &str, built: &Path, record: bool) -> Result<()> {
    let results = workspace().join("bench/results");
    let folder = if record { results } else { crate::bench::results()? };
    let file = folder.join("insn-curve.json");
    counts.keep_curve(&file, series)?;
    // What runs in the guest runs here too.
    progress::line(&process::text(Command::new(built.join("tlsplice-bench")).arg("curve").arg(&file))?);
    Ok(())
}

fn by_instructions(kernel: &Kernel) -> bool {
    kernel.series != HANGS_BY_INSTRUCTIONS
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
    let (peers, of) = if options.curve {
        (CURVE_PEERS, ("--curve", CURVE_KIB))
    } else {
        (options.peers.as_str(), ("--kinds", options.kinds.as_str()))
    };
    for (option, value) in [
        ("--peers", peers.into()),
        (of.0, of.1.into()),
        ("--rounds", options.rounds.to_string()),
        ("--seconds", (options.seconds * if by_instructions(kernel) { 1.0 } else { BY_TIME_FACTOR }).to_string()),
        ("--upload-mib", "4".into()),
        ("--budget", "100000".into()),
    ] {
        command.push(format!("{option}={value}").into());
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
        emulation: Emulation::Counted(Counted {
            plugin: plugin.to_owned(),
            marks: marks.clone(),
            by_instructions: by_instructions(kernel),
        }),
        limit: Duration::from_secs(options.timeout),
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
