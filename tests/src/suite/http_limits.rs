//! Modes http and redirect at their limits: clients that trickle, flood or read nothing, tunnels that are silent, keys that
//! are used up.

use crate::client::handshake::{Suite, TLS12_AES_256, TLS13_AES_256};
use crate::client::record::{ALERT, DATA};
use crate::client::{Client, How, Tx, UNEXPECTED_MESSAGE};
use crate::environment::{Environment, Relay};
use crate::exchange::Setup;
use crate::proxy::{Proxy, Settings};
use crate::run::{Context, Test};
use crate::scrape::memory_kib;
use crate::talk::{Talk, connect, connect_by, echo, heard, manual, setup_with};
use crate::upstream::{Kind, Upstream};
use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |name, run| tests.extend(Test::some_guests(env, name, run));
    add("http_what_says_nothing_renews_no_timeout", trickles);
    add("http_the_end_of_a_head_gets_no_more_time", late_head);
    add("http_a_storm_of_records_that_say_nothing_is_ended", storm);
    add("http_a_tunnel_may_be_silent_for_longer_than_a_response", silent_tunnel);
    add("http_a_key_used_up_is_announced_by_connection_close", used_up);
    add("http_little_is_read_ahead_behind_a_body", read_ahead);
    tests.push(Test::new(env, "redirect_a_client_that_reads_nothing_costs_little_and_holds_nobody", flood));
    tests
}

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const NO_BODY: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

// ---- time

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trickle {
    EmptyRecords,
    /// Of one record that is never complete.
    Bytes,
    /// Of the request that follows.
    Plaintext,
    /// Each of which asks for one.
    KeyUpdates,
}

