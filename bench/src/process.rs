//! A program under measurement: started, watched through /proc with all its children and threads, ended.

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a program may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long it may take to end after SIGTERM.
const END_LIMIT: Duration = Duration::from_secs(2);
/// A tick of /proc/PID/stat, as Linux shows it to programs on every architecture here.
const TICK_NS: u64 = 10_000_000;

/// A running program.
#[derive(Debug)]
pub struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts it, its output in a log, and waits until something listens.
    pub fn start(command: &mut Command, log: PathBuf, listens: SocketAddr) -> Result<Self> {
        let file = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let error_file = file.try_clone().context("share the log")?;
        let child = command.process_group(0).stdin(Stdio::null()).stdout(file).stderr(error_file).spawn();
        let child = child.with_context(|| format!("start {}", command.get_program().display()))?;
        let mut running = Self { child, log };
        running.wait_for(listens)?;
        Ok(running)
    }

    fn wait_for(&mut self, listens: SocketAddr) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        while TcpStream::connect_timeout(&listens, Duration::from_secs(1)).is_err() {
            if let Some(status) = self.child.try_wait().context("look after a program")? {
                bail!("it ended at its start, {status}: {}", self.said());
            }
            ensure!(Instant::now() < deadline, "it does not listen on {listens}: {}", self.said());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The end of what it has printed.
    pub fn said(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join(" | ")
    }

    /// Holds all its threads to some CPUs, even if it has chosen others itself: hitch's workers do, and would then share one
    /// with the generator while the other peers do not.
    pub fn hold_to(&self, cpus: &[usize]) -> Result<()> {
        let mut set = rustix::thread::CpuSet::new();
        cpus.iter().for_each(|cpu| set.set(*cpu));
        for pid in family(self.pid()) {
            for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let tid = task.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
                // A thread that has ended meanwhile, or one of the kernel's, is held to nothing.
                let _ = tid.map(|tid| rustix::thread::sched_setaffinity(Some(tid), &set));
            }
        }
        let held = |pid: u32| {
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
            rustix::thread::sched_getaffinity(Some(pid)).ok()
        };
        let loose = family(self.pid()).into_iter().find(|pid| held(*pid).is_some_and(|of| of != set));
        ensure!(loose.is_none(), "process {loose:?} does not stay on its CPUs");
        Ok(())
    }

    /// What it has used so far.
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.pid())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(group) = i32::try_from(self.pid()).ok().and_then(Pid::from_raw) else { return };
        let _ = kill_process(group, Signal::TERM);
        let deadline = Instant::now() + END_LIMIT;
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Workers that did not end with their master: they are in the group that was made for this program.
        let _ = kill_process_group(group, Signal::KILL);
        let _ = self.child.wait();
    }
}

/// What a program has used since it started.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// ns on the CPU, by thread.
    threads: BTreeMap<u32, u64>,
    user_ns: u64,
    system_ns: u64,
    /// System calls; only where the kernel was built to count them.
    pub calls: u64,
    /// Proportional set size of all its processes.
    pub pss_bytes: u64,
    /// Slab memory of the whole machine.
    pub slab_bytes: u64,
}

/// CPU time between two moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CpuTime {
    pub total_ns: u64,
    /// Of which in user space; from ticks of 10 ms, so a share, not a measurement.
    pub user_share: f64,
}

impl Usage {
    fn of(pid: u32) -> Result<Self> {
        let mut usage = Self { slab_bytes: slab_bytes(), ..Self::default() };
        for pid in family(pid) {
            usage.add_threads(pid);
            let (user, system) = ticks(pid).unwrap_or_default();
            usage.user_ns += user * TICK_NS;
            usage.system_ns += system * TICK_NS;
            usage.pss_bytes += pss_bytes(pid).unwrap_or(0);
            usage.calls += calls(pid).unwrap_or(0);
        }
        ensure!(!usage.threads.is_empty(), "the program under measurement has ended (process {pid})");
        Ok(usage)
    }

