//! SIGTERM: whoever balances finds out before the port closes, nobody whose SYN was answered sees a reset, what is under
//! way comes to its end, and what does not is cut at the deadline.

use super::kernel_metrics::{Pins, pinned};
use crate::client::handshake::{Offer, TLS12_AES_128, TLS13_AES_128, TLS13_AES_256};
use crate::client::{Client, Ended, How};
use crate::environment::{Environment, Relay};
use crate::exchange::{self, Plan, Setup};
use crate::pattern::Pattern;
use crate::proxy::Proxy;
use crate::run::{Context, Test};
use crate::upstream::{Kind, PeerEnd, THREAD_STACK_BYTES, Upstream, exchange as serve};
use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |name, run| tests.extend(Test::some_guests(env, name, run));
    add("a_storm_of_clients_sees_no_reset_when_it_drains", storm);
    add("a_transfer_under_way_ends_whole_while_it_drains", transfer_under_way);
    add("a_connection_that_outlives_the_drain_is_cut_at_its_deadline", deadline);
    add("it_serves_until_the_balancer_knows_that_it_goes", delayed);
    add("a_second_signal_ends_the_delay_of_a_drain_too", delay_cut);
    add("sigint_drains_too", sigint);
    if env.counts_in_kernel() {
        // Where it does not, nothing is kept.
        add("user_space_counts_of_a_drain_outlive_a_kill", killed);
    }
    tests
}

/// The end of a tlsplice that a test has told to end.
fn ends(ctx: &Context, mut proxy: Proxy, limit: Duration) -> Result<String> {
    let started = Instant::now();
    let status = proxy.wait_exit()?;
    ensure!(started.elapsed() < limit, "it took {:?} to end", started.elapsed());
    proxy.check_end(status)?;
    ctx.note(&format!("it ended {:.1} s after the last client", started.elapsed().as_secs_f64()));
    Ok(proxy.log())
}

const STORM_THREADS: usize = 16;

/// What the clients of a storm met.
#[derive(Default)]
struct Storm {
    over: AtomicBool,
    served: AtomicU64,
    refused: AtomicU64,
}

impl Storm {
    /// Connects again and again until nobody listens any more.
    fn client(&self, ctx: &Context, address: SocketAddr, offer: &Offer) -> Result<()> {
        while !self.over.load(Relaxed) {
            let socket = match TcpStream::connect(address) {
                Ok(socket) => socket,
                Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
                    self.refused.fetch_add(1, Relaxed);
                    return Ok(());
                }
                Err(e) => return Err(e).context("connect"),
            };
            let client = Client::connect_on(ctx, socket, offer)?;
            let ended = exchange::run(client, &Plan::new(500, 500))?.ended;
            ensure!(ended == Ended { bytes: 500, how: How::CloseNotify, fin: true }, "{ended:?}");
            self.served.fetch_add(1, Relaxed);
        }
        Ok(())
    }
}

fn storm(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0])?;
    let offer = Offer::new(ctx, TLS13_AES_128)?;
    let storm = Storm::default();
    let address = setup.proxy.address(0);
    let before = Duration::from_millis(ctx.environment.scale(1_000, 4_000));
    let failures: Vec<String> = thread::scope(|scope| {
        let run = || storm.client(ctx, address, &offer);
        let start = |_| thread::Builder::new().stack_size(THREAD_STACK_BYTES).spawn_scoped(scope, run);
        let running = (0..STORM_THREADS).map(start).collect::<std::io::Result<Vec<_>>>()?;
        thread::sleep(before);
        let rate = storm.served.load(Relaxed) as f64 / before.as_secs_f64();
        setup.proxy.signal(Signal::TERM)?;
        ctx.note(&format!("{rate:.0} connections a second"));
        thread::sleep(before * 3);
        storm.over.store(true, Relaxed);
        let ends = running.into_iter().map(|t| t.join().expect("a client does not panic"));
        Ok::<_, anyhow::Error>(ends.filter_map(|end| end.err().map(|e| format!("{e:#}"))).collect())
    })?;
    let served = storm.served.into_inner();
    ensure!(failures.is_empty(), "{} clients failed, {served} were served; the first: {}", failures.len(), failures[0]);
    ensure!(storm.refused.into_inner() > 0, "the listener never closed");
    let Setup { proxy, upstream } = setup;
    ends(ctx, proxy, ctx.environment.patience())?;
    drop(upstream);
    Ok(())
}

fn transfer_under_way(ctx: &Context, relay: Relay) -> Result<()> {
    const BYTES: usize = 4 << 20;
    let setup = Setup::manual(ctx, relay, &[0, 16_384])?;
    let mut pairs = Vec::new();
    for listener in 0..2 {
        for suite in [TLS13_AES_256, TLS12_AES_128] {
            pairs.push(setup.open(ctx, listener, suite, 20_000)?);
        }
    }
    setup.proxy.signal(Signal::TERM)?;
    listens_no_more(ctx, &setup)?;
    // Nor is it ready any more; whether it still says so is its own affair.
    let ready = crate::scrape::http_get(setup.proxy.settings.admin, "/ready");
    ensure!(!ready.is_ok_and(|(status, _)| status == 200), "it drains and says that it is ready");
    let down = Pattern::down().bytes(BYTES);
    for (mut client, stream) in pairs {
        let ended = thread::scope(|scope| {
            let sender = scope.spawn(|| stream.send(&down).and_then(|()| stream.fin()));
            let ended = client.rx.drain(Some(Pattern::down()));
            sender.join().expect("the sender does not panic")?;
            ended
        })?;
        ensure!(ended == Ended { bytes: BYTES as u64, how: How::CloseNotify, fin: true }, "{ended:?}");
        client.tx.data(Pattern::up().at(20_000, 10_000))?;
        client.tx.close_notify()?;
        let (up, end) = stream.drain(Pattern::up(), 20_000)?;
        ensure!((up, end) == (30_000, PeerEnd::Fin), "the upstream saw {up} bytes and {end:?}");
    }
    let Setup { proxy, .. } = setup;
    ends(ctx, proxy, ctx.environment.patience()).map(drop)
}