impl Trickle {
    /// Goes on for longer than any of these connections may last, or until it is over.
    fn send(self, tx: &mut Tx, is_over: &AtomicBool) -> Result<()> {
        const PIECES: usize = 16;
        let record = if self == Self::Bytes { tx.seal(DATA, &[b'x'; 1000], 0)? } else { Vec::new() };
        for n in 0..PIECES {
            thread::sleep(Duration::from_millis(250));
            let piece = match self {
                Self::EmptyRecords => tx.seal(DATA, &[], 0)?,
                Self::Bytes => record[n..=n].to_vec(),
                Self::Plaintext => tx.seal(DATA, &GET.as_bytes()[n..=n], 0)?,
                Self::KeyUpdates => {
                    let mut update = Vec::new();
                    tx.seal_key_update(&mut update, true)?;
                    update
                }
            };
            if is_over.load(Ordering::Relaxed) || tx.write(&piece).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// What comes meanwhile, how it ends, and after which time.
    fn heard(self, client: &mut Client) -> Result<(String, How, Duration)> {
        let Client { tx, rx } = client;
        let (started, is_over, mut got) = (Instant::now(), AtomicBool::new(false), Vec::new());
        thread::scope(|scope| {
            let sending = scope.spawn(|| self.send(tx, &is_over));
            let ended = rx.read(u64::MAX, |_, data| {
                got.extend_from_slice(data);
                Ok(())
            });
            let took = started.elapsed();
            is_over.store(true, Ordering::Relaxed);
            sending.join().expect("the sender does not panic")?;
            let ended = ended?.context("without a limit it reads to the end")?;
            Ok((String::from_utf8_lossy(&got).into_owned(), ended.how, took))
        })
    }
}

fn trickles(ctx: &Context, relay: Relay) -> Result<()> {
    const ENOUGH: Duration = Duration::from_millis(2_800);
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = setup_with(ctx, relay, &[0, 1 << 20], upstream, |settings| {
        settings.http("keep_alive = \"1s\"").http("response_timeout = \"1s\"")
    })?;
    use Trickle::{Bytes, EmptyRecords, KeyUpdates, Plaintext};
    let updates = if ctx.environment.rekeys() { &[KeyUpdates][..] } else { &[] };
    for listener in 0..2 {
        for &trickle in [EmptyRecords, Bytes, Plaintext].iter().chain(updates) {
            let mut client = connect(ctx, &setup, listener)?;
            client.send(GET)?;
            let stream = setup.upstream.accept()?;
            heard(&stream, "\r\n\r\n")?;
            let (got, how, took) = trickle.heard(&mut client.client)?;
            ensure!(got.starts_with("HTTP/1.1 504 "), "{trickle:?}: {how:?} after {got:?}");
            ensure!(took < ENOUGH, "listener {listener}: {trickle:?} held a response_timeout of 1 s for {took:?}");
        }
        for &trickle in [EmptyRecords, Bytes].iter().chain(updates) {
            let mut client = connect(ctx, &setup, listener)?;
            client.send(GET)?;
            let stream = setup.upstream.accept()?;
            heard(&stream, "\r\n\r\n")?;
            stream.send(NO_BODY)?;
            client.until("\r\n\r\n")?;
            let (got, how, took) = trickle.heard(&mut client.client)?;
            ensure!(got.is_empty() && how == How::CloseNotify, "{trickle:?}: {how:?} after {got:?}");
            ensure!(took < ENOUGH, "listener {listener}: {trickle:?} held a keep_alive of 1 s for {took:?}");
        }
    }
    setup.finish(ctx).map(drop)
}

fn late_head(ctx: &Context, relay: Relay) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(3);
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = setup_with(ctx, relay, &[0, 1 << 20], upstream, |settings| settings.http("head_timeout = \"3s\""))?;
    for listener in 0..2 {
        let mut client = connect(ctx, &setup, listener)?;
        let started = Instant::now();
        client.send("GET / HTTP/1.1\r\n")?;
        thread::sleep(LIMIT - Duration::from_millis(500));
        client.send("Host:")?;
        let (got, how) = client.rest()?;
        let took = started.elapsed();
        ensure!(got.starts_with("HTTP/1.1 408 ") && how == How::CloseNotify, "{how:?} after {got:?}");
        ensure!(took < LIMIT + LIMIT / 2, "listener {listener}: a head had {took:?} of {LIMIT:?}");
    }
    setup.finish(ctx).map(drop)
}

fn storm(ctx: &Context, relay: Relay) -> Result<()> {
    /// Less than a socket buffer takes.
    const RECORDS: usize = 2_000;
    let setup = manual(ctx, relay, &[0, 1 << 20])?;
    // The kernel passes over empty records and tells nobody.
    let before_the_door: &[usize] = if relay.offloads() { &[1] } else { &[0, 1] };
    let cases: [(Suite, u8, &[u8], &[usize]); 3] = [
        (TLS13_AES_256, DATA, &[], before_the_door),
        (TLS12_AES_256, DATA, &[], before_the_door),
        (TLS12_AES_256, ALERT, &[1, 90], &[0, 1]),
    ];
    let mut storms = 0;
    for (suite, kind, body, listeners) in cases {
        for &listener in listeners {
            let mut client = connect_by(ctx, &setup, listener, suite)?;
            client.send(GET)?;
            let stream = setup.upstream.accept()?;
            heard(&stream, "\r\n\r\n")?;
            stream.send(NO_BODY)?;
            client.until("\r\n\r\n")?;
            let mut bytes = Vec::new();
            for _ in 0..RECORDS {
                bytes.extend(client.client.tx.seal(kind, body, 0)?);
            }
            // It may be reset before all is sent.
            let _ = client.client.tx.write(&bytes);
            let (got, how) = client.rest()?;
            let what = || format!("{}, kind {kind}, listener {listener}: {how:?} after {got:?}", suite.name);
            ensure!(got.is_empty() && matches!(how, How::Alert(UNEXPECTED_MESSAGE) | How::Reset), what());
            storms += 1;
        }
    }
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("unexpected_message") == storms, "endings: {}", metrics.endings());
    Ok(())
}

