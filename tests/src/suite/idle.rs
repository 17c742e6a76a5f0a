//! What an idle connection costs: printed, and each of them still works.

use crate::client::handshake::{Offer, TLS13_AES_128};
use crate::client::{Client, How};
use crate::environment::{Environment, Relay};
use crate::exchange::Setup;
use crate::pattern::Pattern;
use crate::process::descriptor_limit;
use crate::run::{Context, Test};
use crate::scrape::{meminfo_kib, memory_kib};
use crate::upstream::{Kind, Stream, Upstream};
use anyhow::{Context as _, Result, ensure};
use std::thread;
use std::time::Duration;

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Test::one_relay(env, "idle_connections_cost_little_and_still_work", idle);
    // An idle connection has no splice, so one kind of it will do.
    tests.truncate(1);
    for test in &mut tests {
        test.limit = Duration::from_secs(env.scale(120, 300));
    }
    tests
}

fn idle(ctx: &Context, relay: Relay) -> Result<()> {
    let count = ctx.environment.scale(5_000, 400);
    let needed = 2 * count + 500;
    ensure!(descriptor_limit() >= needed, "{needed} descriptors are needed, {} allowed", descriptor_limit());
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = Setup::with(ctx, relay, &[0], upstream, |s| s.limit("connections = 6000"))?;
    let pid = setup.proxy.pid();
    // What a first connection brings with it is no cost of the others.
    drop(setup.open(ctx, 0, TLS13_AES_128, 20_000)?);
    setup.proxy.settled()?;
    let pss = || memory_kib(pid);
    let ((pss_before, measure), slab_before) = (pss()?, meminfo_kib("Slab")?);
    let (mut clients, streams) = open_all(ctx, &setup, count)?;
    setup.proxy.wait_for("all of them", |m| m.live() == count)?;
    thread::sleep(Duration::from_secs(1));
    let bytes = |now: u64, before: u64| (now as f64 - before as f64) * 1024.0 / count as f64;
    ctx.note(&format!(
        "{count} idle connections, {}: {measure} {:.0} bytes each (aim {}); slab {:.0} bytes each, of all four sockets and their files",
        relay.name(),
        bytes(pss()?.0, pss_before),
        if relay.offloads() { "2048" } else { "6144" },
        bytes(meminfo_kib("Slab")?, slab_before),
    ));
    for client in clients.iter_mut().step_by(97) {
        client.tx.data(b"0123456789")?;
    }
    for stream in &streams {
        stream.fin()?;
    }
    for client in &mut clients {
        let ended = client.rx.drain(Some(Pattern::down()))?;
        ensure!(ended.how == How::CloseNotify, "{ended:?}");
        client.tx.close_notify()?;
    }
    drop((clients, streams));
    setup.finish(ctx).map(drop)
}

fn open_all(ctx: &Context, setup: &Setup, count: u64) -> Result<(Vec<Client>, Vec<Stream>)> {
    const THREADS: u64 = 4;
    let offer = Offer::new(ctx, TLS13_AES_128)?;
    let address = setup.proxy.address(0);
    let clients = thread::scope(|scope| {
        let some = || -> Result<Vec<Client>> {
            let one = |_| -> Result<Client> {
                let mut client = Client::connect(ctx, address, &offer)?;
                client.rx.read_bytes = 1_024;
                Ok(client)
            };
            (0..count / THREADS).map(one).collect()
        };
        let running: Vec<_> = (0..THREADS).map(|_| scope.spawn(some)).collect();
        let mut all = Vec::new();
        for thread in running {
            all.extend(thread.join().expect("a client does not panic")?);
        }
        Ok::<_, anyhow::Error>(all)
    })?;
    let streams = (0..count).map(|_| setup.upstream.accept()).collect::<Result<Vec<_>>>().context("upstream")?;
    Ok((clients, streams))
}
