//! OpenSSL, GnuTLS, curl and nginx as they are installed: each suite, bodies of every size, KeyUpdates by their own
//! commands.

use super::programs::{Conversation, Feed, converse, gnutls, openssl, program};
use crate::client::handshake::{RSA_SUITES, SUITES, Suite, TLS12_AES_128, TLS13_AES_128, TLS13_AES_256, TLS13_CHACHA};
use crate::environment::{Environment, Kernel, Relay};
use crate::exchange::{Account, Setup};
use crate::http;
use crate::pattern::Pattern;
use crate::process::{Guarded, free_port};
use crate::proxy::loopback;
use crate::run::{Context, Test};
use crate::upstream::{Kind, PeerEnd, REQUEST_BYTES, Request, Upstream, exchange as serve};
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

type Make = fn(&Context, SocketAddr, Suite, bool) -> Result<Command>;

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |name, run| tests.extend(Test::some_guests(env, name, run));
    add("openssl_moves_bodies_of_each_size", |ctx, relay| sizes(ctx, relay, openssl, 1 << 20));
    add("openssl_speaks_each_suite", |ctx, relay| suites(ctx, relay, openssl));
    add("openssl_key_updates_in_a_transfer", |ctx, relay| {
        rekeys(ctx, relay, openssl, &["k\n", "K\n"], 15_000, 2 << 20)
    });
    add("gnutls_moves_bodies_of_each_size", |ctx, relay| sizes(ctx, relay, gnutls, gnutls_bytes(ctx)));
    add("gnutls_speaks_each_suite", |ctx, relay| suites(ctx, relay, gnutls));
    add("gnutls_rekeys_in_a_transfer", |ctx, relay| {
        rekeys(ctx, relay, gnutls, &["^rekey^\n"], 40_000, gnutls_bytes(ctx))
    });
    add("curl_downloads_and_uploads", curl_with_ours);
    add("curl_downloads_from_nginx_and_uploads_through_it", curl_with_nginx);
    tests
}

const SIZES_BYTES: [u64; 5] = [0, 1, 16_384, 16_385, 1 << 20];

/// The most that gnutls-cli is made to read. In user-mode Linux it takes 16 s for 1 MiB, of OpenSSL's server too: all of it
/// is system time of its own.
fn gnutls_bytes(ctx: &Context) -> u64 {
    if ctx.environment.kernel == Kernel::Uml { 150_000 } else { 1 << 20 }
}

/// One conversation, counted to the byte.
fn talk(ctx: &Context, setup: &Setup, listener: usize, suite: Suite, make: Make, up: u64, down: u64) -> Result<()> {
    let account = Account::open(&setup.proxy)?;
    let request = Request { together: true, ..Request::new(up, down) };
    let command = make(ctx, setup.proxy.address(listener), suite, false)?;
    let Conversation { got, fed } = converse(ctx, command, &request, &Feed::Plain)?;
    let what = || format!("{}, listener {listener}, up {up}, down {down}", suite.name);
    ensure!(got == down, "{}: {got} bytes came out", what());
    fed.with_context(what)?;
    let served = setup.upstream.served().with_context(what)?;
    ensure!((served.up, served.down) == (up, down), "{}: the upstream saw {served:?}", what());
    account.close(&setup.proxy, REQUEST_BYTES as u64 + up, down, false).with_context(what)?;
    Ok(())
}

/// `most` caps the downloads.
fn sizes(ctx: &Context, relay: Relay, make: Make, most: u64) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0, 16_384])?;
    let versions: &[Suite] = ctx.environment.scale(&[TLS13_AES_256, TLS12_AES_128], &[TLS13_AES_256]);
    for suite in versions {
        for (index, bytes) in SIZES_BYTES.into_iter().enumerate() {
            let directions = [(bytes, 0), (0, bytes), (bytes, bytes)];
            // A start of these programs is dear under emulation: there the directions take turns.
            let chosen = ctx.environment.scale(&directions[..], &directions[index % 3..=index % 3]);
            for (up, down) in chosen {
                talk(ctx, &setup, index % 2, *suite, make, *up, (*down).min(most))?;
            }
        }
        talk(ctx, &setup, 0, *suite, make, 1 << 20, most)?;
    }
    setup.finish(ctx).map(drop)
}

