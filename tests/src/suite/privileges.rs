//! Started as root it ends as somebody else, with one capability, and still binds low ports and reads its keys on a reload.

use crate::client::handshake::TLS13_AES_256;
use crate::environment::{Environment, Relay};
use crate::exchange::{Plan, Setup};
use crate::proxy::loopback;
use crate::run::{Context, Test};
use crate::upstream::{Kind, Upstream, exchange as serve};
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::time::{Duration, Instant};

pub fn tests(env: &Environment) -> Vec<Test> {
    Test::one_relay(env, "root_becomes_the_user_with_one_capability_and_reload_still_works", drops)
}

const USER: &str = "nobody";
/// CAP_NET_BIND_SERVICE is number 10.
const CAPABILITIES: &str = "0000000000000400";

/// Its user and group, by /etc/passwd.
fn ids() -> Option<(u32, u32)> {
    let passwd = fs::read_to_string("/etc/passwd").ok()?;
    let line = passwd.lines().find_map(|l| l.strip_prefix(&format!("{USER}:")))?.to_owned();
    let mut fields = line.split(':').skip(1);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

fn low_address() -> Result<SocketAddr> {
    (900..1_024).map(loopback).find(|a| TcpListener::bind(a).is_ok()).context("no free port below 1024")
}

fn drops(ctx: &Context, relay: Relay) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "only root can become somebody else: run the tests as root");
    let (uid, gid) = ids().context("/etc/passwd has no nobody")?;
    let folder = ctx.environment.tmp.join("keys");
    fs::create_dir_all(&folder)?;
    let (chain, key) = (folder.join("nobody.crt"), folder.join("nobody.key"));
    fs::copy(&ctx.certificates.ecdsa.chain, &chain)?;
    fs::copy(&ctx.certificates.ecdsa.key, &key)?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    chown(&key, Some(uid), Some(gid))?;
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    let low = low_address()?;
    let mut setup = Setup::with(ctx, relay, &[0], upstream, |mut settings| {
        settings.certificates = vec![chain, key];
        settings.listeners[0].address = low;
        settings.server(&format!("user = \"{USER}\""))
    })?;
    check_credentials(setup.proxy.pid(), uid)?;
    setup.transfer(ctx, 0, TLS13_AES_256, &Plan::new(100_000, 100_000))?;
    let mut settings = setup.proxy.settings.clone();
    let mut second = settings.listeners[0].clone();
    second.address = low_address()?;
    settings.listeners[0].offload_after = 1_000;
    settings.listeners.push(second.clone());
    setup.proxy.reload(settings)?;
    let deadline = Instant::now() + ctx.environment.patience();
    while TcpStream::connect(second.address).is_err() {
        ensure!(Instant::now() < deadline, "no low port after the drop: {}", setup.proxy.log_tail());
        std::thread::sleep(Duration::from_millis(20));
    }
    setup.proxy.settled()?;
    // The probe of the port has come to the upstream, or to nothing.
    setup.transfer(ctx, 1, TLS13_AES_256, &Plan::new(100_000, 100_000))?;
    check_credentials(setup.proxy.pid(), uid)?;
    let Setup { mut proxy, .. } = setup;
    ctx.totals.add(&proxy.settled()?);
    proxy.signal(rustix::process::Signal::TERM)?;
    let status = proxy.wait_exit()?;
    proxy.check_end(status)
}

/// Of every thread.
fn check_credentials(pid: u32, uid: u32) -> Result<()> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let field =
            |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim().to_owned();
        let name = field("Name:");
        let uids = field("Uid:");
        ensure!(uids.split_whitespace().all(|u| u == uid.to_string()), "thread {name} runs as {uids}");
        for set in ["CapEff:", "CapPrm:"] {
            ensure!(field(set) == CAPABILITIES, "thread {name}: {set} {}", field(set));
        }
        ensure!(field("CapInh:").trim_matches('0').is_empty(), "thread {name}: CapInh {}", field("CapInh:"));
    }
    Ok(())
}
