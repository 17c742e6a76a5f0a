//! Where the kernel does not count, or counts for another already, tlsplice serves all the same and says why.

use super::kernel_metrics::{Pins, all_closed, default_relay, figures, proxy_gone, sizes};
use super::privileges::Nobody;
use crate::counted::{Kind, Server, Truth, client_config, connect, storm};
use crate::environment::Environment;
use crate::proxy::{Proxy, Settings};
use crate::run::{Context, Test};
use anyhow::{Context as _, Result, bail, ensure};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = vec![Test::new(env, "without_bpffs_or_capabilities_it_serves_and_says_so", without)];
    if env.counts_in_kernel() {
        let name = "a_second_tlsplice_takes_no_counting_from_one_in_another_cgroup";
        tests.push(Test::new(env, name, counted_elsewhere));
        tests.push(Test::new(env, "a_user_without_root_counts_where_the_unit_lets_it_in", as_the_unit));
        let limit = env.scale(Duration::from_secs(240), Duration::from_secs(900));
        tests.iter_mut().for_each(|test| test.limit = limit);
    } else {
        tests.push(Test::new(env, "a_kernel_without_storages_of_sockets_is_no_obstacle", no_storages));
    }
    tests
}

/// By its place: a shell may have one of its own by that name, which can do less.
const SETPRIV: &str = "/usr/bin/setpriv";

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

    /// tlsplice in it, started by another program that takes it behind `--`.
    fn start(&self, ctx: &Context, settings: Settings, by: &[&str]) -> Result<Proxy> {
        let join = "echo $$ >\"$0/cgroup.procs\" && exec \"$@\"";
        let folder = self.0.display().to_string();
        let mut words = vec!["sh", "-c", join, &folder];
        words.extend(by);
        Proxy::start_as(ctx, settings, &words)
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
    let first = service.start(ctx, pins.counting(ctx, &server)?, &[SETPRIV])?;
    let second = pins.counting(ctx, &server)?;
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

/// systemd mounts the bpf file system for root alone; what the unit does before its start is done here.
fn as_the_unit(ctx: &Context) -> Result<()> {
    const KEPT: &str = "+net_bind_service,+bpf,+net_admin,+perfmon";
    let pins = Pins::mount(ctx)?;
    let root = pins.folder().parent().context("the pins have no parent")?.to_owned();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o700))?;
    let service = Service::make(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let config = client_config(ctx)?;
    let nobody = Nobody::find()?;
    let mut settings = pins.counting(ctx, &server)?;
    settings.certificates = nobody.certificates(ctx)?;
    let (user, group) = (format!("--reuid={}", nobody.uid), format!("--regid={}", nobody.gid));
    let (inherited, ambient) = (format!("--inh-caps={KEPT}"), format!("--ambient-caps={KEPT}"));
    let bounds = format!("--bounding-set=-all,{KEPT}");
    let by = [SETPRIV, &user, &group, "--clear-groups", &inherited, &ambient, &bounds, "--no-new-privs"];

    let required = settings.clone();
    settings.metrics.remove(0);
    let proxy = service.start(ctx, settings, &by)?;
    connect(&config, proxy.address(0), &truth, Kind::Clean, (1_000, 2_000))?;
    proxy.settled()?;
    nobody.check(proxy.pid())?;
    let said = proxy.log().lines().filter(|line| line.contains("chmod 0711")).count();
    ensure!(said == 1, "it says {said} times how it is let in: {}", proxy.log_tail());
    proxy.finish(ctx)?;

    fs::set_permissions(&root, fs::Permissions::from_mode(0o711))?;
    fs::create_dir(pins.folder())?;
    chown(pins.folder(), Some(nobody.uid), Some(nobody.gid))?;
    let proxy = service.start(ctx, required, &by)?;
    let before = truth.client.figures();
    storm(1, 20, |_, random| connect(&config, proxy.address(0), &truth, Kind::Clean, sizes(random)))?;
    nobody.check(proxy.pid())?;
    let counted = figures(&all_closed(ctx, || proxy.metrics())?, "client");
    let sent: Vec<u64> = truth.client.figures().iter().zip(before).map(|(now, then)| now - then).collect();
    ensure!(counted[..] == sent[..], "{counted:?} counted, {sent:?} sent");
    proxy_gone(ctx, proxy, &pins).map(drop)
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
    let proxy = Proxy::start_as(ctx, settings, &[SETPRIV, "--bounding-set=-bpf,-sys_admin,-net_admin,-perfmon"])?;
    connect(config, proxy.address(0), truth, Kind::Clean, (1_000, 2_000))?;
    proxy.settled()?;
    let said = proxy.log().lines().filter(|line| line.contains("CAP_BPF")).count();
    ensure!(said == 1, "it says {said} times that CAP_BPF is missing: {}", proxy.log_tail());
    proxy.finish(ctx)?;
    let output = Command::new(SETPRIV)
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
    let mut settings = pins.counting(ctx, &server)?;
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
