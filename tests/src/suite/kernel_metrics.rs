//! What the kernel counts of connections is exact, is kept, and means what it says.

use crate::counted::{Kind, Server, Truth, client_config, connect, storm};
use crate::environment::{Environment, Kernel, Relay};
use crate::process::free_port;
use crate::proxy::{PATIENT_HANDSHAKE, Proxy, Settings, loopback};
use crate::run::{Context, Test};
use crate::scrape::{Metrics, Threads};
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
        return vec![
            Test::new(env, "without_bpffs_or_capabilities_it_serves_and_says_so", without),
            Test::new(env, "a_kernel_without_storages_of_sockets_is_no_obstacle", no_storages),
        ];
    }
    let mut tests = Test::each_relay(env, "kernel_counts_equal_what_was_sent_to_the_byte", exact);
    let limit = env.scale(Duration::from_secs(240), Duration::from_secs(900));
    tests.push(Test::new(env, "kernel_counts_outlive_a_killed_tlsplice", killed));
    tests.push(Test::new(env, "a_new_program_takes_over_in_a_storm_without_a_loss", replaced));
    tests.push(Test::new(env, "a_second_tlsplice_takes_no_counting_from_one_in_another_cgroup", counted_elsewhere));
    tests.push(Test::new(env, "server_names_of_a_hostile_client_take_no_memory", names));
    tests.push(Test::new(env, "without_bpffs_or_capabilities_it_serves_and_says_so", without));
    if !env.is_guest() {
        // Times under emulation mean nothing.
        tests.push(Test::new(env, "what_counting_in_the_kernel_costs_is_told", cost));
    }
    if env.offload {
        tests.push(Test::new(env, "a_long_splice_is_counted_to_the_byte", long_splice));
    }
    tests.iter_mut().for_each(|test| test.limit = limit);
    tests
}