fn silent_tunnel(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = setup_with(ctx, relay, &[0, 1 << 20], upstream, |settings| settings.http("response_timeout = \"1s\""))?;
    for listener in 0..2 {
        let mut client = connect(ctx, &setup, listener)?;
        client.send("GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")?;
        let stream = setup.upstream.accept()?;
        heard(&stream, "\r\n\r\n")?;
        stream.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")?;
        client.until("\r\n\r\n")?;
        for _ in 0..2 {
            thread::sleep(Duration::from_millis(2_500));
            stream.send(b"from the server")?;
            client.until("from the server").with_context(|| format!("listener {listener}"))?;
            client.send("from the client")?;
            heard(&stream, "from the client")?;
        }
        client.client.tx.close_notify()?;
        stream.fin()?;
        ensure!(client.rest()? == (String::new(), How::CloseNotify), "another end");
    }
    setup.finish(ctx).map(drop)
}

// ---- keys

const RECORDS_PER_KEY: usize = 64;

fn limited(ctx: &Context, relay: Relay, upstream: Upstream) -> Result<Setup> {
    setup_with(ctx, relay, &[0, 1 << 20], upstream, |s| s.limit(&format!("records_per_key = {RECORDS_PER_KEY}")))
}

fn used_up(ctx: &Context, relay: Relay) -> Result<()> {
    const REQUESTS: usize = 200;
    let setup = limited(ctx, relay, Upstream::serve(&ctx.environment, Kind::V4, echo)?)?;
    for listener in 0..2 {
        for suite in [TLS12_AES_256, TLS13_AES_256] {
            let (mut answered, mut connections) = (0, 0);
            while answered < REQUESTS {
                let mut client = connect_by(ctx, &setup, listener, suite)?;
                connections += 1;
                let count = requests(&mut client, REQUESTS - answered);
                answered += count.with_context(|| format!("{}, listener {listener}, after {answered}", suite.name))?;
            }
            ctx.note(&format!("{}, listener {listener}: {connections} connections", suite.name));
            let needed = if suite == TLS12_AES_256 { REQUESTS.div_ceil(RECORDS_PER_KEY) } else { 1 };
            ensure!(
                (needed..=REQUESTS / 8).contains(&connections),
                "{connections} connections for {REQUESTS} requests"
            );
        }
    }
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("key_exhausted") == 0, "endings: {}", metrics.endings());
    used_up_by_one(ctx, relay)
}

/// Asks until the connection's end is announced, and sees that it is clean.
fn requests(client: &mut Talk, most: usize) -> Result<usize> {
    for n in 1..=most {
        client.send(GET)?;
        let head = client.until("\r\n\r\n")?;
        ensure!(client.until("\r\n\r\n")?.starts_with("GET / "), "another answer");
        if head.contains("\r\nConnection: close\r\n") {
            let end = client.rest()?;
            ensure!(end == (String::new(), How::CloseNotify), "announced, and then {end:?}");
            return Ok(n);
        }
    }
    client.client.tx.close_notify()?;
    Ok(most)
}

/// A response of many records, promised another one behind it: a clean end, before a request goes to the upstream.
fn used_up_by_one(ctx: &Context, relay: Relay) -> Result<()> {
    // A quarter of the key is left, or less. Behind the door half of it is in reserve.
    let pieces = |door: bool| if door && relay.offloads() { 26 } else { 50 };
    let setup = limited(ctx, relay, Upstream::manual(&ctx.environment, Kind::V4)?)?;
    for listener in 0..2 {
        let mut client = connect_by(ctx, &setup, listener, TLS12_AES_256)?;
        client.send(GET)?;
        let stream = setup.upstream.accept()?;
        heard(&stream, "\r\n\r\n")?;
        stream.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        let head = client.until("\r\n\r\n")?;
        ensure!(!head.contains("Connection: close"), "{head:?}");
        for _ in 0..pieces(listener == 0) {
            stream.send(b"1\r\nx\r\n")?;
            client.until("1\r\nx\r\n").with_context(|| format!("listener {listener}"))?;
        }
        stream.send(b"0\r\n\r\n")?;
        let end = client.rest()?;
        ensure!(end == ("0\r\n\r\n".to_owned(), How::CloseNotify), "listener {listener}: {end:?}");
    }
    setup.finish(ctx).map(drop)
}

