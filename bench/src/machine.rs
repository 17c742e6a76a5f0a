//! What machine this is, and how busy it is with other things.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::time::Instant;

/// linux/magic.h.
const BPF_FS_MAGIC: rustix::fs::FsWord = 0xcafe_4a11;

/// What a result has to say about where it comes from.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_mib: u64,
    pub kernel: String,
    /// Whether this kernel has TLS.
    pub kernel_tls: bool,
    /// Whether a bpf file system is there, without which tlsplice does not count in the kernel.
    #[serde(default)]
    pub bpf_file_system: bool,
    /// The load averages of a minute, before and after. What the machine did beside the measurement is in them too.
    pub load_before: f64,
    pub load_after: f64,
}

impl Machine {
    pub fn look() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&text("/proc/meminfo"), "MemTotal").unwrap_or_default();
        Self {
            cpu: field(&text("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory.trim_end_matches(" kB").parse::<u64>().unwrap_or(0) >> 10,
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            kernel_tls: text("/proc/sys/net/ipv4/tcp_available_ulp").split_whitespace().any(|name| name == "tls"),
            bpf_file_system: rustix::fs::statfs("/sys/fs/bpf").is_ok_and(|fs| fs.f_type == BPF_FS_MAGIC),
            load_before: load(),
            load_after: 0.0,
        }
    }
}

/// The load average of the last minute.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

/// The CPUs that this process may use.
pub fn cpus() -> Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None).context("ask which CPUs are ours")?;
    Ok((0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
}

/// Holds this thread, and those that it starts, to some CPUs.
pub fn hold_to(cpus: &[usize]) -> Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu));
    rustix::thread::sched_setaffinity(None, &set).context("hold the generator to its CPUs")
}

/// What the cheapest system call costs here, in ns: the least of many tries, each so short that most of them meet nothing else.
pub fn call_ns() -> f64 {
    const TRIES: usize = 400;
    const CALLS: u32 = 200;
    let once = || {
        let since = Instant::now();
        for _ in 0..CALLS {
            std::hint::black_box(rustix::process::getppid());
        }
        since.elapsed().as_nanos() as f64 / f64::from(CALLS)
    };
    (0..TRIES).map(|_| once()).fold(f64::INFINITY, f64::min)
}

/// Lets this process, and what it starts, have as many descriptors as it may; gives how many.
pub fn raise_descriptor_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    /// What a host for many connections is set to.
    const WANTED: u64 = 1 << 20;
    let old = getrlimit(Resource::Nofile);
    let most = old.maximum.unwrap_or(WANTED).max(WANTED);
    // Only root may raise the upper limit; a refusal leaves what there is.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: Some(most) })
        .or_else(|_| setrlimit(Resource::Nofile, Rlimit { current: old.maximum, maximum: old.maximum }));
    getrlimit(Resource::Nofile).current.unwrap_or(WANTED)
}
