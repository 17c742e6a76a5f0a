//! Certificates replaced under load, in every way in which people replace them, and in some in which they should not.

use crate::authority::{Authority, Issued, Leaf};
use crate::environment::{Environment, Kernel};
use crate::exchange::Setup;
use crate::run::{Context, Test};
use crate::upstream::Upstream;
use anyhow::{Context as _, Result, ensure};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub fn tests(env: &Environment) -> Vec<Test> {
    if env.kernel != Kernel::Host {
        // Nothing here depends on the kernel, and an emulated processor makes no 200 handshakes a second.
        return Vec::new();
    }
    let mut load = Test::new(env, "certificates_are_replaced_200_times_under_load_and_no_handshake_fails", under_load);
    load.limit = Duration::from_secs(180);
    vec![
        load,
        Test::new(env, "a_renewed_certificate_whose_time_has_not_come_is_served_when_it_comes", not_yet_valid),
        Test::new(env, "the_last_good_copy_serves_when_the_share_is_gone_at_the_start", last_good),
    ]
}

pub(super) const POLL: Duration = Duration::from_millis(100);
const REPLACEMENTS: usize = 200;
const HANDSHAKES_PER_SECOND: u32 = 200;

/// A client that trusts the authority and resumes nothing.
pub(super) fn client(authority: &Authority) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&authority.root).context("the root")?)?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// One handshake; the leaf that was served, verified.
fn handshake(config: &Arc<ClientConfig>, address: SocketAddr) -> Result<CertificateDer<'static>> {
    let name = ServerName::try_from(crate::certificate::NAME).expect("a valid name");
    let mut connection = ClientConnection::new(Arc::clone(config), name)?;
    let mut socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    while connection.is_handshaking() {
        connection.complete_io(&mut socket).context("handshake")?;
    }
    let leaf = connection.peer_certificates().and_then(<[_]>::first).context("no certificate")?.clone().into_owned();
    connection.send_close_notify();
    let _ = connection.complete_io(&mut socket);
    Ok(leaf)
}

/// Ways in which files come to be replaced.
#[derive(Debug, Clone, Copy)]
pub(super) enum Way {
    /// Each file by a rename.
    Rename,
    /// A link to a folder is swapped.
    Swap,
    /// Written in place, in halves.
    Halves,
    /// A chain whose key is another's, for a while.
    BadKey,
    /// The folder is gone for a while.
    Vanished,
}

const WAYS: [Way; 5] = [Way::Rename, Way::Swap, Way::Halves, Way::BadKey, Way::Vanished];

pub(super) struct Share {
    /// What the configuration names: a link to a folder.
    link: PathBuf,
    folder: PathBuf,
    turn: usize,
}

impl Share {
    pub(super) fn new(folder: PathBuf, first: &Issued) -> Result<Self> {
        fs::create_dir_all(&folder)?;
        let mut share = Self { link: folder.join("live"), folder, turn: 0 };
        share.swap(first)?;
        Ok(share)
    }

    pub(super) fn swap(&mut self, to: &Issued) -> Result<()> {
        self.turn += 1;
        // Relative, so that it leads to the same place wherever the share is mounted.
        let name = format!("v{}", self.turn);
        let version = self.folder.join(&name);
        fs::create_dir(&version)?;
        fs::copy(&to.chain, version.join("chain.pem"))?;
        fs::copy(&to.key, version.join("key.pem"))?;
        let new = self.folder.join("new-link");
        std::os::unix::fs::symlink(&name, &new)?;
        let old = fs::read_link(&self.link).ok();
        fs::rename(&new, &self.link)?;
        if let Some(old) = old {
            fs::remove_dir_all(self.folder.join(old))?;
        }
        Ok(())
    }

    fn put(&self, name: &str, from: &Path) -> Result<()> {
        // Where a copy is made: hidden, so nobody takes it for a certificate.
        let aside = self.link.join(format!(".{name}"));
        fs::copy(from, &aside)?;
        fs::rename(aside, self.link.join(name)).context("rename")
    }

    pub(super) fn replace(&mut self, way: Way, to: &Issued) -> Result<()> {
        match way {
            Way::Rename => {
                self.put("chain.pem", &to.chain)?;
                self.put("key.pem", &to.key)
            }
            Way::Swap => self.swap(to),
            Way::Halves => {
                for (name, from) in [("chain.pem", &to.chain), ("key.pem", &to.key)] {
                    let whole = fs::read(from)?;
                    fs::write(self.link.join(name), &whole[..whole.len() / 2])?;
                    thread::sleep(POLL / 2);
                    fs::write(self.link.join(name), &whole)?;
                }
                Ok(())
            }
            Way::BadKey => {
                self.put("chain.pem", &to.chain)?;
                thread::sleep(POLL * 3);
                self.put("key.pem", &to.key)
            }
            Way::Vanished => {
                let away = self.folder.join("away");
                fs::rename(&self.link, &away)?;
                thread::sleep(POLL * 3);
                fs::rename(&away, &self.link)?;
                self.swap(to)
            }
        }
    }
}

