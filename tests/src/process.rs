//! Child processes that never outlive the run, and free ports for them.

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, ExitStatus};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Children that run now: what the watchdog ends when a test hangs.
static LIVE: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// A child that is killed when this is dropped.
#[derive(Debug)]
pub struct Guarded {
    child: Child,
    ended: bool,
}

impl Guarded {
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        LIVE.lock().expect("no holder panics").push(child.id());
        Ok(Self { child, ended: false })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        send(self.pid(), signal)
    }

    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        let status = self.child.try_wait().context("wait for a child")?;
        if status.is_some() && !self.ended {
            self.forget();
        }
        Ok(status)
    }

    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("the process {} has not ended within {limit:?}", self.pid());
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    fn forget(&mut self) {
        self.ended = true;
        let pid = self.pid();
        LIVE.lock().expect("no holder panics").retain(|p| *p != pid);
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if !self.ended {
            // It may have ended by itself; then there is nothing left to kill.
            let _ = self.child.kill();
            let _ = self.child.wait();
            self.forget();
        }
    }
}

pub fn send(pid: u32, signal: Signal) -> Result<()> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).context("a process id is positive")?;
    rustix::process::kill_process(raw, signal).with_context(|| format!("signal {signal:?} to {pid}"))
}

/// Says what each running child is doing, then kills it: the test that owns it comes to an end by that.
pub fn end_all() -> String {
    let pids = LIVE.lock().expect("no holder panics").clone();
    let mut state = String::new();
    for pid in pids {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        state.push_str(&format!("  process {pid} {}\n", name.trim()));
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let wchan = fs::read_to_string(task.path().join("wchan")).unwrap_or_default();
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            let run = stat.rsplit_once(") ").and_then(|(_, r)| r.chars().next()).unwrap_or('?');
            let comm = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            state.push_str(&format!("    thread {} {run} {wchan}\n", comm.trim()));
        }
        // It may be gone by now.
        let _ = send(pid, Signal::KILL);
    }
    state
}

/// A port that nobody listens on, outside the range that the kernel takes client ports from.
pub fn free_port() -> Result<u16> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 20_000;
    let base = std::process::id().wrapping_mul(97) % COUNT;
    for _ in 0..COUNT {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = u16::try_from(FIRST + (base + step) % COUNT).expect("below 30,000");
        let free = |ip: IpAddr| TcpListener::bind(SocketAddr::new(ip, port)).is_ok();
        if free(Ipv4Addr::LOCALHOST.into()) {
            return Ok(port);
        }
    }
    bail!("no free port between {FIRST} and {}", FIRST + COUNT)
}

/// Raises the soft limit of descriptors to the hard one, or to what the tests need.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    const ENOUGH: u64 = 65_536;
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = Some(limit.maximum.unwrap_or(ENOUGH).min(ENOUGH));
    // Less is enough for all tests but the idle one, and that one says so.
    let _ = setrlimit(Resource::Nofile, limit);
}

pub fn descriptor_limit() -> u64 {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// A program of the machine, if it is there.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin"].map(std::path::PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|folder| folder.join(name)).find(|file| file.is_file())
}
