//! Runs the tests, or any command, in guests: Debian's kernels under QEMU, each started once.

use crate::kernels::{self, Choice, Kernel};
use crate::qemu::{Emulation, Guest, GuestEnded};
use crate::rootfs::{self, Contents};
use crate::setup::{self, Group};
use crate::suite::{self, Binaries, Exit, Listener, Offload, Report, Workplace};
use crate::table::{Row, conclude};
use crate::{progress, test};
use anyhow::{Context, Result};
use clap::Args;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What each guest has.
pub const GUEST_PROCESSORS: u32 = 2;
/// Where a guest has the programs under test.
const BIN: &str = "/usr/bin";
/// What a kernel says when it meets an int3 that it does not know of. It patches its own code by them, while it starts
/// and when a static branch turns, and the emulator of two processors does not always survive that: the guest's fault,
/// not that of what runs in it. A kernel that panics otherwise stays down.
const TRAP_OF_NOBODY: &str = "Oops: int3";
/// So often the tests go on in a guest that is started anew.
const BREAKS_BORNE: u32 = 3;

/// Run the tests in guests: kernels with kTLS, under QEMU.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// A series such as 6.12, "newest", or "all".
    #[arg(long, default_value = "all", value_parser = Choice::parse)]
    kernel: Choice,
    /// Seconds that one guest may take.
    #[arg(long, default_value_t = 2700)]
    timeout: u64,
    /// MiB of memory of one guest.
    #[arg(long, default_value_t = 3072)]
    memory: u32,
    /// Run this command, with its arguments after it, instead of the tests.
    #[arg(long)]
    exec: bool,
    /// Put a program of this machine's into /usr/bin of the guest, with its libraries.
    #[arg(long = "with", value_name = "FILE")]
    with: Vec<PathBuf>,
    /// Arguments of the test binary, such as --filter or --list.
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// How guests are started.
#[derive(Clone, Debug)]
pub struct Size {
    pub memory_mib: u32,
    pub emulation: Emulation,
    pub limit: Duration,
}

/// `cargo xtask vm`.
pub fn command(options: &Options) -> Result<i32> {
    setup::make_sure(&[Group::Build, Group::Guests, Group::Peers])?;
    let found = kernels::obtain(&options.kernel)?;
    let work = Workplace::new()?;
    let limit = Duration::from_secs(options.timeout);
    let size = Size { memory_mib: options.memory, emulation: Emulation::AtOnce, limit };
    if options.exec {
        return execute(&found.kernels, options, &size, &work);
    }
    let binaries = Binaries::build(&work.folder("bin")?)?;
    let mut rows = Vec::new();
    for kernel in &found.kernels {
        let mut extra = Vec::new();
        for file in &options.with {
            extra.push(beside(file)?);
        }
        let report = tests(kernel, &binaries, extra, &options.arguments, &size, &work);
        rows.push(Row::new(&kernel.series, report));
    }
    rows.extend(found.missing.into_iter().map(|(series, reason)| Row::declared(&series, reason)));
    Ok(conclude(&rows))
}

