//! SIGHUP: listeners, upstreams and limits change under those who are connected; a bad file changes nothing.

use crate::client::How;
use crate::client::handshake::{TLS13_AES_128, TLS13_AES_256};
use crate::environment::{Environment, Relay};
use crate::exchange::{self, Plan, Setup};
use crate::proxy::{Proxy, Settings, loopback};
use crate::run::{Context, Test};
use crate::upstream::{Kind, Upstream, exchange as serve};
use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |name, run| tests.extend(Test::some_guests(env, name, run));
    add("a_reload_opens_and_closes_listeners_and_cuts_nobody", listeners);
    add("a_reload_with_a_bad_file_keeps_what_runs", bad_file);
    add("a_reload_changes_upstreams_and_limits_for_new_connections", upstreams);
    add("a_reload_that_would_leave_ipv4_unserved_is_refused", v4_of_any);
    tests
}

fn wait(ctx: &Context, what: &str, mut is: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + ctx.environment.patience();
    while !is() {
        ensure!(Instant::now() < deadline, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn listens(address: SocketAddr) -> bool {
    TcpStream::connect(address).is_ok()
}

fn listeners(ctx: &Context, relay: Relay) -> Result<()> {
    let mut setup = Setup::manual(ctx, relay, &[0, 16_384])?;
    let (mut client, stream) = setup.open(ctx, 0, TLS13_AES_256, 40_000)?;
    let old = setup.proxy.address(0);
    let mut settings = setup.proxy.settings.clone();
    settings = settings.listen(1, setup.upstream.address())?;
    let new = settings.listeners[2].address;
    setup.proxy.reload(settings.clone())?;
    wait(ctx, "the new listener is open", || listens(new))?;
    ensure!(listens(old), "a reload closed a listener that the file still names");
    let all = settings.clone();
    settings.listeners.remove(0);
    let fewer = settings;
    setup.proxy.reload(fewer.clone())?;
    wait(ctx, "the old listener is closed", || !listens(old))?;
    // It comes back while it may still be closing, and goes again.
    setup.proxy.reload(all)?;
    wait(ctx, "the old listener is open again", || listens(old))?;
    setup.proxy.reload(fewer)?;
    wait(ctx, "the old listener is closed again", || !listens(old))?;
    setup.check_bystander(&mut client, &stream)?;
    drop((client, stream));
    setup.proxy.settled()?;
    // Those that `listens` made are among the upstream's, if they got so far.
    while setup.upstream.accept_now().is_some() {}
    for listener in 0..2 {
        let (mut client, stream) = setup.open(ctx, listener, TLS13_AES_128, 40_000)?;
        setup.check_bystander(&mut client, &stream)?;
    }
    finish_reloaded(ctx, setup)
}

/// Its descriptors at start are no measure any more.
fn finish_reloaded(ctx: &Context, setup: Setup) -> Result<()> {
    let Setup { mut proxy, .. } = setup;
    let metrics = proxy.settled()?;
    ctx.totals.add(&metrics);
    proxy.signal(Signal::TERM)?;
    let status = proxy.wait_exit()?;
    proxy.check_end(status)
}

fn bad_file(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0])?;
    let good = fs::read_to_string(&setup.proxy.config)?;
    for bad in
        ["this is no TOML", "[server]\nadmin = 7\n", &good.replace("[[listener]]", "[[listener]]\nno_such_key = 1")]
    {
        let lines = setup.proxy.log().lines().count();
        fs::write(&setup.proxy.config, bad)?;
        setup.proxy.signal(Signal::HUP)?;
        wait(ctx, "the log speaks of the bad file", || setup.proxy.log().lines().count() > lines)?;
        setup.transfer(ctx, 0, TLS13_AES_128, &Plan::new(10_000, 10_000))?;
    }
    fs::write(&setup.proxy.config, good)?;
    setup.proxy.signal(Signal::HUP)?;
    setup.transfer(ctx, 0, TLS13_AES_128, &Plan::new(10_000, 10_000))?;
    setup.finish(ctx).map(drop)
}

fn v4_of_any(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    let mut settings = Settings::new(ctx, relay)?.listen(0, upstream.address())?.listen(0, upstream.address())?;
    let port = settings.listeners[0].address.port();
    settings.listeners[0].address = (Ipv4Addr::UNSPECIFIED, port).into();
    settings.listeners[1].address = (Ipv6Addr::UNSPECIFIED, port).into();
    let mut setup = Setup { proxy: Proxy::start(ctx, settings.clone())?, upstream };
    let both = settings.clone();
    settings.listeners.remove(0);
    setup.proxy.reload(settings.clone())?;
    setup.proxy.log_with(&format!("this process has [::]:{port} without IPv4"))?;
    setup.proxy.settings = both;
    for listener in 0..2 {
        setup.transfer(ctx, listener, TLS13_AES_128, &Plan::new(10_000, 10_000))?;
    }
    // By a restart it can be had.
    let Setup { proxy, upstream } = setup;
    proxy.finish(ctx)?;
    setup = Setup { proxy: Proxy::start(ctx, settings)?, upstream };
    ensure!(listens(loopback(port)), "[::] alone does not take IPv4");
    finish_reloaded(ctx, setup)
}

fn upstreams(ctx: &Context, relay: Relay) -> Result<()> {
    let mut setup = Setup::manual(ctx, relay, &[0])?;
    let (mut client, stream) = setup.open(ctx, 0, TLS13_AES_256, 40_000)?;
    let other = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    let mut settings = setup.proxy.settings.clone();
    settings.listeners[0].server = other.address().to_owned();
    let settings = settings.limit("connections = 2");
    setup.proxy.reload(settings)?;
    let moves_to_the_other = |setup: &Setup| -> Result<bool> {
        // The one before may still be ending, and the new cap counts it.
        setup.proxy.wait_for("the one before to end", |m| m.live() == 1)?;
        let fresh = setup.client(ctx, 0, TLS13_AES_128).with_context(|| {
            format!(
                "a connection beside one: {}",
                setup
                    .proxy
                    .metrics()
                    .map(|m| format!(
                        "live {} refused {} {:?}",
                        m.live(),
                        m.sum("tlsplice_connections_refused_total", &[]),
                        m
                    ))
                    .unwrap_or_default()
            )
        })?;
        // The old upstream would answer nothing, and be noticed by its accept.
        thread::sleep(ctx.environment.moment() * 20);
        if setup.upstream.accept_now().is_some() {
            return Ok(false);
        }
        let ended = exchange::run(fresh, &Plan::new(5_000, 5_000))?.ended;
        ensure!((ended.bytes, ended.how) == (5_000, How::CloseNotify), "{ended:?}");
        other.served().map(|_| true)
    };
    let deadline = Instant::now() + ctx.environment.patience();
    while !moves_to_the_other(&setup)? {
        ensure!(Instant::now() < deadline, "new connections still go to the old upstream");
    }
    setup.check_bystander(&mut client, &stream)?;
    setup.proxy.wait_for("the others to end", |m| m.live() == 1)?;
    let second = setup.client(ctx, 0, TLS13_AES_128).context("the second of two connections")?;
    ensure!(setup.client(ctx, 0, TLS13_AES_128).is_err(), "the new cap of two connections does not hold");
    drop((client, stream, second));
    finish_reloaded(ctx, setup)
}