    fn add_threads(&mut self, pid: u32) {
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return };
        for task in tasks.flatten() {
            let on_cpu = fs::read_to_string(task.path().join("schedstat")).ok();
            let on_cpu = on_cpu.and_then(|text| text.split(' ').next()?.parse().ok());
            if let (Some(tid), Some(ns)) = (task.file_name().to_str().and_then(|t| t.parse().ok()), on_cpu) {
                self.threads.insert(tid, ns);
            }
        }
    }

    /// The CPU time since an earlier moment. Exact as long as no thread has ended in between; io_uring's own threads may, and
    /// then the ticks of the processes, which include the ended ones, are the better figure where they say more.
    pub fn since(&self, earlier: &Self) -> CpuTime {
        let of = |(tid, ns): (&u32, &u64)| ns.saturating_sub(earlier.threads.get(tid).copied().unwrap_or(0));
        let mut total_ns: u64 = self.threads.iter().map(of).sum();
        let user = self.user_ns.saturating_sub(earlier.user_ns);
        let system = self.system_ns.saturating_sub(earlier.system_ns);
        if earlier.threads.keys().any(|tid| !self.threads.contains_key(tid)) {
            total_ns = total_ns.max(user + system);
        }
        let user_share = if user + system == 0 { 0.0 } else { user as f64 / (user + system) as f64 };
        CpuTime { total_ns, user_share }
    }
}

/// A process and all its descendants.
pub fn family(root: u32) -> Vec<u32> {
    let mut parents: Vec<(u32, u32)> = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok())
            && let Some(parent) = stat_field(&entry.path(), 1)
        {
            parents.push((pid, parent as u32));
        }
    }
    let mut found = vec![root];
    let mut at = 0;
    while at < found.len() {
        let parent = found[at];
        found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        at += 1;
    }
    found
}

/// A number of /proc/PID/stat, counted from the state, which is 0.
fn stat_field(process: &Path, index: usize) -> Option<u64> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // The name is in parentheses and may hold any character.
    stat[stat.rfind(')')? + 2..].split(' ').nth(index)?.parse().ok()
}

fn ticks(pid: u32) -> Option<(u64, u64)> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    Some((stat_field(&process, 11)?, stat_field(&process, 12)?))
}

fn pss_bytes(pid: u32) -> Option<u64> {
    kilobytes(&format!("/proc/{pid}/smaps_rollup"), "Pss:")
}

fn slab_bytes() -> u64 {
    kilobytes("/proc/meminfo", "Slab:").unwrap_or(0)
}

fn kilobytes(file: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
}

/// The project's user-mode Linux counts a process's system calls in this field.
fn calls(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("cancelled_write_bytes:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(threads: &[(u32, u64)], ticks: (u64, u64)) -> Usage {
        let threads = threads.iter().copied().collect();
        Usage { threads, user_ns: ticks.0 * TICK_NS, system_ns: ticks.1 * TICK_NS, ..Usage::default() }
    }

    #[test]
    fn threads_are_added_up_and_ended_ones_are_not_forgotten() {
        let before = usage(&[(1, 1_000), (2, 500)], (1, 1));
        let after = usage(&[(1, 5_000), (2, 700), (3, 50)], (2, 4));
        assert_eq!(after.since(&before), CpuTime { total_ns: 4_250, user_share: 0.25 });
        let one_ended = usage(&[(1, 5_000)], (2, 4));
        assert_eq!(one_ended.since(&before).total_ns, 4 * TICK_NS);
    }

    #[test]
    fn our_own_usage_is_seen() {
        let before = Usage::of(std::process::id()).unwrap();
        let start = Instant::now();
        let mut sum = 0_u64;
        while start.elapsed() < Duration::from_millis(30) {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(1));
        }
        let used = Usage::of(std::process::id()).unwrap().since(&before);
        assert!(used.total_ns > 1_000_000, "{used:?}");
        assert!(before.pss_bytes > 0);
    }
}
