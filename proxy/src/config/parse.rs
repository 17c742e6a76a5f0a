//! TOML to `Config`: every key of the contract, its default, and what it may be.
//!
//!   text ─▶ toml (recovers from syntax errors) ─▶ sections ─▶ listeners meet their upstreams ─▶ Config
//!
//! All problems of a file are reported together, each with line and column. What the contract promises and this
//! version has not is refused by name, never read and ignored.

use super::problem::{Invalid, Problems, excerpt};
use super::section::{Read, Section, allowed};
use super::tls::read_tls;
use super::{
    ClientAddress, Config, Http, KernelMetrics, Limits, Listener, Log, LogFormat, Metrics, Mode, Offload, OffloadAfter,
    Server, SpliceMode, Upstream, hsts, value,
};
use crate::observe::ebpf::PINS;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use toml::de::{DeTable, DeValue};

/// Tables that the file may have, in the order of the contract.
const SECTIONS: &str = "[server], [tls], [limits], [http], [log], [metrics], [[listener]], [[upstream]]";

const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// A head is a few packets: who needs longer for it has no request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
const KEEP_ALIVE: Duration = Duration::from_secs(75);
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);
/// Shorter than the time after which common upstreams close: Node 5 s with a grace, Apache 5 s, nginx 75 s.
const UPSTREAM_IDLE: Duration = Duration::from_secs(4);
const HEAD_BYTES: u64 = 32 << 10;
/// Below, browsers with cookies fail; above, a head is held in memory for each connection that sends one.
const HEAD_SIZES_BYTES: std::ops::RangeInclusive<u64> = 4 << 10..=1 << 20;
const CONNECTIONS: u64 = 100_000;
/// Each connection is two descriptors, and a process has at most 2^20 of them by Linux' own default (fs.nr_open).
const CONNECTIONS_MAX: u64 = 10_000_000;
const PIPE_MEMORY_BYTES: u64 = 64 << 20;
const MEMORY_MAX_BYTES: u64 = 1 << 40;
/// Half of where the kernel's pressure begins on a host of 4 GiB (net.ipv4.tcp_mem, a sixteenth of its memory).
const SEND_MEMORY_BYTES: u64 = 128 << 20;
/// RFC 8446 section 5.5 allows 2^24.5 full records under one AES-GCM key; rustls renews at 2^24, and so do we.
const RECORDS_PER_KEY_MAX: u64 = 1 << 24;
/// A key that one read of an upstream would use up could never be the next: a connection would only renew keys.
const RECORDS_PER_KEY_MIN: u64 = 64;
/// A handshake or a connect that takes longer only holds a slot.
const SHORT_TIMEOUTS: std::ops::RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(3600);
const IDLE_TIMEOUTS: std::ops::RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(365 * 86_400);
/// Who balances finds out within minutes; the certificates are not looked at meanwhile.
const DRAIN_DELAYS: std::ops::RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(3600);
/// 0 cuts at once.
const DRAIN_TIMEOUTS: std::ops::RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(86_400);

impl Config {
    /// Reads a configuration; `file` is only named in what is said.
    ///
    /// # Errors
    /// Everything that is wrong with it, with line and column.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Invalid> {
        let mut problems = Problems::new(file, text);
        let (document, syntax) = DeTable::parse_recoverable(text);
        for error in &syntax {
            problems.add(error.span().unwrap_or(0..0), error.message().to_owned());
        }
        let config = read_document(&mut problems, document.get_ref());
        match (problems.into_invalid(), config) {
            (Some(invalid), _) => Err(invalid),
            (None, config) => Ok(config),
        }
    }
}

fn read_document<'a>(problems: &mut Problems<'_>, document: &'a DeTable<'a>) -> Config {
    for name in document.keys() {
        match name.get_ref().as_ref() {
            "server" | "tls" | "limits" | "http" | "log" | "metrics" | "listener" | "upstream" => {}
            other => problems.add(name.span(), format!("unknown section \"{other}\"; allowed: {SECTIONS}")),
        }
    }
    let server = read_server(section(problems, document, "server"), problems);
    let tls = read_tls(section(problems, document, "tls"), problems);
    let limits = read_limits(section(problems, document, "limits"), problems);
    let http = read_http(section(problems, document, "http"), problems);
    let log = read_log(section(problems, document, "log"), problems);
    let metrics = read_metrics(section(problems, document, "metrics"), problems);
    let upstreams = read_upstreams(problems, document);
    let listeners = read_listeners(problems, document, &upstreams);
    Config { server, tls, limits, http, log, metrics, listeners }
}

