//! Reads what is counted: /metrics of a tlsplice, /proc/net/tls_stat, and /proc of a process.

use anyhow::{Context as _, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

/// One scrape.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Vec<Sample>);

#[derive(Debug, Clone)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    pub fn fetch(admin: SocketAddr) -> Result<Self> {
        let (status, body) = http_get(admin, "/metrics")?;
        if status != 200 {
            bail!("GET /metrics: status {status}");
        }
        Ok(Self::parse(&body))
    }

    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(parse_sample).collect())
    }

    /// The sum of all samples of that name which carry these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let carries = |s: &&Sample| labels.iter().all(|(k, v)| s.labels.get(*k).is_some_and(|got| got == v));
        self.0.iter().filter(|s| s.name == name).filter(carries).map(|s| s.value as u64).sum()
    }

    /// Samples of that name.
    pub fn count(&self, name: &str) -> usize {
        self.0.iter().filter(|s| s.name == name).count()
    }

    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|s| s.name == name)
    }

    pub fn ended(&self, how: &str) -> u64 {
        self.sum("tlsplice_connections_ended_total", &[("how", how)])
    }

    pub fn ended_any(&self) -> u64 {
        self.sum("tlsplice_connections_ended_total", &[])
    }

    pub fn opened(&self) -> u64 {
        self.sum("tlsplice_connections_opened_total", &[("side", "client")])
    }

    pub fn live(&self) -> u64 {
        self.sum("tlsplice_connections_live", &[("side", "client")])
    }

    pub fn offloaded(&self) -> u64 {
        self.sum("tlsplice_offload_total", &[("state", "offloaded")])
    }

    pub fn declined(&self, reason: &str) -> u64 {
        self.sum("tlsplice_offload_total", &[("state", "declined"), ("reason", reason)])
    }

    pub fn payload(&self, direction: &str, path: &str) -> u64 {
        self.sum("tlsplice_payload_bytes_total", &[("direction", direction), ("path", path)])
    }

    /// Bytes of a direction, however they went.
    pub fn moved(&self, direction: &str) -> u64 {
        self.sum("tlsplice_payload_bytes_total", &[("direction", direction)])
    }

    pub fn spliced(&self) -> u64 {
        self.sum("tlsplice_payload_bytes_total", &[("path", "spliced")])
    }

    pub fn copied(&self) -> u64 {
        self.sum("tlsplice_payload_bytes_total", &[("path", "copied")])
    }

    /// Every reason that was counted, for a message.
    pub fn endings(&self) -> String {
        let ended = self.0.iter().filter(|s| s.name == "tlsplice_connections_ended_total" && s.value > 0.0);
        let parts: Vec<String> =
            ended.map(|s| format!("{}={}", s.labels.get("how").map_or("?", String::as_str), s.value)).collect();
        if parts.is_empty() { "none".into() } else { parts.join(" ") }
    }
}

/// `name{label="value",…} number`; values of ours hold no comma and no quote.
fn parse_sample(line: &str) -> Option<Sample> {
    if line.starts_with('#') {
        return None;
    }
    let (head, value) = line.rsplit_once(' ')?;
    let value = value.parse().ok()?;
    let Some((name, labels)) = head.split_once('{') else {
        return Some(Sample { name: head.to_owned(), labels: BTreeMap::new(), value });
    };
    let labels = labels
        .trim_end_matches('}')
        .split(',')
        .filter_map(|pair| pair.split_once('='))
        .map(|(k, v)| (k.to_owned(), v.trim_matches('"').to_owned()))
        .collect();
    Some(Sample { name: name.to_owned(), labels, value })
}

/// One GET, HTTP/1.0 so that the body ends with the connection: status and body.
pub fn http_get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(|| format!("read the answer to GET {path}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("GET {path}: no head in {answer:?}"))?;
    let status = head.split_whitespace().nth(1).and_then(|s| s.parse().ok()).context("no status in the answer")?;
    Ok((status, body.to_owned()))
}

/// The kernel's own count of sockets that were given TLS keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TlsStat {
    pub tx: u64,
    pub rx: u64,
    pub decrypt_errors: u64,
}

impl TlsStat {
    /// `None` without kTLS.
    pub fn read() -> Option<Self> {
        let text = fs::read_to_string("/proc/net/tls_stat").ok()?;
        let field = |name: &str| {
            let line = text.lines().find(|line| line.split_whitespace().next() == Some(name));
            line.and_then(|l| l.split_whitespace().nth(1)).and_then(|v| v.parse().ok()).unwrap_or(0)
        };
        Some(Self { tx: field("TlsTxSw"), rx: field("TlsRxSw"), decrypt_errors: field("TlsDecryptError") })
    }
}

/// What /proc says of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptors {
    pub sockets: usize,
    pub pipes: usize,
    pub others: usize,
}

impl Descriptors {
    pub fn of(pid: u32) -> Result<Self> {
        let mut found = Self { sockets: 0, pipes: 0, others: 0 };
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).context("read /proc/PID/fd")? {
            // A descriptor may be closed between the listing and the look.
            let Ok(target) = fs::read_link(entry?.path()) else { continue };
            let target = target.to_string_lossy().into_owned();
            match target.split(':').next() {
                Some("socket") => found.sockets += 1,
                Some("pipe") => found.pipes += 1,
                _ => found.others += 1,
            }
        }
        Ok(found)
    }
}

