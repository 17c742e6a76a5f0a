//! The whole test command: unit tests, then one test binary on the host, in user-mode Linux and in every guest.
//!
//!   kernels fetched ─┬─▶ guests, one for each processor ─────┬─▶ a table, and `N passed, M failed, K skipped`
//!   cargo build ─────┼─▶ beside them the host, and then ─────┘
//!   uml built ───────┘   user-mode Linux
//!
//! A run that breaks is a row of the table and a failure, and the others still run.

use crate::first_process::{self, Profile};
use crate::kernels::{self, Choice, Found, Kernel};
use crate::process::{self, Ended};
use crate::progress;
use crate::qemu::Emulation;
use crate::setup::{self, Group};
use crate::suite::{self, Binaries, Exit, Listener, Offload, Report, UNIT_TESTED, Workplace};
use crate::table::{Row, conclude};
use crate::{judges, peers, side_by_side, uml, uml_build, vm};
use anyhow::{Context, Result, anyhow};
use clap::Args;
use std::ffi::OsString;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

/// What one run may take: twice what it takes on two processors that run others beside it.
const RUN_LIMIT: Duration = Duration::from_secs(2700);
/// Series whose runs have been clean from end to end. Another, such as a new newest, runs and is shown, failures and all,
/// but does not fail the command: a series comes in here once it has passed, and none leaves.
const ENFORCED_GUESTS: &[&str] = &["6.1", "6.12", "6.18", "7.2"];
/// Memory of a guest: the largest test holds a thousand connections whose buffers are full.
const GUEST_MEMORY_MIB: u32 = 6144;
/// Memory of user-mode Linux. A sixteenth of it is where the kernel calls TCP's buffers too much (net.ipv4.tcp_mem), and
/// there the tests' clients and upstreams have theirs too.
const UML_MEMORY: &str = "8G";

/// Run all tests: on this host, in user-mode Linux, in guests.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Where, several with commas: host, uml, a series such as 6.12, newest, or all.
    #[arg(long, default_value = "all", value_delimiter = ',', value_parser = Place::parse)]
    kernel: Vec<Place>,
    /// Only tests whose name contains this.
    #[arg(long)]
    filter: Option<String>,
}

/// Where tests run.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Everywhere,
    Host,
    Uml,
    Guest(Choice),
}

impl Place {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::Everywhere),
            "host" => Ok(Self::Host),
            "uml" => Ok(Self::Uml),
            other => match Choice::parse(other) {
                Ok(choice) => Ok(Self::Guest(choice)),
                Err(_) => Err(format!("{other:?} is none of host, uml, newest, all, or a series such as 6.12")),
            },
        }
    }
}

/// `cargo xtask test`.
pub fn command(options: &Options) -> Result<i32> {
    let everywhere = options.kernel.contains(&Place::Everywhere);
    let (host, in_uml) =
        (everywhere || options.kernel.contains(&Place::Host), everywhere || options.kernel.contains(&Place::Uml));
    let mut guests: Vec<Choice> =
        options.kernel.iter().filter_map(|p| if let Place::Guest(c) = p { Some(c.clone()) } else { None }).collect();
    if everywhere {
        guests = vec![Choice::All];
    }
    let mut groups = vec![Group::Build, Group::Peers];
    groups.extend(in_uml.then_some(Group::Uml));
    groups.extend((!guests.is_empty()).then_some(Group::Guests));
    setup::make_sure(&groups)?;
    let work = Workplace::new()?;
    let arguments: Vec<OsString> =
        options.filter.iter().flat_map(|filter| ["--filter".into(), filter.into()]).collect();

    // The guests need not wait for it.
    let linux = in_uml.then(|| thread::spawn(uml_build::obtain));
    let Prepared { unit, binaries, kernels } = prepare(options, &work, &guests);
    let mut rows = vec![Row::new("unit", unit)];
    let binaries = match binaries {
        Ok(binaries) => binaries,
        Err(error) => {
            rows.push(Row::new("build", Err(error)));
            return Ok(conclude(&rows));
        }
    };
    let mut guests: Vec<Run<'_>> = Vec::new();
    let mut at_once = 1;
    let mut missing = Vec::new();
    match kernels {
        Ok(found) => {
            let emulation;
            (at_once, emulation) = guests_at_once(found.kernels.len());
            let size = vm::Size { memory_mib: GUEST_MEMORY_MIB, emulation, limit: RUN_LIMIT };
            let guest = |kernel: Kernel| {
                let enforced = ENFORCED_GUESTS.contains(&kernel.series.as_str());
                let (binaries, arguments, work, size) = (&binaries, &arguments, &work, size.clone());
                Run::new(&kernel.series.clone(), enforced, move || {
                    vm::tests(&kernel, binaries, Vec::new(), arguments, &size, work)
                })
            };
            guests.extend(found.kernels.into_iter().map(guest));
            missing = found.missing;
        }
        Err(error) => guests.push(Run::new("guests", true, || Err(error))),
    }
    let mut beside: Vec<Run<'_>> = Vec::new();
    if host {
        beside.push(Run::new("host", true, || on_host(&binaries, &arguments, &work)));
    }
    if let Some(linux) = linux {
        beside.push(Run::new("uml", true, || in_user_mode(joined(linux.join())?, &binaries, &arguments, &work)));
    }
    rows.extend(perform_all(beside, guests, at_once));
    rows.extend(missing.into_iter().map(|(series, reason)| Row::declared(&series, reason)));
    Ok(conclude(&rows))
}

