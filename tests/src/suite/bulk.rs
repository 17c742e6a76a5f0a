//! Bodies of every size, each way and both at once; big ones; many at once; every kind of address.

use crate::client::handshake::{Offer, SUITES, Suite, TLS12_AES_256, TLS13_AES_128, TLS13_AES_256};
use crate::client::{Client, Ended, How};
use crate::environment::{Environment, Relay};
use crate::exchange::{self, Close, DOORS, Plan, Setup};
use crate::pattern::Random;
use crate::proxy::PATIENT_HANDSHAKE;
use crate::run::{Context, Test};
use crate::upstream::{Kind, PeerEnd, REQUEST_BYTES, THREAD_STACK_BYTES, Upstream, exchange as serve};
use anyhow::{Context as _, Result, ensure};
use std::thread;
use std::time::Duration;

/// Around a record's size, and beyond every buffer.
const SIZES_BYTES: [u64; 5] = [0, 1, 16_384, 16_385, 1 << 20];

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    tests.extend(Test::each_relay(env, "bodies_of_each_size_arrive_up_and_down_and_both_at_once", bodies_of_each_size));
    tests.extend(Test::each_relay(env, "each_suite_carries_both_directions", each_suite));
    for (name, run) in [
        ("a_big_download_arrives_whole", big_download as fn(&Context, Relay) -> Result<()>),
        ("a_big_upload_arrives_whole", big_upload),
        ("a_big_transfer_both_ways_at_once_arrives_whole", big_both),
    ] {
        tests.extend(Test::each_relay(env, name, run).into_iter().map(|mut test| {
            test.limit = Duration::from_secs(240);
            test
        }));
    }
    tests.extend(Test::each_relay(env, "hundreds_of_connections_of_mixed_sizes_at_once", many_at_once));
    tests.extend(Test::one_relay(env, "upstreams_over_ipv6_and_unix_sockets_are_served", kinds_of_upstream));
    tests.extend(Test::one_relay(env, "a_listener_on_ipv6_is_served", listener_on_ipv6));
    tests
}

/// Up alone, down alone, both at once.
fn directions(bytes: u64) -> [(u64, u64); 3] {
    [(bytes, 0), (0, bytes), (bytes, bytes)]
}

fn bodies_of_each_size(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0, 16_384])?;
    for (n, suite) in [TLS13_AES_256, TLS12_AES_256].into_iter().enumerate() {
        for listener in ctx.environment.listeners(n, 2) {
            for (up, down) in SIZES_BYTES.into_iter().flat_map(directions) {
                let close = if up % 2 == 0 { Close::First } else { Close::Answer };
                setup.transfer(ctx, listener, suite, &answerable(Plan::new(up, down), close))?;
            }
        }
    }
    setup.finish(ctx).map(drop)
}

/// A client that waits for the server's close_notify needs an upstream that ends first, and only when it has all.
fn answerable(plan: Plan, close: Close) -> Plan {
    plan.close(close).with(|request| request.in_turn = close == Close::Answer)
}

fn each_suite(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &DOORS)?;
    for (index, suite) in SUITES.into_iter().enumerate() {
        for listener in [0, 2] {
            setup.transfer(ctx, listener, suite, &Plan::new(300_000, 300_001).ragged(index as u64))?;
        }
    }
    setup.finish(ctx).map(drop)
}

/// 2 GiB natively, which wraps a counter of 31 bits; but 512 MiB through the ring, whose hand-overs take a second for 100 MiB
/// on the one CPU of user-mode Linux.
fn big_bytes(env: &Environment, relay: Relay) -> u64 {
    env.scale(if relay == Relay::Ring { 1 << 29 } else { 1 << 31 }, 32 << 20)
}

fn big(ctx: &Context, relay: Relay, suite: Suite, up: bool, down: bool) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0])?;
    let bytes = |on: bool| if on { big_bytes(&ctx.environment, relay) } else { 0 };
    setup.transfer(ctx, 0, suite, &Plan::new(bytes(up), bytes(down)))?;
    setup.finish(ctx).map(drop)
}

fn big_download(ctx: &Context, relay: Relay) -> Result<()> {
    big(ctx, relay, TLS13_AES_256, false, true)
}