/// A field of /proc/PID/FILE that reads `Name: 123 kB` or `Name: 123`.
pub fn proc_field(pid: u32, file: &str, name: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/{file}");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
        .with_context(|| format!("no {name} in {path}"))?;
    line.split_whitespace().next().and_then(|v| v.parse().ok()).with_context(|| format!("{name} in {path} is {line:?}"))
}

/// The process's share of memory, in KiB, and what it is called: its resident size where the kernel cannot tell shares.
pub fn memory_kib(pid: u32) -> Result<(u64, &'static str)> {
    match proc_field(pid, "smaps_rollup", "Pss") {
        Ok(kib) => Ok((kib, "PSS")),
        Err(_) => Ok((proc_field(pid, "status", "RssAnon")?, "anonymous RSS")),
    }
}

/// What each thread of a process has used so far. Only differences of two are asked for, thread by thread: one of
/// io_uring's own threads ends when it has nothing to do, and a sum would fall with it.
#[derive(Debug, Clone)]
pub struct Threads(BTreeMap<String, Used>);

#[derive(Debug, Clone, Copy, Default)]
struct Used {
    cpu_ns: u64,
    sleeps: u64,
}

impl Threads {
    pub fn of(pid: u32) -> Result<Self> {
        let mut threads = BTreeMap::new();
        for task in fs::read_dir(format!("/proc/{pid}/task")).context("read /proc/PID/task")? {
            let task = task?;
            // A thread may end between the listing and the look.
            let Some(used) = Used::read(&task.path()) else { continue };
            threads.insert(task.file_name().to_string_lossy().into_owned(), used);
        }
        Ok(Self(threads))
    }

    /// CPU time since an earlier look, user and system. What a thread used that has ended since is not in it.
    pub fn cpu_since(&self, earlier: &Self) -> Duration {
        Duration::from_nanos(self.since(earlier, |used| used.cpu_ns))
    }

    /// Times that a thread went to sleep since an earlier look.
    pub fn sleeps_since(&self, earlier: &Self) -> u64 {
        self.since(earlier, |used| used.sleeps)
    }

    fn since(&self, earlier: &Self, field: fn(&Used) -> u64) -> u64 {
        let before = |thread| earlier.0.get(thread).map_or(0, field);
        self.0.iter().map(|(thread, used)| field(used).saturating_sub(before(thread))).sum()
    }
}

impl Used {
    fn read(task: &Path) -> Option<Self> {
        let on_cpu = fs::read_to_string(task.join("schedstat")).ok();
        let exact = on_cpu.and_then(|text| text.split_whitespace().next()?.parse().ok()).filter(|&ns: &u64| ns > 0);
        let status = fs::read_to_string(task.join("status")).ok()?;
        let sleeps = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"))?;
        Some(Self { cpu_ns: exact.or_else(|| ticks_ns(task))?, sleeps: sleeps.trim().parse().ok()? })
    }
}

/// CPU time of a thread from its `stat`, in steps of a tick, for kernels without schedstat.
fn ticks_ns(task: &Path) -> Option<u64> {
    const TICK_NS: u64 = 10_000_000;
    let text = fs::read_to_string(task.join("stat")).ok()?;
    let (_, rest) = text.rsplit_once(") ")?;
    let field = |n: usize| rest.split_whitespace().nth(n)?.parse::<u64>().ok();
    Some((field(11)? + field(12)?) * TICK_NS)
}

/// A line of /proc/meminfo, in KiB.
pub fn meminfo_kib(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).with_context(|| format!("no {name} in /proc/meminfo"))
}

/// Pages that TCP holds for queued data, by /proc/net/sockstat, in KiB.
pub fn tcp_memory_kib() -> Result<u64> {
    let text = fs::read_to_string("/proc/net/sockstat")?;
    let line = text.lines().find(|l| l.starts_with("TCP:")).context("no TCP in sockstat")?;
    let pages: u64 = line.rsplit_once("mem ").and_then(|(_, v)| v.trim().parse().ok()).context("no mem in sockstat")?;
    Ok(pages * 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_ends_takes_nothing_off_the_others() {
        let used = |cpu_ns, sleeps| Used { cpu_ns, sleeps };
        let before = Threads(BTreeMap::from([("1".into(), used(100, 3)), ("2".into(), used(9_000, 40))]));
        let after = Threads(BTreeMap::from([("1".into(), used(150, 4)), ("3".into(), used(7, 1))]));
        assert_eq!(after.cpu_since(&before), Duration::from_nanos(57));
        assert_eq!(after.sleeps_since(&before), 2);
    }

    #[test]
    fn samples_are_summed_by_their_labels() {
        let text = "# TYPE a counter\na{x=\"1\",y=\"p\"} 3\na{x=\"1\",y=\"q\"} 4\na{x=\"2\",y=\"q\"} 5\nb 7\n";
        let metrics = Metrics(text.lines().filter_map(parse_sample).collect());
        assert_eq!(metrics.sum("a", &[("x", "1")]), 7);
        assert_eq!(metrics.sum("a", &[]), 12);
        assert_eq!(metrics.sum("b", &[]), 7);
    }
}
