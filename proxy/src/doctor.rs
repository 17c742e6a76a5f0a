//! What this host offers to the data path, and for each gap the one line that mends it.
//!
//!   probe + files of /proc, /sys and /etc ─▶ `Host` ─▶ `examine` ─▶ findings ─▶ text or JSON
//!
//! `examine` is pure. It judges by what the configuration's defaults would need, as it is asked without one.

mod host;
mod kernel;

pub use host::Host;

use crate::observe::ebpf::Lack;
use crate::probe::Kernel;
use serde::Serialize;

/// `limits.connections`, twice, and what is open beside them.
const OPEN_FILES_WANTED: u64 = 2 * 100_000 + 1024;
/// The default of `limits.pipe_memory`.
const PIPE_MEMORY_BYTES: u64 = 64 << 20;
/// A 64 KiB pipe costs a bulk transfer 9 to 10 % more than this one.
const PIPE_SIZE_BYTES: u64 = 1 << 20;
const PAGE_BYTES: u64 = 4096;
/// Half of the default of `limits.connections`, as much as one address and one server can have.
const LOCAL_PORTS_WANTED: u64 = 50_000;
/// A ring's memory counts against it on kernels before 5.12, and registered buffers still do.
const LOCKED_MEMORY_BYTES: u64 = 64 << 10;

/// How a finding stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    Ok,
    /// Worth knowing; nothing to mend.
    Note,
    /// Costs function or speed, and can be mended.
    Gap,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub name: &'static str,
    pub standing: Standing,
    pub found: String,
    /// One line, of every gap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl Finding {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, standing: Standing::Ok, found: found.into(), mend: None }
    }

    fn note(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, standing: Standing::Note, found: found.into(), mend: None }
    }

    fn gap(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, standing: Standing::Gap, found: found.into(), mend: Some(mend.into()) }
    }
}

/// Everything, in the order in which a connection meets it.
pub fn examine(host: &Host, kernel: &Kernel) -> Vec<Finding> {
    let mut findings = vec![kernel::version(host, kernel), kernel::tls(host, kernel)];
    if kernel.no_ulp.is_none() {
        findings.extend([kernel::suites(kernel), kernel::rekey(kernel), kernel::splice(kernel)]);
        findings.extend([kernel::receive(kernel), kernel::gcm(host)]);
    }
    findings.extend([io_uring(host), open_files(host), locked_memory(host), somaxconn(host)]);
    findings.push(local_ports(host));
    findings.extend([pipe_size(host), pipe_memory(host), kernel_metrics(host)]);
    findings
}

fn io_uring(host: &Host) -> Finding {
    const NAME: &str = "io_uring";
    let Some(error) = &host.io_uring_error else { return Finding::ok(NAME, "a ring can be made") };
    let found = format!("io_uring_setup: {error}");
    match host.io_uring_disabled {
        Some(0) | None => Finding::gap(
            NAME,
            format!("{found}, and kernel.io_uring_disabled does not forbid it"),
            "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile",
        ),
        Some(level) => Finding::gap(
            NAME,
            format!("{found}: kernel.io_uring_disabled = {level}"),
            sysctl("kernel.io_uring_disabled", 0),
        ),
    }
}

fn open_files(host: &Host) -> Finding {
    const NAME: &str = "open files";
    let hard = host.open_files_hard;
    let found = format!("RLIMIT_NOFILE {hard}, of which the program takes all");
    if hard >= OPEN_FILES_WANTED {
        return Finding::ok(NAME, found);
    }
    Finding::gap(
        NAME,
        format!("{found}; the default of 100000 connections takes {OPEN_FILES_WANTED}"),
        "LimitNOFILE=1048576 in the unit, or `ulimit -Hn 1048576`, or a smaller limits.connections",
    )
}

fn locked_memory(host: &Host) -> Finding {
    const NAME: &str = "locked memory";
    let bytes = host.locked_memory_bytes;
    let found = if bytes == u64::MAX { "unlimited".to_owned() } else { format!("RLIMIT_MEMLOCK {} KiB", bytes >> 10) };
    if bytes >= LOCKED_MEMORY_BYTES {
        Finding::ok(NAME, found)
    } else {
        Finding::gap(NAME, found, "LimitMEMLOCK=8M in the unit")
    }
}

fn somaxconn(host: &Host) -> Finding {
    const NAME: &str = "listen backlog";
    const SYSCTL: &str = "net.core.somaxconn";
    let wanted = u64::try_from(crate::listen::BACKLOG).unwrap_or(0);
    match host.somaxconn {
        Some(value) if value < wanted => Finding::gap(
            NAME,
            format!("{SYSCTL} = {value}: bursts of more connections wait for a second SYN"),
            sysctl(SYSCTL, wanted),
        ),
        Some(value) => Finding::ok(NAME, format!("{SYSCTL} = {value}")),
        None => unknown(NAME, SYSCTL),
    }
}