fn big_upload(ctx: &Context, relay: Relay) -> Result<()> {
    big(ctx, relay, TLS13_AES_256, true, false)
}

fn big_both(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[1 << 20])?;
    let bytes = big_bytes(&ctx.environment, relay) / 8;
    setup.transfer(ctx, 0, TLS12_AES_256, &Plan::new(bytes, bytes).ragged(7))?;
    setup.finish(ctx).map(drop)
}

fn many_at_once(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    let setup = Setup::with(ctx, relay, &DOORS, upstream, |s| s.limit(PATIENT_HANDSHAKE))?;
    let count = ctx.environment.scale(500, 200);
    let mut random = Random::new(500);
    let limit = ctx.environment.scale(18, 15);
    let mut size = || (1_u64 << random.range(0, limit)) + random.range(0, 1_000);
    let plans: Vec<Plan> = (0..count).map(|n| Plan::new(size(), size()).ragged(n as u64)).collect();
    let suites = [TLS13_AES_128, TLS13_AES_256, TLS12_AES_256];
    let offers = suites.map(|suite| Offer::new(ctx, suite));
    let offers = offers.into_iter().collect::<Result<Vec<_>>>()?;
    let one = |n: usize, plan: &Plan| -> Result<()> {
        let client = Client::connect(ctx, setup.proxy.address(n % DOORS.len()), &offers[n % offers.len()])?;
        let ended = exchange::run(client, plan)?.ended;
        ensure!(ended == Ended { bytes: plan.request.down, how: How::CloseNotify, fin: true }, "{ended:?}");
        Ok(())
    };
    thread::scope(|scope| {
        let one = &one;
        let start = |(n, plan)| {
            let run = move || one(n, plan).with_context(|| format!("connection {n}, {plan:?}"));
            thread::Builder::new().stack_size(THREAD_STACK_BYTES).spawn_scoped(scope, run)
        };
        let running: Vec<_> = plans.iter().enumerate().map(start).collect::<std::io::Result<_>>()?;
        running.into_iter().try_for_each(|t| t.join().expect("a client does not panic"))
    })?;
    let (mut up, mut down) = (0, 0);
    for _ in &plans {
        let served = setup.upstream.served()?;
        ensure!(served.end == PeerEnd::Fin, "{served:?}");
        (up, down) = (up + served.up, down + served.down);
    }
    let requests = (count * REQUEST_BYTES) as u64;
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.moved("in") == up + requests, "in: moved {}, counted {}", up + requests, metrics.moved("in"));
    ensure!(metrics.moved("out") == down, "out: moved {down}, counted {}", metrics.moved("out"));
    ensure!(metrics.ended("clean") == count as u64, "endings: {}", metrics.endings());
    Ok(())
}

fn kinds_of_upstream(ctx: &Context, relay: Relay) -> Result<()> {
    for kind in [Kind::V6, Kind::Unix] {
        let upstream = Upstream::serve(&ctx.environment, kind, serve)?;
        let setup = Setup::with(ctx, relay, &[0, 16_384], upstream, |s| s)?;
        for listener in 0..2 {
            setup.transfer(ctx, listener, TLS13_AES_128, &Plan::new(1 << 20, 1 << 20).ragged(3))?;
            let held = Plan::new(100_000, 1 << 20).with(|request| request.hold = true);
            setup.transfer(ctx, listener, TLS12_AES_256, &held)?;
            let answer = answerable(Plan::new(100_000, 100_000), Close::Answer);
            setup.transfer(ctx, listener, TLS13_AES_128, &answer)?;
        }
        setup.finish(ctx).with_context(|| format!("{kind:?}"))?;
    }
    Ok(())
}

fn listener_on_ipv6(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    let setup = Setup::with(ctx, relay, &[0], upstream, |mut settings| {
        settings.listeners[0].address.set_ip(std::net::Ipv6Addr::LOCALHOST.into());
        settings
    })?;
    setup.transfer(ctx, 0, TLS13_AES_128, &Plan::new(1 << 20, 1 << 20).ragged(4))?;
    setup.finish(ctx).map(drop)
}