fn default_relay(ctx: &Context) -> Relay {
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
fn sizes(random: &mut crate::pattern::Random) -> (u64, u64) {
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
    // Emulation takes its time, and who splices makes no difference to what counts.
    let count = ctx.environment.scale(2_000, if relay == Relay::Ring { 300 } else { 2_000 });
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

/// Connections that are open, with data under way, when the process is killed.
const KILLED: u64 = 100;

fn killed(ctx: &Context) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let settings = Settings::new(ctx, default_relay(ctx))?.limit(PATIENT_HANDSHAKE);
    let mut settings = settings.listen(50_000, &server.address.to_string())?;
    pins.settings(&mut settings);
    let mut proxy = Proxy::start(ctx, settings.clone())?;
    let config = client_config(ctx)?;
    storm(4, 200, |_, random| connect(&config, proxy.address(0), &truth, Kind::Clean, sizes(random)))?;
    // User space keeps its counts once a second.
    let before = all_closed(ctx, || proxy.metrics())?;
    std::thread::sleep(Duration::from_millis(1_500));
    let open = std::thread::scope(|scope| -> Result<Metrics> {
        for _ in 0..KILLED {
            // Each uploads without end, until it is cut.
            scope.spawn(|| connect(&config, settings.listeners[0].address, &truth, Kind::Clean, (1 << 40, 0)));
        }
        let open = proxy.wait_for("all to be open and busy", |m| {
            let live = |side| m.sum("tlsplice_connections_live", &[("side", side)]);
            live("client") == KILLED && live("upstream") == KILLED && figures(m, "upstream")[2] > 20_000_000
        });
        proxy.signal(rustix::process::Signal::KILL)?;
        proxy.wait_exit()?;
        open
    })?;
    let mut dead = all_closed(ctx, || pinned(ctx, &pins.folder()))?;
    for side in ["client", "upstream"] {
        let (then, now) = (figures(&open, side), figures(&dead, side));
        ensure!(now[0] == 200 + KILLED, "{side}: {} were opened, {} are counted", 200 + KILLED, now[0]);
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
    storm(4, 200, |_, random| connect(&config, proxy.address(0), &truth, Kind::Clean, sizes(random)))?;
    server.check()?;
    let after = all_closed(ctx, || proxy.metrics())?;
    for (side, truth) in [("client", &truth.client), ("upstream", &truth.upstream)] {
        let rise: Vec<u64> = figures(&after, side).iter().zip(figures(&dead, side)).map(|(a, d)| a - d).collect();
        ensure!(rise == truth.figures(), "{side}: counted {rise:?} since the restart, sent {:?}", truth.figures());
    }
    ensure!(accepted(&after) == accepted(&dead) + 200, "{} accepted, then {}", accepted(&dead), accepted(&after));
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

/// A cgroup as systemd would give a service of its own.
struct Service(PathBuf);

impl Service {
    fn make(ctx: &Context) -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let is_v2 = |line: &&str| line.split(' ').nth(2) == Some("cgroup2");
        let mount = mounts.lines().find(is_v2).and_then(|line| line.split(' ').nth(1)).context("no cgroup2")?;
        let folder = Path::new(mount).join(format!("{}.service", ctx.test()));
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn counted_elsewhere(ctx: &Context) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    let service = Service::make(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let settings = || -> Result<Settings> {
        let mut settings = Settings::new(ctx, default_relay(ctx))?.listen(50_000, &server.address.to_string())?;
        pins.settings(&mut settings);
        Ok(settings)
    };
    let join = "echo $$ >\"$1/cgroup.procs\" && shift 2 && exec \"$@\"";
    let folder = service.0.display().to_string();
    let first = Proxy::start_as(ctx, settings()?, &["sh", "-c", join, "sh", &folder])?;
    let second = settings()?;
    let Err(refused) = Proxy::start(ctx, second.clone()) else { bail!("a second one took the counting away") };
    ensure!(format!("{refused:#}").contains("a metrics.pins of its own"), "{refused:#}");
    let config = client_config(ctx)?;
    storm(1, 20, |_, random| connect(&config, first.address(0), &truth, Kind::Clean, sizes(random)))?;
    let counted = figures(&all_closed(ctx, || first.metrics())?, "client");
    ensure!(counted == truth.client.figures(), "{counted:?} counted, {:?} sent", truth.client.figures());
    proxy_gone(ctx, first, &pins)?;
    // The cgroup is still there, and nobody is in it any more.
    let second = Proxy::start(ctx, second)?;
    proxy_gone(ctx, second, &pins).map(drop)
}

/// What the pins say after it has ended in order.
fn proxy_gone(ctx: &Context, mut proxy: Proxy, pins: &Pins) -> Result<Metrics> {
    proxy.signal(rustix::process::Signal::TERM)?;
    let status = proxy.wait_exit()?;
    proxy.check_end(status)?;
    pinned(ctx, &pins.folder())
}

fn replaced(ctx: &Context) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let setting = || -> Result<Settings> {
        let mut settings = Settings::new(ctx, default_relay(ctx))?.listen(50_000, &server.address.to_string())?;
        pins.settings(&mut settings);
        Ok(settings)
    };
    let mut proxy = Proxy::start(ctx, setting()?)?;
    // Each that starts tries what this kernel's TLS can do.
    proxy.beside_others();
    let config = client_config(ctx)?;
    let count = ctx.environment.scale(20_000, 400);
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
            let mut next = Proxy::start(ctx, setting()?)?;
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
    let mut settings = Settings::new(ctx, default_relay(ctx))?.listen(50_000, &server.address.to_string())?;
    pins.settings(&mut settings);
    let proxy = Proxy::start(ctx, settings)?;
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
    let count = ctx.environment.scale(99_000, 500);
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

fn without(ctx: &Context) -> Result<()> {
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let config = client_config(ctx)?;
    let settings = || Settings::new(ctx, default_relay(ctx))?.listen(50_000, &server.address.to_string());
    let nowhere = ctx.environment.tmp.join("no-bpffs");
    fs::create_dir_all(&nowhere)?;
    let mut lacking = settings()?;
    lacking.metrics = vec![format!("pins = {:?}", nowhere.join("tlsplice").display().to_string())];
    let proxy = Proxy::start(ctx, lacking.clone())?;
    connect(&config, proxy.address(0), &truth, Kind::Clean, (1_000, 2_000))?;
    let metrics = proxy.settled()?;
    let user = |side: &str| metrics.sum("tlsplice_connections_opened_total", &[("side", side), ("source", "user")]);
    ensure!(
        (user("client"), user("upstream")) == (1, 1),
        "user space counts {} and {}",
        user("client"),
        user("upstream")
    );
    let said = proxy.log().lines().filter(|line| line.contains("mount -t bpf")).count();
    ensure!(said == 1, "it says {said} times how to mount a bpf file system: {}", proxy.log_tail());
    proxy.finish(ctx)?;
    lacking.metrics.push("kernel = \"require\"".into());
    let file = ctx.environment.tmp.join("require.toml");
    fs::write(&file, lacking.text())?;
    let output = Command::new(&ctx.environment.bin).arg("run").arg("--config").arg(&file).output()?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(3) && words.contains("mount -t bpf"), "{}: {words}", output.status);
    let output = Command::new(&ctx.environment.bin).args(["metrics", "--pins"]).arg(&nowhere).output()?;
    ensure!(output.status.code() == Some(3), "metrics without maps: {}", output.status);
    // A kernel that cannot count at all has other things to say first.
    if !ctx.environment.counts_in_kernel() {
        return Ok(());
    }
    without_capabilities(ctx, settings()?, &config, &truth)
}

/// A root that may not load programs, as in a container.
fn without_capabilities(
    ctx: &Context,
    mut settings: Settings,
    config: &Arc<rustls::ClientConfig>,
    truth: &Truth,
) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    pins.settings(&mut settings);
    settings.metrics.remove(0);
    let proxy = Proxy::start_as(ctx, settings, &["setpriv", "--bounding-set=-bpf,-sys_admin,-net_admin,-perfmon"])?;
    connect(config, proxy.address(0), truth, Kind::Clean, (1_000, 2_000))?;
    proxy.settled()?;
    let said = proxy.log().lines().filter(|line| line.contains("CAP_BPF")).count();
    ensure!(said == 1, "it says {said} times that CAP_BPF is missing: {}", proxy.log_tail());
    proxy.finish(ctx)?;
    let output = Command::new("setpriv")
        .args(["--bounding-set=-bpf,-sys_admin,-net_admin,-perfmon", "--"])
        .arg(&ctx.environment.bin)
        .arg("doctor")
        .output()?;
    let words = String::from_utf8_lossy(&output.stdout);
    let at = words.find("kernel metrics").context("doctor says nothing of kernel metrics")?;
    ensure!(words[at..].contains("mend:"), "doctor has no mend: {}", &words[at..]);
    ctx.note(words[at..].lines().take(2).collect::<Vec<_>>().join(" ").trim());
    Ok(())
}

/// The maps can be made here, and nothing kept with a socket.
fn no_storages(ctx: &Context) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let mut settings = Settings::new(ctx, default_relay(ctx))?.listen(50_000, &server.address.to_string())?;
    pins.settings(&mut settings);
    settings.metrics.remove(0);
    let proxy = Proxy::start(ctx, settings)?;
    connect(&client_config(ctx)?, proxy.address(0), &truth, Kind::Clean, (1_000, 2_000))?;
    let metrics = proxy.settled()?;
    let user = metrics.sum("tlsplice_connections_opened_total", &[("side", "client"), ("source", "user")]);
    ensure!(user == 1, "user space counts {user}");
    let said = proxy.log().lines().filter(|line| line.contains("label a socket")).count();
    ensure!(said == 1, "it says {said} times what is in the way: {}", proxy.log_tail());
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
        if matches!(ctx.environment.kernel, Kernel::Guest("6.1" | "6.12" | "6.18")) { 1 << 27 } else { 1 << 30 };
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

/// Pairs of a run without counting and one with it, each compared within itself.
const COST_PAIRS: usize = 9;
/// Far above what was ever measured (7 %), and below what a mistake in the program would cost: this machine may be busy.
const COST_LIMIT: f64 = 1.5;

/// CPU of tlsplice.
#[derive(Default)]
struct Spent {
    /// For each connection of a storm, in nanoseconds.
    connection: Vec<u64>,
    /// For each MiB of one long download, in nanoseconds.
    mebibyte: Vec<u64>,
}

fn cost(ctx: &Context) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let config = client_config(ctx)?;
    let (count, mebibytes) = (1_000, 256);
    let (mut without, mut with, mut runs) = (Spent::default(), Spent::default(), None);
    for run in 0..2 * COST_PAIRS {
        let mut settings = Settings::new(ctx, default_relay(ctx))?.listen(50_000, &server.address.to_string())?;
        let spent = if run % 2 == 1 { &mut with } else { &mut without };
        if run % 2 == 1 {
            pins.settings(&mut settings);
        }
        let proxy = Proxy::start(ctx, settings)?;
        let spent_since =
            |before: &Threads| -> Result<u64> { Ok(Threads::of(proxy.pid())?.cpu_since(before).as_nanos() as u64) };
        let storm = |count| -> Result<u64> {
            let before = Threads::of(proxy.pid())?;
            storm(4, count, |_, random| {
                let sizes = (random.range(1, 4_000), random.range(1, 4_000));
                connect(&config, proxy.address(0), &truth, Kind::Clean, sizes)
            })?;
            proxy.settled()?;
            spent_since(&before)
        };
        storm(50)?;
        spent.connection.push(storm(count)? / count);
        let before = Threads::of(proxy.pid())?;
        connect(&config, proxy.address(0), &truth, Kind::Clean, (0, mebibytes << 20))?;
        spent.mebibyte.push(spent_since(&before)? / mebibytes);
        if run == 2 * COST_PAIRS - 1 {
            runs = program_runs(ctx, &pins, || storm(count).map(drop))?;
        }
        proxy.finish(ctx)?;
    }
    let (ratio, storm) = compared(&without.connection, &with.connection);
    let (bulk_ratio, bulk) = compared(&without.mebibyte, &with.mebibyte);
    let (each, ns) = runs.map_or((0.0, 0.0), |(n, seconds)| (n / count as f64, seconds / n * 1e9));
    ctx.note(&format!(
        "CPU of tlsplice, {COST_PAIRS} pairs: a connection {storm}; a MiB of bulk {bulk}; bpf_stats: {each:.1} runs a connection, {ns:.0} ns each"
    ));
    ensure!(
        ratio < COST_LIMIT && bulk_ratio < COST_LIMIT,
        "counting costs {ratio:.2} and {bulk_ratio:.2} times as much"
    );
    Ok(())
}

/// How many times as much it is with counting: the median of the pairs' ratios, and all of it in words.
fn compared(without: &[u64], with: &[u64]) -> (f64, String) {
    let middle = |series: &[u64]| {
        let mut sorted = series.to_vec();
        sorted.sort_unstable();
        sorted[sorted.len() / 2]
    };
    let mut ratios: Vec<f64> = without.iter().zip(with).map(|(off, on)| *on as f64 / *off as f64).collect();
    ratios.sort_unstable_by(f64::total_cmp);
    let ratio = ratios[ratios.len() / 2];
    let percent = |ratio: f64| 100.0 * (ratio - 1.0);
    let said = format!(
        "{} ns without, {} ns with ({:+.1} %; {:+.1} to {:+.1})",
        middle(without),
        middle(with),
        percent(ratio),
        percent(ratios[0]),
        percent(ratios[ratios.len() - 1])
    );
    (ratio, said)
}

/// How often the program runs in this load and for how many seconds; `None` where the kernel tells of no runs.
fn program_runs(ctx: &Context, pins: &Pins, load: impl FnOnce() -> Result<()>) -> Result<Option<(f64, f64)>> {
    let stats = Path::new("/proc/sys/kernel/bpf_stats_enabled");
    if fs::write(stats, "1").is_err() {
        return Ok(None);
    }
    let fetch = || -> Result<[f64; 2]> {
        let text = pinned_text(ctx, &pins.folder())?;
        Ok(["tlsplice_ebpf_runs_total", "tlsplice_ebpf_run_seconds_total"].map(|name| float(&text, name)))
    };
    let then = fetch()?;
    let loaded = load();
    let now = fetch()?;
    let _ = fs::write(stats, "0");
    loaded?;
    ensure!(now[0] > then[0], "the program has not run: {now:?}");
    Ok(Some((now[0] - then[0], now[1] - then[1])))
}

fn pinned_text(ctx: &Context, pins: &Path) -> Result<String> {
    let output = Command::new(&ctx.environment.bin).arg("metrics").arg("--pins").arg(pins).output()?;
    ensure!(output.status.success(), "tlsplice metrics: {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// The value of a sample without labels; 0 if there is none.
fn float(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.parse().ok()).unwrap_or(0.0)
}