/// The table `[name]`; an absent one has no keys.
fn section<'a>(problems: &mut Problems<'_>, document: &'a DeTable<'a>, name: &str) -> Section<'a> {
    match document.get(name).map(|value| (value.span(), value.get_ref())) {
        None => Section::absent(name),
        Some((span, DeValue::Table(table))) => Section::new(name, table, span),
        Some((span, _)) => {
            problems.add(span, format!("{name}: allowed: one table, [{name}]"));
            Section::absent(name)
        }
    }
}

/// The tables `[[name]]`, in the order of the file.
fn sections<'a>(problems: &mut Problems<'_>, document: &'a DeTable<'a>, name: &str) -> Vec<Section<'a>> {
    let Some(value) = document.get(name) else { return Vec::new() };
    let what = format!("{name}: allowed: tables, each with the head [[{name}]]");
    let DeValue::Array(items) = value.get_ref() else {
        problems.add(value.span(), what);
        return Vec::new();
    };
    let mut tables = Vec::with_capacity(items.len());
    for item in items.iter() {
        match item.get_ref() {
            DeValue::Table(table) => tables.push(Section::new(name, table, item.span())),
            DeValue::String(_)
            | DeValue::Integer(_)
            | DeValue::Float(_)
            | DeValue::Boolean(_)
            | DeValue::Datetime(_)
            | DeValue::Array(_) => problems.add(item.span(), what.clone()),
        }
    }
    tables
}

fn read_server(mut section: Section<'_>, problems: &mut Problems<'_>) -> Server {
    const SPLICE: &[(&str, SpliceMode)] =
        &[("auto", SpliceMode::Auto), ("inline", SpliceMode::Inline), ("ring", SpliceMode::Ring)];
    let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let server = Server {
        workers: section.take_or(problems, "workers", cores, value::workers),
        admin: section.take(problems, "admin", value::socket_address).map(|(address, _)| address),
        drain_delay: section.take_or(problems, "drain_delay", Duration::ZERO, |v| value::duration(v, DRAIN_DELAYS)),
        drain_timeout: section
            .take_or(problems, "drain_timeout", DRAIN_TIMEOUT, |v| value::duration(v, DRAIN_TIMEOUTS)),
        splice: section.take_or(problems, "splice", SpliceMode::Auto, |v| value::word(v, SPLICE, &[])),
        user: section.take(problems, "user", value::name).map(|(name, _)| name),
    };
    section.finish(problems);
    server
}

/// The values of a list in order; a second mention of one is a slip.
pub(super) fn unique<T: PartialEq>(
    problems: &mut Problems<'_>,
    path: &str,
    list: Option<Vec<(T, Range<usize>)>>,
) -> Vec<T> {
    let mut values = Vec::new();
    for (value, span) in list.unwrap_or_default() {
        if values.contains(&value) {
            let twice = excerpt(problems.text(), span.clone());
            problems.add(span, format!("{path}: {twice} is named twice"));
        } else {
            values.push(value);
        }
    }
    values
}

fn read_limits(mut section: Section<'_>, problems: &mut Problems<'_>) -> Limits {
    let short = |problems: &mut Problems<'_>, section: &mut Section<'_>, key, default| {
        section.take_or(problems, key, default, |v| value::duration(v, SHORT_TIMEOUTS))
    };
    let handshake_timeout = short(problems, &mut section, "handshake_timeout", HANDSHAKE_TIMEOUT);
    let connect_timeout = short(problems, &mut section, "connect_timeout", CONNECT_TIMEOUT);
    let idle_timeout = section.take_or(problems, "idle_timeout", IDLE_TIMEOUT, |v| value::duration(v, IDLE_TIMEOUTS));
    let connections = section.take_or(problems, "connections", CONNECTIONS, |v| value::whole(v, 1..=CONNECTIONS_MAX));
    let pipe_memory_bytes =
        section.take_or(problems, "pipe_memory", PIPE_MEMORY_BYTES, |v| value::size(v, 0..=MEMORY_MAX_BYTES));
    let send_memory_bytes =
        section.take_or(problems, "send_memory", SEND_MEMORY_BYTES, |v| value::size(v, 0..=MEMORY_MAX_BYTES));
    let records_per_key = section.take_or(problems, "records_per_key", RECORDS_PER_KEY_MAX, |v| {
        value::whole(v, RECORDS_PER_KEY_MIN..=RECORDS_PER_KEY_MAX)
    });
    section.finish(problems);
    Limits {
        handshake_timeout,
        connect_timeout,
        idle_timeout,
        // All fit: this program is for 64-bit Linux, and the ranges above end far below.
        connections: usize::try_from(connections).unwrap_or(usize::MAX),
        pipe_memory_bytes: usize::try_from(pipe_memory_bytes).unwrap_or(usize::MAX),
        send_memory_bytes: usize::try_from(send_memory_bytes).unwrap_or(usize::MAX),
        records_per_key,
    }
}