fn deadline(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = Setup::with(ctx, relay, &[0, 16_384], upstream, |s| s.server("drain_timeout = \"2s\""))?;
    let mut pairs = Vec::new();
    for listener in 0..2 {
        pairs.push(setup.open(ctx, listener, TLS13_AES_256, 20_000)?);
    }
    setup.proxy.signal(Signal::TERM)?;
    let Setup { proxy, .. } = setup;
    let log = ends(ctx, proxy, ctx.environment.patience())?;
    ensure!(log.matches("drain_timeout").count() >= 2, "the log does not say that two were cut: {log}");
    for (mut client, stream) in pairs {
        let ended = client.rx.drain(None)?;
        ensure!(ended.how != How::CloseNotify, "a cut passed for a clean end: {ended:?}");
        let (_, end) = stream.drain(Pattern::up(), 20_000)?;
        ensure!(end == PeerEnd::Reset, "the upstream saw {end:?}");
    }
    Ok(())
}

/// Until nobody can connect any more.
fn listens_no_more(ctx: &Context, setup: &Setup) -> Result<()> {
    let deadline = Instant::now() + ctx.environment.patience();
    while TcpStream::connect(setup.proxy.address(0)).is_ok() {
        ensure!(Instant::now() < deadline, "it still listens");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Until it says 503.
fn not_ready(ctx: &Context, setup: &Setup) -> Result<()> {
    let deadline = Instant::now() + ctx.environment.patience();
    loop {
        let (status, body) = crate::scrape::http_get(setup.proxy.settings.admin, "/ready")?;
        if status == 503 {
            ensure!(body.contains("draining"), "/ready says {body:?}");
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "it was told to end and says that it is ready");
        thread::sleep(Duration::from_millis(10));
    }
}

fn delayed(ctx: &Context, relay: Relay) -> Result<()> {
    let delay = Duration::from_secs(ctx.environment.scale(3, 20));
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    let line = format!("drain_delay = \"{}s\"", delay.as_secs());
    let setup = Setup::with(ctx, relay, &[0], upstream, |s| s.server(&line))?;
    let told = Instant::now();
    setup.proxy.signal(Signal::TERM)?;
    not_ready(ctx, &setup)?;
    setup.transfer(ctx, 0, TLS13_AES_128, &Plan::new(1_000, 1_000))?;
    listens_no_more(ctx, &setup)?;
    ensure!(told.elapsed() >= delay, "it listened for {:?} only", told.elapsed());
    let Setup { proxy, .. } = setup;
    ends(ctx, proxy, ctx.environment.patience()).map(drop)
}

fn delay_cut(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    let setup = Setup::with(ctx, relay, &[0], upstream, |s| s.server("drain_delay = \"1h\""))?;
    setup.proxy.signal(Signal::TERM)?;
    not_ready(ctx, &setup)?;
    setup.proxy.signal(Signal::INT)?;
    let Setup { proxy, .. } = setup;
    let log = ends(ctx, proxy, ctx.environment.patience())?;
    ensure!(log.contains("a second signal"), "the log does not say why: {log}");
    Ok(())
}

fn sigint(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    let setup = Setup::with(ctx, relay, &[0], upstream, |s| s)?;
    setup.transfer(ctx, 0, TLS13_AES_128, &Plan::new(1_000, 1_000))?;
    setup.proxy.signal(Signal::INT)?;
    let Setup { proxy, .. } = setup;
    ends(ctx, proxy, ctx.environment.patience()).map(drop)
}

fn killed(ctx: &Context, relay: Relay) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = Setup::with(ctx, relay, &[0], upstream, |mut settings| {
        pins.settings(&mut settings);
        settings
    })?;
    let ending = setup.open(ctx, 0, TLS13_AES_128, 10_000)?;
    let staying = setup.open(ctx, 0, TLS13_AES_128, 10_000)?;
    setup.proxy.signal(Signal::TERM)?;
    setup.proxy.log_with("drains")?;
    drop(ending);
    setup.proxy.wait_for("one to end in the drain", |m| m.ended_any() == 1)?;
    // User space keeps its counts once a second.
    thread::sleep(Duration::from_millis(1_500));
    let Setup { mut proxy, .. } = setup;
    proxy.signal(Signal::KILL)?;
    proxy.wait_exit()?;
    let ended = pinned(ctx, &pins.folder())?.ended_any();
    ensure!(ended == 1, "user space forgot what it counted in the drain: {ended} have ended");
    drop(staying);
    Ok(())
}