fn under_load(ctx: &Context) -> Result<()> {
    let folder = ctx.folder("replaced")?;
    let load = Load::new(&folder)?;
    let mut share = Share::new(folder.join("share"), &load.leaves[0])?;
    let setup = load.serve(ctx, share.link.clone())?;
    let patience = ctx.environment.patience();
    let shaken =
        load.replaced(&setup, REPLACEMENTS, patience, |turn, to| share.replace(WAYS[turn % WAYS.len()], to))?;
    let log = setup.proxy.log();
    let refused = log.matches("are refused").count();
    ctx.note(&format!("{REPLACEMENTS} replacements, {refused} bad ones refused; {shaken}"));
    ensure!(refused > 0, "no bad set was ever seen: the test proves nothing");
    end(setup)
}

/// Ends what `Load::serve` began.
pub(super) fn end(setup: Setup) -> Result<()> {
    let Setup { mut proxy, .. } = setup;
    proxy.settled()?;
    proxy.signal(rustix::process::Signal::TERM)?;
    let status = proxy.wait_exit()?;
    proxy.check_end(status)
}

/// Certificates of one name that follow each other, and handshakes all the while.
pub(super) struct Load {
    authority: Authority,
    pub(super) leaves: Vec<Issued>,
}

impl Load {
    pub(super) fn new(folder: &Path) -> Result<Self> {
        let authority = Authority::make(&folder.join("ca"))?;
        let issue = |index| authority.issue(&Leaf { file: &format!("leaf{index}"), ..Leaf::default() });
        let leaves = (0..4).map(issue).collect::<Result<_>>()?;
        Ok(Self { authority, leaves })
    }

    /// A tlsplice that serves what lies there.
    pub(super) fn serve(&self, ctx: &Context, certificates: PathBuf) -> Result<Setup> {
        let relay = ctx.environment.relays()[0];
        let upstream = Upstream::closing(&ctx.environment)?;
        Setup::with(ctx, relay, &[0], upstream, |mut settings| {
            settings.certificates = vec![certificates];
            settings.tls(&format!("poll = \"{}ms\"", POLL.as_millis())).limit("connections = 10000")
        })
    }

    /// Replaces them so often while handshakes go on, each of which has to see the certificate before or behind the
    /// replacement that is under way, which has to be served within `patience`. Says how many handshakes there were.
    pub(super) fn replaced(
        &self,
        setup: &Setup,
        times: usize,
        patience: Duration,
        mut replace: impl FnMut(usize, &Issued) -> Result<()>,
    ) -> Result<String> {
        let (config, address) = (client(&self.authority)?, setup.proxy.address(0));
        let leaf = |issued: &Issued| CertificateDer::from_pem_file(&issued.leaf).context("the leaf");
        let leaves: Vec<_> = self.leaves.iter().map(leaf).collect::<Result<_>>()?;
        let (over, shaken, now) = (AtomicBool::new(false), AtomicU64::new(0), AtomicUsize::new(0));
        let began = Instant::now();
        thread::scope(|scope| {
            let load = scope.spawn(|| {
                let mut next = Instant::now();
                while !over.load(Relaxed) {
                    let before = now.load(Relaxed);
                    let got =
                        handshake(&config, address).with_context(|| format!("handshake {}", shaken.load(Relaxed)))?;
                    let mut allowed = (before..=now.load(Relaxed) + 1).map(|turn| &leaves[turn % leaves.len()]);
                    ensure!(allowed.any(|leaf| *leaf == got), "a wrong certificate at replacement {before}");
                    shaken.fetch_add(1, Relaxed);
                    next += Duration::from_secs(1) / HANDSHAKES_PER_SECOND;
                    thread::sleep(next.saturating_duration_since(Instant::now()));
                }
                Ok(())
            });
            let replaced = (0..times).try_for_each(|turn| {
                now.store(turn, Relaxed);
                let to = (turn + 1) % leaves.len();
                replace(turn, &self.leaves[to]).with_context(|| format!("replacement {turn}"))?;
                let deadline = Instant::now() + patience;
                while handshake(&config, address)? != leaves[to] {
                    ensure!(Instant::now() < deadline, "replacement {turn} is not served: {}", setup.proxy.log_tail());
                    thread::sleep(POLL / 4);
                }
                ensure!(!load.is_finished(), "the load has stopped at replacement {turn}");
                Ok(())
            });
            over.store(true, Relaxed);
            // Why the load stopped says more than that it has.
            load.join().ok().context("the load panicked")??;
            replaced
        })?;
        let taken = setup.proxy.log().matches("certificates: replaced").count();
        ensure!(taken >= times, "only {taken} of {times} replacements were served");
        let shaken = shaken.load(Relaxed);
        let rate = shaken as f64 / began.elapsed().as_secs_f64();
        Ok(format!("{shaken} handshakes, {rate:.0}/s, none failed"))
    }
}