/// Each client of mode tcp takes one towards its upstream's server.
fn local_ports(host: &Host) -> Finding {
    const NAME: &str = "local ports";
    const SYSCTL: &str = "net.ipv4.ip_local_port_range";
    let Some((low, high)) = host.local_ports else { return unknown(NAME, SYSCTL) };
    let ports = u64::from(high.saturating_sub(low)) + 1;
    let found = format!("{SYSCTL} = {low} {high}: at most {ports} connections at once to one server by TCP");
    if ports >= LOCAL_PORTS_WANTED {
        return Finding::ok(NAME, found);
    }
    Finding::note(
        NAME,
        format!("{found}; \"1024 65535\" has more, several servers or a unix socket have no such limit"),
    )
}

fn kernel_metrics(host: &Host) -> Finding {
    const NAME: &str = "kernel metrics";
    match &host.uncounted {
        None => Finding::ok(NAME, "connections can be counted by eBPF"),
        Some(Lack { found, mend }) => Finding::gap(NAME, found.clone(), mend.clone()),
    }
}

fn pipe_size(host: &Host) -> Finding {
    const NAME: &str = "pipe size";
    const SYSCTL: &str = "fs.pipe-max-size";
    match host.pipe_max_size_bytes {
        Some(value) if value < PIPE_SIZE_BYTES => {
            Finding::gap(NAME, format!("{SYSCTL} = {value}: bulk transfers cost more"), sysctl(SYSCTL, PIPE_SIZE_BYTES))
        }
        Some(value) => Finding::ok(NAME, format!("{SYSCTL} = {value}")),
        None => unknown(NAME, SYSCTL),
    }
}

fn pipe_memory(host: &Host) -> Finding {
    const NAME: &str = "pipe memory";
    const SYSCTL: &str = "fs.pipe-user-pages-soft";
    match host.pipe_user_pages_soft {
        Some(0) => Finding::ok(NAME, format!("{SYSCTL} = 0, unlimited")),
        Some(pages) if pages * PAGE_BYTES < PIPE_MEMORY_BYTES => Finding::gap(
            NAME,
            format!(
                "{SYSCTL} = {pages}, {} MiB of pipes for a user, where limits.pipe_memory is {} MiB by default: \
                 transfers beyond it copy",
                (pages * PAGE_BYTES) >> 20,
                PIPE_MEMORY_BYTES >> 20
            ),
            sysctl(SYSCTL, PIPE_MEMORY_BYTES / PAGE_BYTES),
        ),
        Some(pages) => Finding::ok(NAME, format!("{SYSCTL} = {pages}, {} MiB for a user", (pages * PAGE_BYTES) >> 20)),
        None => unknown(NAME, SYSCTL),
    }
}

fn unknown(name: &'static str, sysctl: &str) -> Finding {
    Finding::note(name, format!("{sysctl} cannot be read here"))
}

fn sysctl(name: &str, value: u64) -> String {
    format!("sysctl -w {name}={value}   (and the same in /etc/sysctl.d/60-tlsplice.conf, to last)")
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn good_host() -> Host {
        Host {
            version: "Linux version 6.12.117+deb12-cloud-amd64 (...) #1 SMP Debian 6.12.117-1~deb12u1".to_owned(),
            is_root: true,
            io_uring_error: None,
            io_uring_disabled: Some(0),
            open_files_hard: 1 << 20,
            locked_memory_bytes: 8 << 20,
            somaxconn: Some(4096),
            local_ports: Some((1024, 65535)),
            pipe_max_size_bytes: Some(1 << 20),
            pipe_user_pages_soft: Some(16384),
            tls_module_forbidden_by: None,
            tls_module_built: Some(true),
            gcm_driver: Some("generic-gcm-vaes-avx10".to_owned()),
            uncounted: None,
        }
    }

    pub(super) fn good_kernel() -> Kernel {
        let suite = crate::probe::SuiteSupport { name: "TLS1.3 AES-256-GCM", tx: true, rx: true };
        Kernel {
            release: "6.12.117+deb12-cloud-amd64".to_owned(),
            no_ulp: None,
            suites: vec![suite],
            rekey: true,
            short_splice_safe: true,
            opens_in_place: true,
            costs: crate::probe::cost::Costs::of(""),
            partial_record_wakes: false,
        }
    }

    #[test]
    fn a_good_host_has_no_gap() {
        let findings = examine(&good_host(), &good_kernel());
        assert!(findings.iter().all(|f| f.standing == Standing::Ok), "{findings:#?}");
    }

    #[test]
    fn every_gap_has_a_mend() {
        let host = Host {
            is_root: false,
            io_uring_error: Some("Operation not permitted".to_owned()),
            io_uring_disabled: Some(2),
            open_files_hard: 1024,
            locked_memory_bytes: 0,
            somaxconn: Some(128),
            pipe_max_size_bytes: Some(4096),
            pipe_user_pages_soft: Some(16),
            ..good_host()
        };
        let kernel = Kernel { no_ulp: Some("none".to_owned()), ..good_kernel() };
        let findings = examine(&host, &kernel);
        let gaps: Vec<_> = findings.iter().filter(|f| f.standing == Standing::Gap).collect();
        assert_eq!(gaps.len(), 7, "{findings:#?}");
        assert!(gaps.iter().all(|gap| gap.mend.is_some()));
    }
}
