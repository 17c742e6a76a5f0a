//! Reads what is counted: /metrics of a tlsplice, /proc/net/tls_stat, and /proc of a process.

use anyhow::{Context as _, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
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

/// CPU time of all threads, user and system, in nanoseconds.
pub fn cpu_ns(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        sum += text.split_whitespace().next().and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
    }
    if sum == 0 {
        return cpu_ticks_ns(pid);
    }
    Ok(sum)
}

/// The same from /proc/PID/stat, in steps of a tick, for kernels without schedstat.
fn cpu_ticks_ns(pid: u32) -> Result<u64> {
    const TICK_NS: u64 = 10_000_000;
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = text.rsplit_once(") ").context("/proc/PID/stat without a name")?;
    let field = |n: usize| rest.split_whitespace().nth(n).and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
    Ok((field(11) + field(12)) * TICK_NS)
}

/// Times that a thread of the process went to sleep.
pub fn sleeps(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Ok(text) = fs::read_to_string(task?.path().join("status")) else { continue };
        let line = text.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
        sum += line.and_then(|v| v.trim().parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(sum)
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
    fn samples_are_summed_by_their_labels() {
        let text = "# TYPE a counter\na{x=\"1\",y=\"p\"} 3\na{x=\"1\",y=\"q\"} 4\na{x=\"2\",y=\"q\"} 5\nb 7\n";
        let metrics = Metrics(text.lines().filter_map(parse_sample).collect());
        assert_eq!(metrics.sum("a", &[("x", "1")]), 7);
        assert_eq!(metrics.sum("a", &[]), 12);
        assert_eq!(metrics.sum("b", &[]), 7);
    }
}
