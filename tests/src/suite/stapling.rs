//! Staples from a real responder (`openssl ocsp`): good, responder down, expiry, revocation, and good again.

use super::programs::program;
use crate::authority::{Authority, Issued, Leaf, openssl};
use crate::environment::{Environment, Kernel};
use crate::exchange::Setup;
use crate::run::{Context, Test};
use crate::upstream::Upstream;
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

pub fn tests(env: &Environment) -> Vec<Test> {
    if env.kernel != Kernel::Host {
        // Nothing here depends on the kernel, and most of it is waiting.
        return Vec::new();
    }
    let mut test = Test::new(env, "staples_follow_a_real_responder_through_expiry_and_revocation", staples);
    // `openssl ocsp` knows no answer that lasts less than a minute.
    test.limit = Duration::from_secs(200);
    vec![test]
}

const VALID: Duration = Duration::from_secs(60);

/// `openssl ocsp` answers each question; its own server would listen on every address, so the HTTP is ours.
struct Responder<'a> {
    authority: &'a Authority,
    listener: TcpListener,
    is_up: AtomicBool,
    over: AtomicBool,
}

impl Responder<'_> {
    /// Every serial is good, or revoked.
    fn index(&self, leaves: &[&Issued], revoked: bool) -> Result<()> {
        let folder = &self.authority.folder;
        let mut index = String::new();
        for issued in leaves {
            let leaf = issued.leaf.display().to_string();
            let serial = openssl(folder, &["x509", "-in", &leaf, "-noout", "-serial"])?;
            let serial = String::from_utf8(serial)?;
            let serial = serial.trim().trim_start_matches("serial=");
            let (state, when) = if revoked { ("R", "260101000000Z") } else { ("V", "") };
            index.push_str(&format!("{state}\t400101000000Z\t{when}\t{serial}\tunknown\t/CN={serial}\n"));
        }
        fs::write(folder.join("index.txt"), index)?;
        Ok(())
    }

    fn serve(&self) -> Result<()> {
        for client in self.listener.incoming() {
            let client = client?;
            if self.over.load(Relaxed) {
                return Ok(());
            }
            if self.is_up.load(Relaxed) {
                self.answer(client)?;
            }
        }
        Ok(())
    }

    fn answer(&self, mut client: TcpStream) -> Result<()> {
        client.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut reader = BufReader::new(client.try_clone()?);
        let (mut line, mut length) = (String::new(), 0);
        while reader.read_line(&mut line)? > 2 {
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
            line.clear();
        }
        let mut request = vec![0; length];
        reader.read_exact(&mut request)?;
        let folder = &self.authority.folder;
        fs::write(folder.join("request.der"), request)?;
        let signer =
            ["-CA", "intermediate.pem", "-rsigner", "intermediate.pem", "-rkey", "intermediate.key", "-nmin", "1"];
        let files = ["ocsp", "-index", "index.txt", "-reqin", "request.der", "-respout", "response.der"];
        openssl(folder, &[&files[..], &signer].concat())?;
        let answer = fs::read(folder.join("response.der"))?;
        let length = answer.len();
        write!(
            client,
            "HTTP/1.1 200 OK\r\nContent-Type: application/ocsp-response\r\nContent-Length: {length}\r\n\r\n"
        )?;
        client.write_all(&answer)?;
        Ok(())
    }

    fn end(&self) -> Result<()> {
        self.over.store(true, Relaxed);
        TcpStream::connect(self.listener.local_addr()?).map(drop).context("wake the responder")
    }
}