/// The tests on one kernel.
pub fn tests(
    kernel: &Kernel,
    binaries: &Binaries,
    mut programs: Vec<(PathBuf, PathBuf)>,
    arguments: &[OsString],
    size: &Size,
    work: &Workplace,
) -> Result<Report> {
    let tlsplice = Path::new(BIN).join("tlsplice");
    let test_binary = Path::new(BIN).join("tlsplice-suite");
    programs.push((tlsplice.clone(), binaries.tlsplice.clone()));
    programs.push((test_binary.clone(), binaries.suite.clone()));
    let mut env = base_environment();
    env.extend(suite::environment(&kernel.series, Offload::Require, &tlsplice, Path::new("/tmp")));
    let mut command = vec![test_binary.into_os_string()];
    command.extend_from_slice(arguments);
    let mut contents = Contents { programs, files: Vec::new(), env, command };
    progress::note(&format!("[{}] starting {}", kernel.series, kernel.version()?));
    let mut listener = Listener::new(&kernel.series, arguments)?;
    let mut breaks_borne = BREAKS_BORNE;
    let exit = loop {
        let guest = guest(kernel, &contents, size, work)?;
        match guest.run(|line| listener.take(line))? {
            GuestEnded::Exited(status) => break Exit::Status(status),
            GuestEnded::Panicked if breaks_borne > 0 && guest.console()?.contains(TRAP_OF_NOBODY) => {
                let why = "the guest: its kernel panicked at code that it was patching";
                let tail = guest.console_tail()?;
                progress::note(&format!("[{}] {why}; it goes on in another. It said at last:\n{tail}", kernel.series));
                let done = listener.broken_off(why).to_string();
                contents.command.extend(["--done".into(), done.into()]);
                breaks_borne -= 1;
            }
            other => break Exit::Trouble(explain(other, size, &guest)?),
        }
    };
    Ok(listener.finish(&exit))
}

/// Any command, on each kernel in turn; the first exit status that is not 0.
fn execute(kernels: &[Kernel], options: &Options, size: &Size, work: &Workplace) -> Result<i32> {
    let programs = options.with.iter().map(|file| beside(file)).collect::<Result<Vec<_>>>()?;
    let mut result = 0;
    for kernel in kernels {
        let contents = Contents {
            programs: programs.clone(),
            files: Vec::new(),
            env: base_environment(),
            command: options.arguments.clone(),
        };
        let guest = guest(kernel, &contents, size, work)?;
        let ended = guest.run(|line| progress::line(&format!("[{}] {line}", kernel.series)))?;
        let status = match ended {
            GuestEnded::Exited(status) => status,
            other => {
                progress::note(&format!("[{}] {}", kernel.series, explain(other, size, &guest)?));
                1
            }
        };
        result = if result == 0 { status } else { result };
    }
    Ok(result)
}

fn beside(file: &Path) -> Result<(PathBuf, PathBuf)> {
    let name = file.file_name().with_context(|| format!("{} is no file", file.display()))?;
    Ok((Path::new(BIN).join(name), file.to_owned()))
}

fn base_environment() -> Vec<(OsString, OsString)> {
    let mut env: Vec<(OsString, OsString)> = vec![
        ("PATH".into(), "/usr/sbin:/usr/bin".into()),
        ("HOME".into(), "/root".into()),
        ("TLSPLICE_NGINX".into(), "/usr/sbin/nginx".into()),
        ("TLSPLICE_NGINX_MODULES".into(), rootfs::NGINX_MODULES.into()),
        ("RUST_BACKTRACE".into(), "1".into()),
    ];
    env.extend(test::own_variables());
    env
}

fn guest(kernel: &Kernel, contents: &Contents, size: &Size, work: &Workplace) -> Result<Guest> {
    let image = work.folder("images")?.join(format!("{}.cpio", kernel.series));
    rootfs::write(kernel, contents, &image).with_context(|| format!("make the image for {}", kernel.series))?;
    Ok(Guest {
        kernel: kernel.vmlinux(),
        image,
        console: suite::log_path(&kernel.series, "console")?,
        memory_mib: size.memory_mib,
        cpus: GUEST_PROCESSORS,
        emulation: size.emulation.clone(),
        limit: size.limit,
    })
}

/// What went wrong with the guest itself, with the last that its kernel said.
fn explain(ended: GuestEnded, size: &Size, guest: &Guest) -> Result<String> {
    let what = match ended {
        GuestEnded::Exited(status) => format!("it exited {status}"),
        GuestEnded::Panicked => "the guest went down by itself (a kernel panic?)".to_owned(),
        GuestEnded::TimedOut => format!("the guest was not done after {} s", size.limit.as_secs()),
        GuestEnded::Broken(code) => format!("QEMU failed with exit status {code}"),
    };
    Ok(format!("{what}; {} ends:\n{}", guest.console.display(), guest.console_tail()?))
}
