//! Clients that read nothing while their upstreams send, from the start or after much: what they hold is capped, and others
//! are served.

use crate::client::Client;
use crate::client::handshake::{Offer, TLS13_AES_128, TLS13_AES_256};
use crate::environment::{Environment, Relay};
use crate::exchange::{Plan, Setup};
use crate::process::free_port;
use crate::proxy::loopback;
use crate::run::{Context, Test};
use crate::scrape::{memory_kib, tcp_memory_kib};
use crate::suite::slow_readers::small_socket;
use crate::upstream::{Kind, Upstream, exchange as serve};
use anyhow::{Context as _, Result, ensure};
use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Test::some_guests(env, "readers_that_stall_hold_no_more_than_their_caps", from_the_start);
    tests.extend(Test::some_guests(env, "readers_that_stall_after_much_hold_no_more_than_their_caps", after_much));
    for test in &mut tests {
        test.limit = Duration::from_secs(env.scale(90, 240));
    }
    tests
}

const PIPE_MEMORY_KIB: u64 = 64 << 10;
/// Of the process: what it has anyway, and for each stalled reader some ciphertext that it could not hand on. In userspace
/// that is little, as no more is read than the reader takes; past the door the kernel holds it, and copies go through a
/// small buffer.
const PROCESS_KIB: u64 = 64 << 10;
const OFFLOADED_READER_KIB: u64 = 20;
const USERSPACE_READER_KIB: u64 = 40;
/// By how much the buffers of all workers, touched for the first time, let the process grow.
const BUFFERS_KIB: u64 = 8 << 10;

/// An upstream that sends to everyone as fast as they take it, in one thread.
fn flood(listener: &TcpListener, readers: &Readers, stop: &AtomicBool, sent: &AtomicU64) -> Result<()> {
    listener.set_nonblocking(true)?;
    let mut streams: Vec<TcpStream> = Vec::new();
    // For one that keeps up there has to be much to read at once.
    let chunk = vec![7; if readers.first_bytes > 0 { 4 << 20 } else { 1 << 16 }];
    while !stop.load(Relaxed) {
        while let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(true)?;
            if readers.first_bytes == 0 {
                // Most of what is in flight shall be tlsplice's affair.
                socket2::SockRef::from(&stream).set_send_buffer_size(1 << 16)?;
            }
            streams.push(stream);
        }
        let mut idle = true;
        for mut stream in &streams {
            match stream.write(&chunk) {
                Ok(n) => {
                    sent.fetch_add(n as u64, Relaxed);
                    idle = false;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                // Its client has gone.
                Err(_) => {}
            }
        }
        if idle {
            thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}

/// Who stalls.
struct Readers {
    count: u64,
    /// What each has read before.
    first_bytes: u64,
}

fn from_the_start(ctx: &Context, relay: Relay) -> Result<()> {
    stalled(ctx, relay, &Readers { count: ctx.environment.scale(1_000, 200), first_bytes: 0 })
}

/// For a reader that keeps up, large pieces are read. When it stalls, no more of one is kept than of one that never read.
fn after_much(ctx: &Context, relay: Relay) -> Result<()> {
    let (count, first_bytes) = ctx.environment.scale((64, 4 << 20), (12, 4 << 20));
    stalled(ctx, relay, &Readers { count, first_bytes })
}

fn stalled(ctx: &Context, relay: Relay, readers: &Readers) -> Result<()> {
    let listener = TcpListener::bind(loopback(free_port()?))?;
    let flooding = listener.local_addr()?.to_string();
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    let setup = Setup::with(ctx, relay, &[0, 0, 1 << 20], upstream, |mut settings| {
        settings.listeners[0].server = flooding;
        settings
    })?;
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let flooder = scope.spawn(|| flood(&listener, readers, &stop, &sent));
        let result = measure(ctx, &setup, relay, readers, &sent);
        stop.store(true, Relaxed);
        flooder.join().expect("the flooder does not panic")?;
        result
    })?;
    setup.finish(ctx).map(drop)
}

fn measure(ctx: &Context, setup: &Setup, relay: Relay, readers: &Readers, sent: &AtomicU64) -> Result<()> {
    let pid = setup.proxy.pid();
    let ((pss_before, measure), tcp_before) = (memory_kib(pid)?, tcp_memory_kib()?);
    let offer = Offer::new(ctx, TLS13_AES_128)?;
    let connect = |_| {
        if readers.first_bytes == 0 {
            return Client::connect_on(ctx, small_socket(setup.proxy.address(0), 16_384)?, &offer);
        }
        let mut client = Client::connect(ctx, setup.proxy.address(0), &offer)?;
        let ended = client.rx.read(readers.first_bytes, |_, _| Ok(()))?;
        ensure!(ended.is_none(), "the stream ended: {ended:?}");
        Ok(client)
    };
    let started = Instant::now();
    let clients = (0..readers.count).map(connect).collect::<Result<Vec<_>>>().context("connect the readers")?;
    // Until nothing moves any more.
    let mut last = u64::MAX;
    while last != sent.load(Relaxed) {
        last = sent.load(Relaxed);
        thread::sleep(Duration::from_millis(500));
    }
    let (stalled, served) = (started.elapsed(), Instant::now());
    for listener in [1, 2] {
        setup.transfer_beside(ctx, listener, TLS13_AES_256, &Plan::new(8 << 20, 8 << 20))?;
    }
    ctx.note(&format!(
        "all stand still after {:.1} s; 32 MiB beside them took {:.1} s",
        stalled.as_secs_f64(),
        served.elapsed().as_secs_f64()
    ));
    let metrics = setup.proxy.metrics()?;
    let pss = memory_kib(pid)?.0;
    let pipes = metrics.sum("tlsplice_pipe_bytes", &[]) >> 10;
    ctx.note(&format!(
        "{} stalled readers, {} MiB taken from their upstreams: {measure} {} KiB (+{}), pipes {pipes} KiB, {} denied, TCP +{} KiB",
        readers.count,
        last >> 20,
        pss,
        pss - pss_before.min(pss),
        metrics.sum("tlsplice_pipe_denied_total", &[]),
        tcp_memory_kib()?.saturating_sub(tcp_before),
    ));
    ensure!(pipes <= PIPE_MEMORY_KIB, "the pipes hold {pipes} KiB");
    let each = if relay.offloads() { OFFLOADED_READER_KIB } else { USERSPACE_READER_KIB };
    let cap = PROCESS_KIB + readers.count * each;
    ensure!(pss <= cap, "the process has {pss} KiB, {cap} are the cap");
    if readers.first_bytes > 0 {
        let (grown, cap) = (pss.saturating_sub(pss_before), BUFFERS_KIB + readers.count * each);
        ensure!(grown <= cap, "the process has grown by {grown} KiB, {cap} are the cap");
    }
    drop(clients);
    Ok(())
}