/// What the authority's clock is ahead of ours.
const AHEAD: Duration = Duration::from_secs(5);

/// Refused, said once, and taken without a signal.
fn not_yet_valid(ctx: &Context) -> Result<()> {
    let folder = ctx.folder("not-yet-valid")?;
    let issue = |name: &str, begins: SystemTime| {
        let key = rcgen::KeyPair::generate()?;
        let mut parameters = rcgen::CertificateParams::new(vec![crate::certificate::NAME.to_owned()])?;
        let begins = begins.duration_since(UNIX_EPOCH).unwrap_or_default();
        parameters.not_before = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(begins.as_secs());
        let leaf = folder.join(name);
        let key_file = leaf.with_extension("key");
        fs::write(&leaf, parameters.self_signed(&key)?.pem())?;
        fs::write(&key_file, key.serialize_pem())?;
        fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600))?;
        anyhow::Ok(Issued { chain: leaf.clone(), leaf, key: key_file })
    };
    let begins = SystemTime::now() + AHEAD;
    let (old, new) = (issue("old", UNIX_EPOCH)?, issue("new", begins)?);
    let mut share = Share::new(folder.join("share"), &old)?;
    let setup = Setup::with(ctx, ctx.environment.relays()[0], &[0], Upstream::closing(&ctx.environment)?, |mut s| {
        s.certificates = vec![share.link.clone()];
        s.tls(&format!("poll = \"{}ms\"", POLL.as_millis()))
    })?;
    share.swap(&new)?;
    let deadline = Instant::now() + AHEAD + ctx.environment.patience();
    while !setup.proxy.log().contains("certificates: replaced") {
        ensure!(Instant::now() < deadline, "not served though its time has come: {}", setup.proxy.log_tail());
        thread::sleep(POLL);
    }
    ensure!(SystemTime::now() >= begins - Duration::from_secs(1), "served before its time");
    let log = setup.proxy.log();
    let refused: Vec<_> = log.lines().filter(|line| line.contains("are refused")).collect();
    ensure!(refused.len() == 1 && refused[0].contains("is not valid before"), "said: {refused:?}");
    end(setup)
}

fn last_good(ctx: &Context) -> Result<()> {
    let folder = ctx.folder("last-good")?;
    let authority = Authority::make(&folder.join("ca"))?;
    let issued = authority.issue(&Leaf::default())?;
    let share = Share::new(folder.join("share"), &issued)?;
    let relay = ctx.environment.relays()[0];
    let start = || {
        Setup::with(ctx, relay, &[0], Upstream::closing(&ctx.environment)?, |mut settings| {
            settings.certificates = vec![share.link.clone()];
            settings.tls("poll = \"100ms\"").tls(&format!("last_good = {:?}", folder.join("kept")))
        })
    };
    end(start()?)?;
    fs::remove_file(&share.link)?;
    let setup = start().context("start without the share")?;
    let config = client(&authority)?;
    handshake(&config, setup.proxy.address(0)).context("served from the copy")?;
    ensure!(setup.proxy.log().contains("the last good copy serves"), "{}", setup.proxy.log_tail());
    // The share comes back with another certificate.
    let new = authority.issue(&Leaf { file: "new", ..Leaf::default() })?;
    let mut share = Share { turn: 10, ..share };
    share.swap(&new)?;
    let wanted = CertificateDer::from_pem_file(&new.leaf).context("the leaf")?;
    let deadline = Instant::now() + ctx.environment.patience();
    while handshake(&config, setup.proxy.address(0))? != wanted {
        ensure!(Instant::now() < deadline, "the share's certificate is not served: {}", setup.proxy.log_tail());
        thread::sleep(POLL);
    }
    end(setup)
}