fn suites(ctx: &Context, relay: Relay, make: Make) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0, 16_384])?;
    for (index, suite) in SUITES.into_iter().enumerate() {
        talk(ctx, &setup, index % 2, suite, make, 100_000, 40_000)?;
    }
    setup.finish(ctx)?;
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    let rsa = ctx.certificates.rsa.clone();
    let setup = Setup::with(ctx, relay, &[0, 16_384], upstream, |mut settings| {
        settings.certificates = vec![rsa.chain, rsa.key];
        settings
    })?;
    for (index, suite) in RSA_SUITES.into_iter().enumerate() {
        talk(ctx, &setup, index % 2, suite, make, 100_000, 40_000)?;
    }
    setup.finish(ctx).map(drop)
}

const REKEYED_UP_BYTES: u64 = 200_000;

/// KeyUpdates by the program's own command, ten or so, during an upload and a download.
fn rekeys(ctx: &Context, relay: Relay, make: Make, lines: &[&str], every: usize, down: u64) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0])?;
    let goes_on = ctx.environment.rekeys();
    let suites: &[Suite] = ctx.environment.scale(&[TLS13_AES_128, TLS13_AES_256, TLS13_CHACHA], &[TLS13_AES_256]);
    for suite in suites {
        let request = Request { digits: true, together: goes_on, ..Request::new(REKEYED_UP_BYTES, down) };
        let command = make(ctx, setup.proxy.address(0), *suite, true)?;
        let feed = Feed::WithCommands { lines, every };
        let Conversation { got, fed } = converse(ctx, command, &request, &feed).with_context(|| suite.name)?;
        let served = setup.upstream.served().with_context(|| format!("{}: {got} bytes came out", suite.name))?;
        ensure!(got == down, "{}: {got} bytes came out, the upstream saw {served:?}", suite.name);
        if goes_on {
            fed.with_context(|| suite.name)?;
            ensure!(served.up == REKEYED_UP_BYTES, "{}: the upstream saw {served:?}", suite.name);
        } else {
            ensure!(served.end == PeerEnd::Reset, "{}: the upstream saw {served:?}", suite.name);
        }
    }
    let metrics = setup.finish(ctx)?;
    if relay.offloads() && goes_on {
        let received = metrics.sum("tlsplice_key_updates_total", &[("direction", "received")]);
        ctx.note(&format!("{received} KeyUpdates received in {} transfers", suites.len()));
        ensure!(received >= suites.len() as u64, "only {received} KeyUpdates were received");
    }
    let unable = metrics.ended("no_rekey");
    ensure!(goes_on || unable == suites.len() as u64, "endings: {}", metrics.endings());
    Ok(())
}

struct Curl<'a> {
    ctx: &'a Context,
    address: SocketAddr,
    version: &'a str,
}

impl Curl<'_> {
    fn run(&self, path: &str, more: &[&str]) -> Result<Vec<u8>> {
        let name = crate::certificate::NAME;
        let Self { ctx, address, version } = self;
        let mut command = program("curl")?;
        command.args([
            "-sS",
            "--fail",
            "--http1.1",
            version,
            "--resolve",
            &format!("{name}:{}:127.0.0.1", address.port()),
        ]);
        if *version == "--tlsv1.2" {
            command.args(["--tls-max", "1.2"]);
        }
        command.arg("--cacert").arg(&ctx.certificates.ecdsa.chain).args(["--max-time", "60"]).args(more);
        command.arg(format!("https://{name}:{}{path}", address.port())).stdin(Stdio::null());
        let output = command.output().context("run curl")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "curl {path}: {}: {}", output.status, complaint.trim());
        Ok(output.stdout)
    }

    fn download(&self, path: &str, bytes: u64) -> Result<()> {
        let body = self.run(path, &[])?;
        ensure!(body.len() as u64 == bytes, "curl {path}: {} of {bytes} bytes", body.len());
        Pattern::down().check(0, &body).with_context(|| format!("curl {path}"))
    }

    fn upload(&self, path: &str, bytes: u64) -> Result<()> {
        let file = self.ctx.environment.tmp.join("upload");
        fs::write(&file, Pattern::up().bytes(usize::try_from(bytes)?))?;
        let file = file.display().to_string();
        let answer = self.run(path, &["-H", "Expect:", "-T", &file])?;
        ensure!(answer == format!("took {bytes}\n").as_bytes(), "curl -T: {:?}", String::from_utf8_lossy(&answer));
        Ok(())
    }
}