/// The tests on one kernel, to be run.
struct Run<'a> {
    name: String,
    /// Its failure is the command's.
    enforced: bool,
    perform: Box<dyn FnOnce() -> Result<Report> + Send + 'a>,
}

impl<'a> Run<'a> {
    fn new(name: &str, enforced: bool, perform: impl FnOnce() -> Result<Report> + Send + 'a) -> Self {
        Self { name: name.to_owned(), enforced, perform: Box::new(perform) }
    }

    fn perform(self) -> Row {
        let row = Row::new(&self.name, (self.perform)());
        if self.enforced { row } else { row.unenforced() }
    }
}

/// Guests in their order, so many at a time; the others beside them, one after the other: the host waits for clocks half of
/// its time, user-mode Linux has one processor. No test asserts a time that company would spoil.
fn perform_all(beside: Vec<Run<'_>>, guests: Vec<Run<'_>>, at_once: usize) -> Vec<Row> {
    thread::scope(|scope| {
        let in_guests = scope.spawn(|| side_by_side::perform(guests, at_once, Run::perform));
        let mut rows: Vec<Row> = beside.into_iter().map(Run::perform).collect();
        rows.extend(in_guests.join().expect("no run panics"));
        rows
    })
}

/// What the runs need; each part may be missing on its own.
#[derive(Debug)]
struct Prepared {
    unit: Result<Report>,
    binaries: Result<Binaries>,
    kernels: Result<Found>,
}

/// What the runs need, fetched and built at once: one waits for the network while the other computes.
fn prepare(options: &Options, work: &Workplace, guests: &[Choice]) -> Prepared {
    thread::scope(|scope| {
        let kernels = scope.spawn(|| {
            let mut all = Found::default();
            for choice in guests {
                let found = kernels::obtain(choice)?;
                all.kernels.extend(found.kernels);
                all.missing.extend(found.missing);
            }
            Ok(all)
        });
        let binaries = work.folder("bin").and_then(|folder| Binaries::build(&folder));
        let unit = unit_tests(options.filter.as_deref());
        Prepared { unit, binaries, kernels: joined(kernels.join()) }
    })
}

fn joined<T>(result: thread::Result<Result<T>>) -> Result<T> {
    result.unwrap_or_else(|_| Err(anyhow!("it panicked, see above")))
}

/// The tests inside the crates.
fn unit_tests(filter: Option<&str>) -> Result<Report> {
    let mut cargo = first_process::static_cargo("test", Profile::Suite)?;
    cargo.args(UNIT_TESTED.iter().flat_map(|package| ["--package", package]));
    cargo.args(["--lib", "--bin", "xtask", "--"]).args(filter);
    let started = Instant::now();
    let mut report = Report::default();
    let mut crates = first_process::Crates::new("building the unit tests");
    let ended = process::watch(&mut cargo, RUN_LIMIT, |line| {
        if crates.count(line) {
            return;
        }
        if let Some(counts) = line.strip_prefix("test result: ") {
            let count = |what: &str| count_before(counts, what);
            report.passed += count("passed");
            report.failed += count("failed");
            report.skipped += count("ignored");
        }
        progress::line(&format!("[unit] {line}"));
    })?;
    report.took = started.elapsed();
    match ended {
        Ended::TimedOut => report.problem = Some(format!("not done after {} s", RUN_LIMIT.as_secs())),
        Ended::Exited(status) if !status.success() && report.failed == 0 => {
            report.problem = Some(format!("cargo test: {status}"));
        }
        Ended::Exited(_) => {}
    }
    Ok(report)
}

