//! Started as root it ends as somebody else, with one capability, and still binds low ports and reads its keys on a reload.

use crate::client::handshake::TLS13_AES_256;
use crate::environment::{Environment, Relay};
use crate::exchange::{Plan, Setup};
use crate::proxy::loopback;
use crate::run::{Context, Test};
use crate::upstream::{Kind, Upstream, exchange as serve};
use anyhow::{Context as _, Result, bail, ensure};
use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub fn tests(env: &Environment) -> Vec<Test> {
    Test::one_relay(env, "root_becomes_the_user_with_one_capability_and_reload_still_works", drops)
}

const USER: &str = "nobody";
/// CAP_NET_BIND_SERVICE is number 10.
const CAPABILITIES: &str = "0000000000000400";

/// Who tlsplice is when it is not root.
pub struct Nobody {
    pub uid: u32,
    pub gid: u32,
}

impl Nobody {
    /// By /etc/passwd.
    pub fn find() -> Result<Self> {
        let passwd = fs::read_to_string("/etc/passwd")?;
        let line =
            passwd.lines().find_map(|l| l.strip_prefix(&format!("{USER}:"))).context("/etc/passwd has no nobody")?;
        let mut numbers = line.split(':').skip(1).map(str::parse);
        let (Some(uid), Some(gid)) = (numbers.next(), numbers.next()) else { bail!("/etc/passwd: {line}") };
        Ok(Self { uid: uid?, gid: gid? })
    }

    /// A chain and a key that it alone may read.
    pub fn certificates(&self, ctx: &Context) -> Result<Vec<PathBuf>> {
        let folder = ctx.environment.tmp.join("keys");
        fs::create_dir_all(&folder)?;
        let (chain, key) = (folder.join("nobody.crt"), folder.join("nobody.key"));
        fs::copy(&ctx.certificates.ecdsa.chain, &chain)?;
        fs::copy(&ctx.certificates.ecdsa.key, &key)?;
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        chown(&key, Some(self.uid), Some(self.gid))?;
        Ok(vec![chain, key])
    }

    /// Every thread of the process is this user, with one capability.
    pub fn check(&self, pid: u32) -> Result<()> {
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let status = fs::read_to_string(task?.path().join("status"))?;
            let field =
                |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim().to_owned();
            let name = field("Name:");
            let uids = field("Uid:");
            ensure!(uids.split_whitespace().all(|u| u == self.uid.to_string()), "thread {name} runs as {uids}");
            for set in ["CapEff:", "CapPrm:"] {
                ensure!(field(set) == CAPABILITIES, "thread {name}: {set} {}", field(set));
            }
            ensure!(field("CapInh:").trim_matches('0').is_empty(), "thread {name}: CapInh {}", field("CapInh:"));
        }
        Ok(())
    }
}

fn low_address() -> Result<SocketAddr> {
    (900..1_024).map(loopback).find(|a| TcpListener::bind(a).is_ok()).context("no free port below 1024")
}

fn drops(ctx: &Context, relay: Relay) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "only root can become somebody else: run the tests as root");
    let nobody = Nobody::find()?;
    let certificates = nobody.certificates(ctx)?;
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    let low = low_address()?;
    let mut setup = Setup::with(ctx, relay, &[0], upstream, |mut settings| {
        settings.certificates = certificates;
        settings.listeners[0].address = low;
        settings.server(&format!("user = \"{USER}\""))
    })?;
    nobody.check(setup.proxy.pid())?;
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
    nobody.check(setup.proxy.pid())?;
    let Setup { mut proxy, .. } = setup;
    ctx.totals.add(&proxy.settled()?);
    proxy.signal(rustix::process::Signal::TERM)?;
    let status = proxy.wait_exit()?;
    proxy.check_end(status)
}