const CURL_VERSIONS: [&str; 2] = ["--tlsv1.3", "--tlsv1.2"];

fn curl_with_ours(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, http::serve)?;
    let setup = Setup::with(ctx, relay, &[0, 16_384], upstream, |s| s)?;
    for (index, bytes) in SIZES_BYTES.into_iter().chain([5_000_000]).enumerate() {
        let address = setup.proxy.address(index % 2);
        let curl = Curl { ctx, address, version: CURL_VERSIONS[index / 2 % 2] };
        curl.download(&format!("/bytes/{bytes}"), bytes)?;
        curl.upload("/upload", bytes)?;
        for (up, down) in [(0, bytes), (bytes, format!("took {bytes}\n").len() as u64)] {
            let served = setup.upstream.served()?;
            ensure!(served.up == up && (up > 0 || bytes == 0 || served.down == down), "the upstream saw {served:?}");
        }
    }
    setup.finish(ctx).map(drop)
}

/// A real nginx with files of the pattern, and a way through to a server of ours for uploads.
pub struct Nginx {
    _process: Guarded,
    pub address: SocketAddr,
}

impl Nginx {
    pub fn start(ctx: &Context, behind: &str) -> Result<Self> {
        let address = loopback(free_port()?);
        let folder = ctx.environment.tmp.join(format!("nginx-{}", address.port()));
        fs::create_dir_all(folder.join("root"))?;
        for bytes in SIZES_BYTES {
            fs::write(folder.join("root").join(bytes.to_string()), Pattern::down().bytes(usize::try_from(bytes)?))?;
        }
        let here = folder.display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {here}/{kind};"))
            .concat();
        let text = format!(
            "user root; daemon off; master_process off; pid {here}/pid; error_log {here}/error.log;\nevents {{}}\nhttp {{ access_log off; {temporary}\n\
             client_max_body_size 0; server {{ listen {address}; root {here}/root;\n\
             location /upload {{ proxy_pass http://{behind}; proxy_http_version 1.1; proxy_request_buffering off; }} }} }}\n"
        );
        let config = folder.join("nginx.conf");
        fs::write(&config, text)?;
        let mut command = program("nginx")?;
        command.arg("-e").arg(folder.join("error.log")).arg("-p").arg(&folder).arg("-c").arg(&config);
        let mut process = Guarded::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))?;
        let deadline = Instant::now() + ctx.environment.patience();
        while TcpStream::connect(address).is_err() {
            let log = || fs::read_to_string(folder.join("error.log")).unwrap_or_default();
            ensure!(process.exited()?.is_none(), "nginx has ended: {}", log());
            ensure!(Instant::now() < deadline, "nginx does not listen: {}", log());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self { _process: process, address })
    }
}

fn curl_with_nginx(ctx: &Context, relay: Relay) -> Result<()> {
    let ours = Upstream::serve(&ctx.environment, Kind::V4, http::serve)?;
    let nginx = Nginx::start(ctx, ours.address())?;
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = Setup::with(ctx, relay, &[0, 16_384], upstream, |mut settings| {
        for listener in &mut settings.listeners {
            listener.server = nginx.address.to_string();
        }
        settings
    })?;
    for (index, bytes) in SIZES_BYTES.into_iter().enumerate() {
        let curl = Curl { ctx, address: setup.proxy.address(index % 2), version: CURL_VERSIONS[index / 2 % 2] };
        curl.download(&format!("/{bytes}"), bytes)?;
        curl.upload("/upload", bytes)?;
    }
    setup.finish(ctx).map(drop)
}