// ---- memory

fn read_ahead(ctx: &Context, relay: Relay) -> Result<()> {
    const PIPELINED_BYTES: usize = 512 << 10;
    /// 16 KiB and a record, and less than what lies in the socket.
    const AHEAD_BYTES: u64 = 40 << 10;
    let setup = manual(ctx, relay, &[0, 1 << 20])?;
    for listener in 0..2 {
        let mut client = connect(ctx, &setup, listener)?;
        client.send("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n")?;
        let stream = setup.upstream.accept()?;
        heard(&stream, "\r\n\r\n")?;
        let before = setup.proxy.metrics()?.moved("in");
        // All of it is there when it is read.
        setup.proxy.signal(Signal::STOP)?;
        client.send(format!("x{}", GET.repeat(PIPELINED_BYTES / GET.len())))?;
        setup.proxy.signal(Signal::CONT)?;
        heard(&stream, "x")?;
        thread::sleep(ctx.environment.moment() * 100);
        let ahead = setup.proxy.metrics()?.moved("in") - before;
        ctx.note(&format!("listener {listener}: {ahead} bytes were read ahead"));
        ensure!(ahead < AHEAD_BYTES, "listener {listener}: {ahead} bytes were read ahead");
        client.client.reset()?;
        drop(stream);
    }
    setup.finish(ctx).map(drop)
}

/// It asks as fast as it can, on the only worker.
fn flood(ctx: &Context) -> Result<()> {
    const FLOOD: Duration = Duration::from_secs(3);
    const MOST_KIB: u64 = 8 << 10;
    let settings = Settings::new(ctx, Relay::Userspace)?.listen(0, "127.0.0.1:1")?.mode("redirect");
    let proxy = Proxy::start(ctx, settings.server("workers = 1"))?;
    ask(ctx, proxy.address(0))?;
    let before = memory_kib(proxy.pid())?.0;
    let socket = TcpStream::connect(proxy.address(0))?;
    socket.set_write_timeout(Some(Duration::from_millis(200)))?;
    let (answered, grown) = thread::scope(|scope| {
        let flooding = scope.spawn(|| {
            let (started, requests, mut at) = (Instant::now(), GET.repeat(1_000), 0);
            while started.elapsed() < FLOOD {
                // A full socket takes a part of it, or nothing.
                at += (&socket).write(&requests.as_bytes()[at..]).unwrap_or(0);
                at %= requests.len();
            }
        });
        thread::sleep(FLOOD / 6);
        let started = Instant::now();
        ask(ctx, proxy.address(0))?;
        let answered = started.elapsed();
        flooding.join().expect("the flood does not panic");
        Ok::<_, anyhow::Error>((answered, memory_kib(proxy.pid())?.0.saturating_sub(before)))
    })?;
    ctx.note(&format!("another client was answered after {answered:?}, memory grew by {grown} KiB"));
    ensure!(answered < FLOOD / 3, "another client was answered after {answered:?}");
    ensure!(grown < MOST_KIB, "memory grew by {grown} KiB");
    drop(socket);
    proxy.finish(ctx).map(drop)
}

fn ask(ctx: &Context, address: SocketAddr) -> Result<()> {
    let mut socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(ctx.environment.patience()))?;
    socket.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
    let mut got = String::new();
    socket.read_to_string(&mut got)?;
    ensure!(got.starts_with("HTTP/1.1 308 "), "{got:?}");
    Ok(())
}
