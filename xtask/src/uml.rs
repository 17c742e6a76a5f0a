//! Runs a command under user-mode Linux: a kernel with kTLS as an ordinary program, on this machine's own files.
//!
//!   request file ─▶ linux (init = tlsplice-init, root = /) ─▶ stdout and stderr through two terminals ─▶ status file
//!
//! The command runs as root of that kernel, in the current folder, with the files and rights of whoever called us. The kernel
//! itself is built by `uml_build.rs`. One CPU, uniprocessor, no BPF JIT: its times compare with each other only.

use crate::process::{self, Ended};
use crate::request::{Request, Status};
use crate::{cache, first_process, side_by_side, uml_build};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The exit status when the time is up, as `timeout` has it.
pub const TIMED_OUT: i32 = 124;

/// Run a command under user-mode Linux, with kernel TLS, on this machine's files.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Memory of that kernel.
    #[arg(long, default_value = "4G")]
    pub mem: String,
    /// The CPU that it is held to: a number, "auto" (one of them) or "any" (none in particular: half as fast).
    #[arg(long, default_value = "auto")]
    pub cpu: String,
    /// Seconds until it is ended, with exit status 124.
    #[arg(long, default_value_t = 1800)]
    pub timeout: u64,
    /// An environment variable to pass on, beside PATH, HOME and all that begin with TLSPLICE_.
    #[arg(long = "env", value_name = "NAME")]
    pub env: Vec<String>,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<OsString>,
}

/// `cargo xtask uml`: gives the command's exit status.
pub fn command(options: &Options) -> Result<i32> {
    let linux = uml_build::obtain()?;
    let mut env: Vec<(OsString, OsString)> = passed_on(&["PATH".into(), "HOME".into()]);
    env.extend(passed_on(&options.env));
    env.extend(std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"TLSPLICE_")));
    let machine = Machine { linux, mem: options.mem.clone(), cpu: options.cpu.clone() };
    let mut run = machine.start(env, options.command.clone())?;
    let out = run.child.stdout.take().context("its stdout is a pipe")?;
    let err = run.child.stderr.take().context("its stderr is a pipe")?;
    let copies =
        [process::copy_in_background(out, std::io::stdout()), process::copy_in_background(err, std::io::stderr())];
    let deadline = Instant::now() + Duration::from_secs(options.timeout);
    match process::finish(&mut run.child, deadline)? {
        Ended::TimedOut => {
            eprintln!("user-mode Linux: ended after {} s (--timeout)", options.timeout);
            Ok(TIMED_OUT)
        }
        Ended::Exited(_) => {
            for copy in copies {
                let _ = copy.join();
            }
            run.status()
        }
    }
}

fn passed_on(names: &[String]) -> Vec<(OsString, OsString)> {
    names.iter().filter_map(|name| Some((name.into(), std::env::var_os(name)?))).collect()
}

/// A kernel and how large it is.
#[derive(Clone, Debug)]
pub struct Machine {
    pub linux: PathBuf,
    pub mem: String,
    pub cpu: String,
}

/// A kernel that runs a command.
#[derive(Debug)]
pub struct Run {
    pub child: Child,
    work: Workplace,
}

impl Machine {
    /// Starts a command with exactly this environment; its stdout and stderr are pipes.
    pub fn start(&self, env: Vec<(OsString, OsString)>, command: Vec<OsString>) -> Result<Run> {
        let (work, mut start) = self.prepare(env, command)?;
        start.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = start.spawn().with_context(|| format!("start {}", self.linux.display()))?;
        Ok(Run { child, work })
    }

    /// Runs a command, hands over its output line by line, gives its exit status; `None` when the time was up.
    pub fn watch(
        &self,
        env: Vec<(OsString, OsString)>,
        command: Vec<OsString>,
        limit: Duration,
        on_line: impl FnMut(&str),
    ) -> Result<Option<i32>> {
        let (work, mut start) = self.prepare(env, command)?;
        match process::watch(&mut start, limit, on_line)? {
            Ended::TimedOut => Ok(None),
            Ended::Exited(_) => work.status().map(Some),
        }
    }