/// The number before a word: 12 in "ok. 12 passed; 0 failed".
fn count_before(text: &str, word: &str) -> u64 {
    let words: Vec<&str> = text.split([' ', ';']).collect();
    let at = words.iter().position(|w| *w == word);
    at.and_then(|at| words[..at].last()?.parse().ok()).unwrap_or(0)
}

fn on_host(binaries: &Binaries, arguments: &[OsString], work: &Workplace) -> Result<Report> {
    let offload = Offload::of_this_host();
    progress::note(&format!("[host] starting, offload {offload:?}"));
    let mut listener = Listener::new("host", arguments)?;
    let mut command = process::bound_to_us(&binaries.suite);
    command.args(arguments);
    command.envs(suite::environment("host", offload, &binaries.tlsplice, &work.folder("host")?));
    command.envs(peers_variables()?);
    let exit = match process::watch(&mut command, RUN_LIMIT, |line| listener.take(line))? {
        Ended::Exited(status) => match status.code() {
            Some(code) => Exit::Status(code),
            None => Exit::Trouble(format!("it ended by a signal: {status}")),
        },
        Ended::TimedOut => Exit::Trouble(format!("it was not done after {} s", RUN_LIMIT.as_secs())),
    };
    Ok(listener.finish(&exit))
}

fn in_user_mode(linux: PathBuf, binaries: &Binaries, arguments: &[OsString], work: &Workplace) -> Result<Report> {
    progress::note("[uml] starting, offload Require");
    let mut listener = Listener::new("uml", arguments)?;
    let mut env: Vec<(OsString, OsString)> =
        std::env::var_os("HOME").map(|home| ("HOME".into(), home)).into_iter().collect();
    env.extend(own_variables());
    env.extend(peers_variables()?);
    env.extend(suite::environment("uml", Offload::Require, &binaries.tlsplice, &work.folder("uml")?));
    let mut command = vec![binaries.suite.clone().into_os_string()];
    command.extend_from_slice(arguments);
    let machine = uml::Machine { linux, mem: UML_MEMORY.into(), cpu: "auto".into() };
    let exit = match machine.watch(env, command, RUN_LIMIT, |line| listener.take(line)) {
        Ok(Some(status)) => Exit::Status(status),
        Ok(None) => Exit::Trouble(format!("it was not done after {} s", RUN_LIMIT.as_secs())),
        Err(error) => Exit::Trouble(format!("{error:#}")),
    };
    Ok(listener.finish(&exit))
}

/// How many guests there are at a time, one for each of the machine's processors at most; and how their own run.
fn guests_at_once(guests: usize) -> (usize, Emulation) {
    let processors = side_by_side::processors();
    let at_once = processors.min(guests);
    let threads = at_once * vm::GUEST_PROCESSORS as usize;
    (at_once, if threads <= processors { Emulation::AtOnce } else { Emulation::InTurns })
}

/// Variables of the caller's that are meant for the tests.
pub fn own_variables() -> impl Iterator<Item = (OsString, OsString)> {
    std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"TLSPLICE_"))
}

/// nginx for tests on this machine's files, by name in PATH and where its modules are; and the judges.
fn peers_variables() -> Result<Vec<(OsString, OsString)>> {
    let nginx = peers::nginx()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = nginx.program.parent().map(PathBuf::from).into_iter().chain(std::env::split_paths(&path));
    let folders = folders.chain([peers::prometheus()?]);
    let path = std::env::join_paths(folders).context("put nginx and Prometheus into PATH")?;
    let mut variables = vec![
        ("PATH".into(), path),
        ("TLSPLICE_NGINX".into(), nginx.program.into()),
        ("TLSPLICE_NGINX_MODULES".into(), nginx.modules.into()),
    ];
    variables.extend(judges::variables()?);
    Ok(variables)
}
