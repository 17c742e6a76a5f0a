//! What the kernel counts of connections is exact, is kept, and means what it says.

use crate::counted::{Kind, Server, Truth, client_config, connect, storm};
use crate::environment::{Environment, Kernel, Relay};
use crate::process::free_port;
use crate::proxy::{PATIENT_HANDSHAKE, Proxy, Settings, loopback};
use crate::run::{Context, Test};
use crate::scrape::Metrics;
use anyhow::{Context as _, Result, bail, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub fn tests(env: &Environment) -> Vec<Test> {
    if !env.counts_in_kernel() {
        return Vec::new();
    }
    let mut tests = Test::each_relay(env, "kernel_counts_equal_what_was_sent_to_the_byte", exact);
    let limit = env.scale(Duration::from_secs(240), Duration::from_secs(900));
    tests.push(Test::new(env, "kernel_counts_outlive_a_killed_tlsplice", killed));
    tests.push(Test::new(env, "a_new_program_takes_over_in_a_storm_without_a_loss", replaced));
    tests.push(Test::new(env, "server_names_of_a_hostile_client_take_no_memory", names));
    if env.offload {
        tests.push(Test::new(env, "a_long_splice_is_counted_to_the_byte", long_splice));
    }
    tests.iter_mut().for_each(|test| test.limit = limit);
    tests
}

pub fn default_relay(ctx: &Context) -> Relay {
    ctx.environment.relays()[0]
}

/// A bpf file system of one test's own.
pub struct Pins(PathBuf);

impl Pins {
    pub fn mount(ctx: &Context) -> Result<Self> {
        let folder = ctx.environment.tmp.join(format!("bpf-{}", ctx.test()));
        fs::create_dir_all(&folder)?;
        mount("bpf", &folder, "bpf", MountFlags::empty(), None)
            .with_context(|| format!("mount a bpf file system at {}", folder.display()))?;
        Ok(Self(folder))
    }

    pub fn folder(&self) -> PathBuf {
        self.0.join("tlsplice")
    }

    /// The lines of `[metrics]`.
    /// One listener in front of `server`, counted here.
    pub fn counting(&self, ctx: &Context, server: &Server) -> Result<Settings> {
        let mut settings = Settings::new(ctx, default_relay(ctx))?.listen(50_000, &server.address.to_string())?;
        self.settings(&mut settings);
        Ok(settings)
    }

    pub fn settings(&self, settings: &mut Settings) {
        settings.metrics =
            vec!["kernel = \"require\"".into(), format!("pins = {:?}", self.folder().display().to_string())];
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // Pinned objects go with it.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

/// `tlsplice metrics`, which needs no process.
pub fn pinned(ctx: &Context, pins: &Path) -> Result<Metrics> {
    let output = Command::new(&ctx.environment.bin).arg("metrics").arg("--pins").arg(pins).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "tlsplice metrics: {}: {said}", output.status);
    Ok(Metrics::parse(&String::from_utf8(output.stdout)?))
}

/// Polls until every connection that was opened is closed in the maps.
pub fn all_closed(ctx: &Context, read: impl Fn() -> Result<Metrics>) -> Result<Metrics> {
    let deadline = Instant::now() + ctx.environment.patience();
    loop {
        let metrics = read()?;
        let counted = |side: &str| -> [u64; 2] {
            ["opened", "closed"]
                .map(|what| metrics.sum(&format!("tlsplice_connections_{what}_total"), &[("side", side)]))
        };
        let (client, upstream) = (counted("client"), counted("upstream"));
        if client[0] == client[1] && upstream[0] == upstream[1] {
            return Ok(metrics);
        }
        if Instant::now() > deadline {
            bail!("opened and closed are {client:?} for clients, {upstream:?} for upstreams");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Opened, in, out.
pub fn figures(metrics: &Metrics, side: &str) -> [u64; 3] {
    let bytes = |direction| metrics.sum("tlsplice_bytes_total", &[("side", side), ("direction", direction)]);
    [metrics.sum("tlsplice_connections_opened_total", &[("side", side)]), bytes("in"), bytes("out")]
}

/// Mixed sizes: many small ones, some that go through the door.
pub fn sizes(random: &mut crate::pattern::Random) -> (u64, u64) {
    let size = |random: &mut crate::pattern::Random| match random.range(0, 9) {
        0 => 0,
        1..=5 => random.range(1, 4_000),
        6..=8 => random.range(4_000, 60_000),
        _ => random.range(60_000, 300_000),
    };
    (size(random), size(random))
}

fn exact(ctx: &Context, relay: Relay) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let nobody = loopback(free_port()?);
    let mut settings = Settings::new(ctx, relay)?.listen(50_000, &server.address.to_string())?;
    settings = settings.listen(0, &nobody.to_string())?;
    pins.settings(&mut settings);
    let proxy = Proxy::start(ctx, settings)?;
    let config = client_config(ctx)?;
    let count = ctx.environment.scale(2_000, 200);
    let (resets, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    let started = Instant::now();
    storm(8, count, |n, random| {
        let kind = match n % 20 {
            3 => Kind::ClientResets,
            7 => Kind::ServerResets,
            11 => {
                refused.fetch_add(1, Relaxed);
                // It gets its handshake, then the end: nobody listens behind.
                let _ = connect(&config, proxy.address(1), &truth, Kind::Clean, (0, 1));
                return Ok(());
            }
            _ => Kind::Clean,
        };
        let (up, mut down) = sizes(random);
        if kind != Kind::Clean {
            resets.fetch_add(1, Relaxed);
            // Something to wait for: the server has all of the upload then.
            down = down.max(1);
        }
        connect(&config, proxy.address(0), &truth, kind, (up, down))
    })?;
    let took = started.elapsed();
    server.check()?;
    let metrics = all_closed(ctx, || proxy.metrics())?;
    for (side, truth) in [("client", &truth.client), ("upstream", &truth.upstream)] {
        let (counted, sent) = (figures(&metrics, side), truth.figures());
        ensure!(counted == sent, "{side}: the kernel counts {counted:?} (opened, in, out), the wire had {sent:?}");
    }
    let sum = |name: &str, labels: &[(&str, &str)]| metrics.sum(name, labels);
    let (resets, refused) = (resets.load(Relaxed), refused.load(Relaxed));
    let failed = sum("tlsplice_connects_failed_total", &[("side", "upstream")]);
    ensure!(failed == refused, "{refused} connects were refused, {failed} are counted");
    // Of a client's reset the upstream gets one too, and of an upstream's the client.
    for side in ["client", "upstream"] {
        let counted = sum("tlsplice_connections_reset_total", &[("side", side)]);
        ensure!(counted >= resets, "{side}: {resets} connections were reset, {counted} are counted");
    }
    let duration = sum("tlsplice_connection_duration_seconds_count", &[("side", "client")]);
    ensure!(duration == count, "{count} durations are wanted, {duration} are counted");
    let classed = ["in", "out"].map(|direction| sum("tlsplice_tls_bytes_total", &[("direction", direction)]));
    ensure!(classed == figures(&metrics, "client")[1..], "by class: {classed:?}");
    let [opened, bytes_in, bytes_out] = figures(&metrics, "client");
    let named = sum("tlsplice_tls_connections_opened_total", &[("server_name", crate::certificate::NAME)]);
    ensure!(named == opened, "{opened} clients asked for a name, {named} are counted under it");
    let printed = pinned(ctx, &pins.folder())?;
    ensure!(figures(&printed, "client") == [opened, bytes_in, bytes_out], "tlsplice metrics says otherwise");
    let offloaded = sum("tlsplice_tls_connections_closed_total", &[("offload", "kernel")]);
    ensure!(
        offloaded == metrics.offloaded(),
        "{} went through the door, {offloaded} are counted behind it",
        metrics.offloaded()
    );
    ctx.note(&format!(
        "{opened} clients: {bytes_in} bytes in, {bytes_out} out, {} of them reset, {refused} without upstream; upstreams {:?}; {:.1} s",
        resets,
        figures(&metrics, "upstream"),
        took.as_secs_f64()
    ));
    proxy.finish(ctx).map(drop)
}

fn killed(ctx: &Context) -> Result<()> {
    // Connections that come and go before and after; and those that are open, with data under way, when it is killed.
    let (whole, cut) = ctx.environment.scale((200, 100), (40, 30));
    let pins = Pins::mount(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let settings = Settings::new(ctx, default_relay(ctx))?.limit(PATIENT_HANDSHAKE);
    let mut settings = settings.listen(50_000, &server.address.to_string())?;
    pins.settings(&mut settings);
    let mut proxy = Proxy::start(ctx, settings.clone())?;
    let config = client_config(ctx)?;
    storm(4, whole, |_, random| connect(&config, proxy.address(0), &truth, Kind::Clean, sizes(random)))?;
    // User space keeps its counts once a second.
    let before = all_closed(ctx, || proxy.metrics())?;
    std::thread::sleep(Duration::from_millis(1_500));
    let open = std::thread::scope(|scope| -> Result<Metrics> {
        for _ in 0..cut {
            // Each uploads without end, until it is cut.
            scope.spawn(|| connect(&config, settings.listeners[0].address, &truth, Kind::Clean, (1 << 40, 0)));
        }
        let open = proxy.wait_for("all to be open and busy", |m| {
            let live = |side| m.sum("tlsplice_connections_live", &[("side", side)]);
            live("client") == cut && live("upstream") == cut && figures(m, "upstream")[2] > cut * 200_000
        });
        proxy.signal(rustix::process::Signal::KILL)?;
        proxy.wait_exit()?;
        open
    })?;
    let mut dead = all_closed(ctx, || pinned(ctx, &pins.folder()))?;
    for side in ["client", "upstream"] {
        let (then, now) = (figures(&open, side), figures(&dead, side));
        ensure!(now[0] == whole + cut, "{side}: {} were opened, {} are counted", whole + cut, now[0]);
        ensure!(now[1] >= then[1] && now[2] >= then[2], "{side}: {then:?} before the kill, {now:?} after it");
        ensure!(dead.sum("tlsplice_connections_live", &[("side", side)]) == 0, "{side}: some are still live");
    }
    let accepted = |m: &Metrics| m.sum("tlsplice_connections_accepted_total", &[]);
    ensure!(
        accepted(&dead) >= accepted(&before),
        "user space forgot: {} then, {} now",
        accepted(&before),
        accepted(&dead)
    );
    // Servers that were cut have said so, which is no trouble; a new one counts from here.
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    settings.listeners[0].server = server.address.to_string();
    let proxy = Proxy::start(ctx, settings)?;
    storm(4, whole, |_, random| connect(&config, proxy.address(0), &truth, Kind::Clean, sizes(random)))?;
    server.check()?;
    let after = all_closed(ctx, || proxy.metrics())?;
    for (side, truth) in [("client", &truth.client), ("upstream", &truth.upstream)] {
        let rise: Vec<u64> = figures(&after, side).iter().zip(figures(&dead, side)).map(|(a, d)| a - d).collect();
        ensure!(rise == truth.figures(), "{side}: counted {rise:?} since the restart, sent {:?}", truth.figures());
    }
    ensure!(accepted(&after) == accepted(&dead) + whole, "{} accepted, then {}", accepted(&dead), accepted(&after));
    ctx.note(&format!(
        "client sums (opened, in, out): {:?} when killed, {:?} dead, {:?} at the end",
        figures(&open, "client"),
        figures(&dead, "client"),
        figures(&after, "client")
    ));
    dead = proxy_gone(ctx, proxy, &pins)?;
    ensure!(
        figures(&dead, "client") == figures(&after, "client"),
        "the last truth is another than the one before the end"
    );
    Ok(())
}

/// What the pins say after it has ended in order.
pub fn proxy_gone(ctx: &Context, mut proxy: Proxy, pins: &Pins) -> Result<Metrics> {
    proxy.signal(rustix::process::Signal::TERM)?;
    let status = proxy.wait_exit()?;
    proxy.check_end(status)?;
    pinned(ctx, &pins.folder())
}

fn replaced(ctx: &Context) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let mut proxy = Proxy::start(ctx, pins.counting(ctx, &server)?)?;
    // Each that starts tries what this kernel's TLS can do.
    proxy.beside_others();
    let config = client_config(ctx)?;
    let count = ctx.environment.scale(20_000, 100);
    let done = std::sync::atomic::AtomicBool::new(false);
    let programs = std::thread::scope(|scope| -> Result<u64> {
        let storm = scope.spawn(|| {
            let ended = storm(8, count, |_, random| {
                let (up, down) = (random.range(1, 4_000), random.range(1, 4_000));
                connect(&config, proxy.address(0), &truth, Kind::Clean, (up, down))
            });
            done.store(true, Relaxed);
            ended
        });
        // Each start puts its own program into the link that is pinned.
        let mut programs = 0;
        while !done.load(Relaxed) && programs < 20 {
            let mut next = Proxy::start(ctx, pins.counting(ctx, &server)?)?;
            next.signal(rustix::process::Signal::TERM)?;
            next.wait_exit()?;
            programs += 1;
        }
        storm.join().ok().context("the storm panicked")??;
        Ok(programs)
    })?;
    server.check()?;
    let metrics = all_closed(ctx, || proxy.metrics())?;
    for (side, truth) in [("client", &truth.client), ("upstream", &truth.upstream)] {
        let (counted, sent) = (figures(&metrics, side), truth.figures());
        ensure!(counted == sent, "{side}: the kernel counts {counted:?} (opened, in, out), the wire had {sent:?}");
    }
    ensure!(programs > 0, "the storm was over before another program was loaded");
    ctx.note(&format!("{count} connections under {} programs, each closed, each byte counted", programs + 1));
    proxy.finish(ctx).map(drop)
}

fn names(ctx: &Context) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let proxy = Proxy::start(ctx, pins.counting(ctx, &server)?)?;
    let mut config = client_config(ctx)?;
    // The certificate is for another name, and this client does not care.
    let verifier = crate::counted::Anyone::new();
    Arc::make_mut(&mut config).dangerous().set_certificate_verifier(verifier);
    let some = |from: u64, count: u64| {
        storm(8, count, |n, _| {
            let name = format!("n{}.hostile.test", from + n);
            crate::counted::connect_as(&config, &name, proxy.address(0), &truth, Kind::Clean, (0, 1))
        })
    };
    let first = ctx.environment.scale(1_000, 200);
    some(0, first)?;
    let rows = |m: &Metrics| m.count("tlsplice_tls_connections_opened_total");
    let (before, memory) = (rows(&all_closed(ctx, || proxy.metrics())?), crate::scrape::memory_kib(proxy.pid())?);
    let count = ctx.environment.scale(99_000, 100);
    some(first, count)?;
    let metrics = all_closed(ctx, || proxy.metrics())?;
    let now = crate::scrape::memory_kib(proxy.pid())?;
    ensure!(rows(&metrics) == before, "{before} rows before, {} now", rows(&metrics));
    let other = metrics.sum("tlsplice_tls_connections_opened_total", &[("server_name", "other")]);
    ensure!(other == count + first, "{} unknown names, {other} under \"other\"", count + first);
    // A quarter of what the names alone would take.
    let allowed = memory.0 + count * 32 / 4 / 1024 + 512;
    ensure!(now.0 <= allowed, "{} went from {} to {} KiB", now.1, memory.0, now.0);
    ctx.note(&format!(
        "{} names, all under \"other\": {before} rows as before, {} {} KiB then, {} KiB now",
        count + first,
        now.1,
        memory.0,
        now.0
    ));
    proxy.finish(ctx).map(drop)
}

fn long_splice(ctx: &Context) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let mut settings = Settings::new(ctx, default_relay(ctx))?.listen(128 << 10, &server.address.to_string())?;
    pins.settings(&mut settings);
    let proxy = Proxy::start(ctx, settings)?;
    // Once is enough: the rest is the same in every series.
    let bytes =
        if matches!(ctx.environment.kernel, Kernel::Guest("6.1" | "6.12" | "6.18")) { 1 << 25 } else { 1 << 28 };
    connect(&client_config(ctx)?, proxy.address(0), &truth, Kind::Clean, (0, bytes))?;
    let metrics = all_closed(ctx, || proxy.metrics())?;
    for (side, truth) in [("client", &truth.client), ("upstream", &truth.upstream)] {
        let (counted, sent) = (figures(&metrics, side), truth.figures());
        ensure!(counted == sent, "{side}: the kernel counts {counted:?} (opened, in, out), the wire had {sent:?}");
    }
    let (copied, spliced) = (metrics.payload("out", "copied"), metrics.payload("out", "spliced"));
    ensure!(copied + spliced == bytes && copied < 1 << 20, "{copied} bytes were copied, {spliced} spliced");
    ctx.note(&format!(
        "{:?} (opened, in, out) of the client; {copied} copied, {spliced} spliced",
        figures(&metrics, "client")
    ));
    proxy.finish(ctx).map(drop)
}