fn read_http(mut section: Section<'_>, problems: &mut Problems<'_>) -> Http {
    let time = |problems: &mut Problems<'_>, section: &mut Section<'_>, key, default, range| {
        section.take_or(problems, key, default, |v| value::duration(v, range))
    };
    let head_bytes = section.take_or(problems, "head_size", HEAD_BYTES, |v| value::size(v, HEAD_SIZES_BYTES));
    let http = Http {
        hsts: section.take_or(problems, "hsts", hsts::DEFAULT.to_owned(), hsts::hsts),
        head_bytes: usize::try_from(head_bytes).unwrap_or(usize::MAX),
        acme_challenge: section.take(problems, "acme_challenge", value::path).map(|(path, _)| path),
        head_timeout: time(problems, &mut section, "head_timeout", HEAD_TIMEOUT, SHORT_TIMEOUTS),
        keep_alive: time(problems, &mut section, "keep_alive", KEEP_ALIVE, SHORT_TIMEOUTS),
        response_timeout: time(problems, &mut section, "response_timeout", RESPONSE_TIMEOUT, IDLE_TIMEOUTS),
        upstream_idle: time(problems, &mut section, "upstream_idle", UPSTREAM_IDLE, DRAIN_TIMEOUTS),
    };
    section.finish(problems);
    http
}

fn read_log(mut section: Section<'_>, problems: &mut Problems<'_>) -> Log {
    const FORMATS: &[(&str, LogFormat)] = &[("json", LogFormat::Json), ("text", LogFormat::Text)];
    const LEVELS: &[(&str, tracing::Level)] = &[
        ("error", tracing::Level::ERROR),
        ("warn", tracing::Level::WARN),
        ("info", tracing::Level::INFO),
        ("debug", tracing::Level::DEBUG),
        ("trace", tracing::Level::TRACE),
    ];
    const ADDRESSES: &[(&str, ClientAddress)] =
        &[("full", ClientAddress::Full), ("truncated", ClientAddress::Truncated)];
    let log = Log {
        format: section.take_or(problems, "format", LogFormat::Json, |v| value::word(v, FORMATS, &[])),
        level: section.take_or(problems, "level", tracing::Level::INFO, |v| value::word(v, LEVELS, &[])),
        client_address: section
            .take_or(problems, "client_address", ClientAddress::Full, |v| value::word(v, ADDRESSES, &[])),
    };
    section.finish(problems);
    log
}

fn read_metrics(mut section: Section<'_>, problems: &mut Problems<'_>) -> Metrics {
    const KERNEL: &[(&str, KernelMetrics)] =
        &[("auto", KernelMetrics::Auto), ("require", KernelMetrics::Require), ("off", KernelMetrics::Off)];
    let metrics = Metrics {
        kernel: section.take_or(problems, "kernel", KernelMetrics::Auto, |v| value::word(v, KERNEL, &[])),
        pins: section.take_or(problems, "pins", PathBuf::from(PINS), value::path),
    };
    section.finish(problems);
    metrics
}

/// The upstreams by name; a refused one is in it too, so that its listeners are not blamed.
type Upstreams = HashMap<String, Arc<Upstream>>;

fn read_upstreams<'a>(problems: &mut Problems<'_>, document: &'a DeTable<'a>) -> Upstreams {
    let mut upstreams = Upstreams::new();
    for mut section in sections(problems, document, "upstream") {
        let name = section.take(problems, "name", value::name);
        if name.is_none() && !section.has("name") {
            section.missing(problems, "name", "the name that listeners call it by");
        }
        let servers = section.take_some(problems, "servers", "server addresses in quotes", value::server_address);
        section.take_or(problems, "send_proxy", (), |v| value::word(v, &[("off", ())], &["v1", "v2"]));
        let servers = unique(problems, "upstream.servers", Some(servers));
        section.finish(problems);
        if let Some((name, span)) = name {
            let upstream = Arc::new(Upstream { name: name.clone(), servers });
            if upstreams.insert(name.clone(), upstream).is_some() {
                problems.add(span, format!("upstream.name: \"{name}\" is the name of another upstream already"));
            }
        }
    }
    upstreams
}

