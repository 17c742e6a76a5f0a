//! A JDK, which renews its keys by volume: HAProxy and nginx's stream module reset it when they offload.

use super::programs::program;
use crate::client::handshake::{Suite, TLS13_AES_128, TLS13_AES_256};
use crate::environment::{Environment, Relay};
use crate::exchange::Setup;
use crate::pattern::Pattern;
use crate::run::{Context, Test};
use crate::upstream::Request;
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::process::Stdio;
use std::time::Duration;

pub fn tests(env: &Environment) -> Vec<Test> {
    if env.is_guest() {
        // No image of a guest holds a JDK: a client of ours does there what it does.
        return Vec::new();
    }
    let mut tests = Test::each_relay(env, "a_java_client_that_rekeys_by_volume_sees_no_reset", key_limits);
    for test in &mut tests {
        test.limit = Duration::from_secs(180);
    }
    tests
}

const SOURCE: &str = include_str!("KeyLimits.java");

fn key_limits(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0, 16_385])?;
    for (limit, bytes) in [(16, 3_000_000), (20, 6_000_000)] {
        for (listener, suite) in [TLS13_AES_256, TLS13_AES_128].into_iter().enumerate() {
            // One way at a time: a JDK whose two threads both renew keys ends the connection by itself, in a race of
            // its own (sun.security.ssl.SSLSocketImpl.tryKeyUpdate), behind any server.
            for (up, down) in [(bytes, 1_000), (1_000, bytes)] {
                run(ctx, &setup, listener, suite, limit, (up, down))
                    .with_context(|| format!("limit 2^{limit}, {}, {up} up, {down} down", suite.name))?;
            }
        }
    }
    let metrics = setup.finish(ctx)?;
    let received = metrics.sum("tlsplice_key_updates_total", &[("direction", "received")]);
    ctx.note(&format!("{received} KeyUpdates received past the door"));
    ensure!(!relay.offloads() || received > 50, "only {received} KeyUpdates were received");
    Ok(())
}

fn run(ctx: &Context, setup: &Setup, listener: usize, suite: Suite, limit: u32, (up, down): (u64, u64)) -> Result<()> {
    let folder = &ctx.environment.tmp;
    let path = |name: &str| folder.join(name);
    fs::write(path("KeyLimits.java"), SOURCE)?;
    fs::write(path("security"), format!("jdk.tls.keyLimits=AES/GCM/NoPadding KeyUpdate 2^{limit}\n"))?;
    let request = Request { in_turn: true, hold: true, ..Request::new(up, down) };
    let mut upload = request.encode().to_vec();
    upload.extend(Pattern::up().bytes(usize::try_from(up)?));
    fs::write(path("java-up"), upload)?;
    let mut command = program("java")?;
    command.arg(format!("-Djava.security.properties={}", path("security").display())).arg(path("KeyLimits.java"));
    command.arg(setup.proxy.address(listener).port().to_string()).arg(path("java-up")).arg(path("java-down"));
    let output = command.arg(suite.openssl).arg(down.to_string()).stdin(Stdio::null()).output().context("run java")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && complaint.is_empty(), "java: {}: {complaint}", output.status);
    let got = fs::read(path("java-down"))?;
    ensure!(got.len() as u64 == down, "java got {} of {down} bytes", got.len());
    Pattern::down().check(0, &got)?;
    let served = setup.upstream.served()?;
    ensure!((served.up, served.down) == (up, down), "the upstream saw {served:?}");
    Ok(())
}