    fn prepare(&self, env: Vec<(OsString, OsString)>, command: Vec<OsString>) -> Result<(Workplace, Command)> {
        let work = Workplace::new()?;
        let request = Request {
            modules: Vec::new(),
            tmpfs: Vec::new(),
            env,
            cwd: std::env::current_dir().context("find the current folder")?,
            command,
            stdout: "/dev/tty1".into(),
            stderr: Some("/dev/tty2".into()),
            status: Status::File(work.path("status")),
        };
        fs::write(work.path("request"), request.encode()).context("write the request for user-mode Linux")?;
        File::create(work.path("status")).context("make the status file")?;
        let init = first_process::obtain()?;
        // Descriptors 3 and 4 are ours through the shell, because 1 and 2 get what the kernel says.
        let script = "log=$1; shift; exec \"$@\" 3>&1 4>&2 >\"$log\" 2>&1";
        let mut start = process::bound_to_us("sh");
        start.args(["-c", script, "sh"]).arg(work.path("kernel.log"));
        if let Some(cpu) = self.held_to() {
            start.args(["taskset", "-c", &cpu]);
        }
        start.arg(&self.linux);
        start.args([&format!("mem={}", self.mem), "seccomp=on", "quiet", "panic=1"]);
        start.args(["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "rw"]);
        start.args(["con=null", "con0=null,fd:1", "con1=null,fd:3", "con2=null,fd:4"]);
        start.arg(argument("init=", &init)).arg(argument("uml_dir=", &work.path("")));
        start.arg(argument("TLSPLICE_REQUEST=", &work.path("request")));
        start.env("TMPDIR", memory_folder(&self.mem));
        Ok((work, start))
    }
}

impl Machine {
    fn held_to(&self) -> Option<String> {
        match self.cpu.as_str() {
            "any" => None,
            "auto" => {
                // Commands that run at once shall not all choose the same one.
                let count = side_by_side::processors();
                Some((std::process::id() as usize % count).to_string())
            }
            number => Some(number.to_owned()),
        }
    }
}

impl Run {
    /// The command's exit status, once the kernel has ended.
    pub fn status(&self) -> Result<i32> {
        self.work.status()
    }
}

fn argument(key: &str, path: &Path) -> OsString {
    let mut word = OsString::from(key);
    word.push(path);
    word
}

/// Where the kernel's memory lies, as a file: in a tmpfs if it is large enough, for a full one kills the kernel.
fn memory_folder(mem: &str) -> PathBuf {
    let shared = PathBuf::from("/dev/shm");
    let available = process::text(Command::new("df").args(["--output=avail", "--block-size=1"]).arg(&shared));
    let available = available.ok().and_then(|text| text.lines().last()?.trim().parse::<u64>().ok());
    match (available, bytes(mem)) {
        (Some(available), Some(wanted)) if available >= wanted => shared,
        _ => std::env::temp_dir(),
    }
}

fn bytes(size: &str) -> Option<u64> {
    let (digits, shift) = match size.as_bytes().last()? {
        b'G' | b'g' => (&size[..size.len() - 1], 30),
        b'M' | b'm' => (&size[..size.len() - 1], 20),
        b'K' | b'k' => (&size[..size.len() - 1], 10),
        _ => (size, 0),
    };
    digits.parse::<u64>().ok()?.checked_shl(shift)
}

/// A run's own folder, removed when it is over.
#[derive(Debug)]
struct Workplace(PathBuf);

impl Workplace {
    fn new() -> Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tlsplice-uml-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        cache::remove(&path)?;
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn status(&self) -> Result<i32> {
        let text = fs::read_to_string(self.path("status")).context("read the status file")?;
        match text.trim().parse() {
            Ok(status) => Ok(status),
            Err(_) => {
                let log = fs::read(self.path("kernel.log")).unwrap_or_default();
                let log = process::tail(&String::from_utf8_lossy(&log));
                bail!("user-mode Linux ended without an exit status; the last it said:\n{log}")
            }
        }
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_the_kernel_reads_them() {
        assert_eq!(bytes("4G"), Some(4 << 30));
        assert_eq!(bytes("512m"), Some(512 << 20));
        assert_eq!(bytes("1048576"), Some(1 << 20));
        assert_eq!(bytes("much"), None);
    }
}