fn read_listeners<'a>(
    problems: &mut Problems<'_>,
    document: &'a DeTable<'a>,
    upstreams: &Upstreams,
) -> Vec<Arc<Listener>> {
    let mut listeners = Vec::new();
    let mut addresses = Vec::new();
    for section in sections(problems, document, "listener") {
        listeners.extend(read_listener(problems, section, upstreams, &mut addresses).map(Arc::new));
    }
    if document.get("listener").is_none_or(|v| matches!(v.get_ref(), DeValue::Array(items) if items.is_empty())) {
        problems.add(0..0, "no [[listener]]: it takes at least one, with its address and upstream".to_owned());
    }
    listeners
}

/// One `[[listener]]`; `None` if a problem was noted that leaves nothing to go on with. `addresses` are those of the
/// listeners before it.
fn read_listener(
    problems: &mut Problems<'_>,
    mut section: Section<'_>,
    upstreams: &Upstreams,
    addresses: &mut Vec<SocketAddr>,
) -> Option<Listener> {
    const OFFLOAD: &[(&str, Offload)] =
        &[("auto", Offload::Auto), ("require", Offload::Require), ("off", Offload::Off)];
    const PROXY_LATER: &[&str] = &["v1", "v2", "any"];
    let address = section.take(problems, "address", value::socket_address);
    match &address {
        Some((address, span)) if addresses.contains(address) => {
            problems.add(span.clone(), format!("listener.address: another listener has {address} already"));
        }
        Some((address, _)) => addresses.push(*address),
        None if section.has("address") => {}
        None => section.missing(problems, "address", "an IP address and a port, as in \"[::]:443\""),
    }
    const MODES: &[(&str, Word)] = &[("tcp", Word::Tcp), ("http", Word::Http), ("redirect", Word::Redirect)];
    let mode_is_read = section.take(problems, "mode", |v| value::word(v, MODES, &[]));
    let mode_is_refused = mode_is_read.is_none() && section.has("mode");
    let word = mode_is_read.map_or(Word::Tcp, |(word, _)| word);
    if word == Word::Redirect {
        for key in ["upstream", "offload", "offload_after"].into_iter().filter(|key| section.has(key)) {
            let why = format!("listener.{key}: mode = \"redirect\" has neither TLS nor an upstream; leave it out");
            problems.add(section.span_of(key), why);
        }
    }
    let offload = section.take_or(problems, "offload", Offload::Auto, |v| value::word(v, OFFLOAD, &[]));
    let offload_after = section.take_or(problems, "offload_after", OffloadAfter::Auto, offload_after);
    section.take_or(problems, "accept_proxy", (), |v| value::word(v, &[("off", ())], PROXY_LATER));
    section.not_built(problems, "trusted");
    let upstream = section.take(problems, "upstream", value::name);
    let upstream = match upstream {
        Some((name, span)) => {
            let known = upstreams.get(&name).cloned();
            if known.is_none() {
                let mut names: Vec<_> = upstreams.keys().map(|name| format!("\"{name}\"")).collect();
                names.sort();
                let names = if names.is_empty() { "none is defined".to_owned() } else { names.join(", ") };
                problems.add(span, format!("listener.upstream: no [[upstream]] is named \"{name}\"; allowed: {names}"));
            }
            known
        }
        None => {
            // A mode that was refused may have been meant as one without an upstream.
            if !section.has("upstream") && !mode_is_refused && word != Word::Redirect {
                section.missing(problems, "upstream", "the name of an [[upstream]]");
            }
            None
        }
    };
    section.finish(problems);
    let (address, _) = address?;
    let mode = match word {
        Word::Tcp => Mode::Tcp(upstream?),
        Word::Http => Mode::Http(upstream?),
        Word::Redirect => Mode::Redirect,
    };
    Some(Listener { address, offload, offload_after, mode })
}

/// The mode before its upstream is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Tcp,
    Http,
    Redirect,
}

/// `"auto"`, 0 or a size.
fn offload_after(value: &DeValue<'_>) -> Read<OffloadAfter> {
    if let DeValue::String(word) = value
        && word == "auto"
    {
        return Ok(OffloadAfter::Auto);
    }
    match value::size(value, 0..=u64::MAX) {
        Ok(bytes) => Ok(OffloadAfter::Bytes(bytes)),
        Err(_) => allowed("\"auto\", 0, a number of bytes, or a size in quotes as in \"128 KiB\""),
    }
}