/// What `openssl s_client -status` says.
fn status(authority: &Authority, address: SocketAddr, signatures: &str) -> Result<String> {
    let mut command = program("openssl")?;
    command.args(["s_client", "-status", "-connect", &address.to_string(), "-servername", crate::certificate::NAME]);
    command.args(["-sigalgs", signatures, "-verify_return_error", "-CAfile"]).arg(&authority.root);
    let output = command.stdin(Stdio::null()).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

const KINDS: [&str; 2] = ["ECDSA+SHA256", "RSA-PSS+SHA256"];

fn is_good(said: &str) -> bool {
    said.contains("OCSP Response Status: successful") && said.contains("Cert Status: good")
}

fn staples(ctx: &Context) -> Result<()> {
    let authority = Authority::make(&ctx.environment.tmp.join("stapled"))?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let responder = Responder { authority: &authority, listener, is_up: true.into(), over: false.into() };
    thread::scope(|scope| {
        let serving = scope.spawn(|| responder.serve());
        let followed = follow(ctx, &responder);
        responder.end()?;
        let served = serving.join().ok().context("the responder panicked")?;
        followed.and(served)
    })
}

fn follow(ctx: &Context, responder: &Responder<'_>) -> Result<()> {
    let authority = responder.authority;
    let extensions =
        format!("authorityInfoAccess=OCSP;URI:http://127.0.0.1:{}/\n", responder.listener.local_addr()?.port());
    let leaf = |file, key| authority.issue(&Leaf { file, key, extensions: &extensions, ..Leaf::default() });
    let (ecdsa, rsa) = (leaf("ecdsa", "P-256")?, leaf("rsa", "rsa:2048")?);
    let leaves = [&ecdsa, &rsa];
    responder.index(&leaves, false)?;
    let began = Instant::now();
    let upstream = Upstream::closing(&ctx.environment)?;
    let setup = Setup::with(ctx, ctx.environment.relays()[0], &[0], upstream, |mut settings| {
        settings.certificates = leaves.iter().flat_map(|one| [one.chain.clone(), one.key.clone()]).collect();
        settings.tls("poll = \"200ms\"")
    })?;
    let address = setup.proxy.address(0);
    let until = |what: &str, limit: Duration, is: &dyn Fn(&str) -> bool| -> Result<()> {
        for kind in KINDS {
            let deadline = Instant::now() + limit;
            loop {
                let said = status(authority, address, kind)?;
                if is(&said) {
                    break;
                }
                ensure!(Instant::now() < deadline, "{kind}: waited in vain until {what}: {}", setup.proxy.log_tail());
                thread::sleep(Duration::from_millis(300));
            }
        }
        Ok(())
    };
    let patience = ctx.environment.patience();
    until("both are stapled", patience, &is_good)?;
    for one in leaves {
        let kept = one.chain.with_extension("chain.ocsp");
        ensure!(kept.exists(), "{} is not kept for the fleet", kept.display());
    }
    responder.is_up.store(false, Relaxed);
    ensure!(
        KINDS.iter().all(|kind| status(authority, address, kind).is_ok_and(|said| is_good(&said))),
        "lost with the responder"
    );
    until("the expired ones are gone", VALID + patience, &|said| said.contains("no response sent"))?;
    let expired = began.elapsed();
    ensure!(expired <= VALID + Duration::from_secs(5), "an expired staple was sent until {expired:?}");
    responder.index(&leaves, true)?;
    responder.is_up.store(true, Relaxed);
    let deadline = Instant::now() + patience;
    while !setup.proxy.log().contains("REVOKED") {
        ensure!(Instant::now() < deadline, "nothing is said of the revocation: {}", setup.proxy.log_tail());
        thread::sleep(Duration::from_millis(100));
    }
    ensure!(
        KINDS.iter().all(|kind| status(authority, address, kind).is_ok_and(|said| !is_good(&said))),
        "stapled though revoked"
    );
    responder.index(&leaves, false)?;
    until("they are good again", patience * 2, &is_good)?;
    ctx.note(&format!(
        "ECDSA and RSA stapled, gone {} s after the answer, refused when revoked, back again, and off by a reload",
        expired.as_secs()
    ));
    let Setup { mut proxy, .. } = setup;
    proxy.reload(proxy.settings.clone().tls("ocsp = \"off\""))?;
    let deadline = Instant::now() + patience;
    for kind in KINDS {
        while !status(authority, address, kind)?.contains("no response sent") {
            ensure!(Instant::now() < deadline, "{kind}: stapled though a reload wants none: {}", proxy.log_tail());
            thread::sleep(Duration::from_millis(100));
        }
    }
    proxy.settled()?;
    proxy.signal(rustix::process::Signal::TERM)?;
    let status = proxy.wait_exit().context("end")?;
    proxy.check_end(status)
}
