//! Staples from a real responder (`openssl ocsp`): good, responder down, expiry, revocation, and good again. And from
//! responders that never answer, or say the same again and again, with answers whose times are of our choice.

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
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub fn tests(env: &Environment) -> Vec<Test> {
    if env.kernel != Kernel::Host {
        // Nothing here depends on the kernel, and most of it is waiting.
        return Vec::new();
    }
    let mut test = Test::new(env, "staples_follow_a_real_responder_through_expiry_and_revocation", staples);
    // `openssl ocsp` knows no answer that lasts less than a minute.
    test.limit = Duration::from_secs(200);
    vec![
        test,
        Test::new(env, "an_expired_staple_is_not_sent_though_its_responders_hang", hanging),
        Test::new(env, "a_responder_that_repeats_itself_is_asked_seldom_and_its_older_answer_replaces_none", repeating),
    ]
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

    fn answer(&self, client: TcpStream) -> Result<()> {
        let request = read_question(&client)?;
        let folder = &self.authority.folder;
        fs::write(folder.join("request.der"), request)?;
        let signer =
            ["-CA", "intermediate.pem", "-rsigner", "intermediate.pem", "-rkey", "intermediate.key", "-nmin", "1"];
        let files = ["ocsp", "-index", "index.txt", "-reqin", "request.der", "-respout", "response.der"];
        openssl(folder, &[&files[..], &signer].concat())?;
        write_answer(client, &fs::read(folder.join("response.der"))?)
    }

    fn end(&self) -> Result<()> {
        self.over.store(true, Relaxed);
        TcpStream::connect(self.listener.local_addr()?).map(drop).context("wake the responder")
    }
}

fn read_question(client: &TcpStream) -> Result<Vec<u8>> {
    client.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut reader = BufReader::new(client);
    let (mut line, mut length) = (String::new(), 0);
    while reader.read_line(&mut line)? > 2 {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        line.clear();
    }
    let mut request = vec![0; length];
    reader.read_exact(&mut request)?;
    Ok(request)
}

fn write_answer(mut client: TcpStream, answer: &[u8]) -> Result<()> {
    let length = answer.len();
    write!(client, "HTTP/1.1 200 OK\r\nContent-Type: application/ocsp-response\r\nContent-Length: {length}\r\n\r\n")?;
    client.write_all(answer)?;
    Ok(())
}

/// What `openssl s_client -status` says.
fn status(authority: &Authority, address: SocketAddr, signatures: &str) -> Result<String> {
    status_of(authority, address, crate::certificate::NAME, signatures)
}

fn status_of(authority: &Authority, address: SocketAddr, name: &str, signatures: &str) -> Result<String> {
    let mut command = program("openssl")?;
    command.args(["s_client", "-status", "-connect", &address.to_string(), "-servername", name]);
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
        let kept = beside(&one.chain);
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
    setup.proxy.log_with("REVOKED")?;
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

fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    let [.., high, low] = body.len().to_be_bytes();
    match (high, low) {
        (0, 0..=0x7f) => [&[tag, low], &body[..]].concat(),
        (0, 0x80..) => [&[tag, 0x81, low], &body[..]].concat(),
        (1.., _) => [&[tag, 0x82, high, low], &body[..]].concat(),
    }
}

/// `YYYYMMDDHHMMSSZ`.
fn time(from_now: i64) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let time = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(now.as_secs().saturating_add_signed(from_now));
    let date = format!("{:04}{:02}{:02}", time.year(), u8::from(time.month()), time.day());
    let text = format!("{date}{:02}{:02}{:02}Z", time.hour(), time.minute(), time.second());
    der(0x18, &[text.as_bytes()])
}

/// That the leaf is good from the one time to the other, in seconds from now (RFC 6960 section 4.2.1).
fn answer(authority: &Authority, issued: &Issued, [from, to]: [i64; 2]) -> Result<Vec<u8>> {
    const SHA256_RSA: &[u8] = &[0x30, 13, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 11, 5, 0];
    const BASIC: &[u8] = &[6, 9, 0x2b, 6, 1, 5, 5, 7, 0x30, 1, 1];
    const BY_KEY: &[u8] = &[0xa2, 3, 4, 1, 0];
    let folder = &authority.folder;
    let (leaf, question) = (issued.leaf.display().to_string(), folder.join("question.der"));
    let arguments = ["ocsp", "-issuer", "intermediate.pem", "-cert", &leaf, "-no_nonce", "-reqout", "question.der"];
    openssl(folder, &arguments)?;
    // Four sequences, each with a length of one byte, around the certificate's id.
    let id = fs::read(question)?.split_off(8);
    let single = der(0x30, &[&id, &[0x80, 0], &time(from), &der(0xa0, &[&time(to)])]);
    let data = der(0x30, &[BY_KEY, &time(from), &der(0x30, &[&single])]);
    fs::write(folder.join("data.der"), &data)?;
    let signature = openssl(folder, &["dgst", "-sha256", "-sign", "intermediate.key", "data.der"])?;
    let basic = der(0x30, &[&data, SHA256_RSA, &der(3, &[&[0], &signature])]);
    let bytes = der(0x30, &[BASIC, &der(4, &[&basic])]);
    Ok(der(0x30, &[&[0x0a, 1, 0], &der(0xa0, &[&bytes])]))
}

fn beside(chain: &Path) -> PathBuf {
    chain.with_extension("chain.ocsp")
}

/// A tlsplice whose certificates have this responder.
fn serving(ctx: &Context, leaves: &[Issued]) -> Result<Setup> {
    let upstream = Upstream::closing(&ctx.environment)?;
    Setup::with(ctx, ctx.environment.relays()[0], &[0], upstream, |mut settings| {
        settings.certificates = leaves.iter().flat_map(|one| [one.chain.clone(), one.key.clone()]).collect();
        settings.tls("poll = \"200ms\"")
    })
}

fn responder_line(listener: &TcpListener) -> Result<String> {
    Ok(format!("authorityInfoAccess=OCSP;URI:http://127.0.0.1:{}/\n", listener.local_addr()?.port()))
}

/// Longer than the start takes, shorter than one question may.
const STAPLE_LIFE_S: i64 = 6;
const HANGING: [&str; 3] = ["a.example", "b.example", "c.example"];

/// Nobody accepts: the kernel does, and nothing more comes.
fn hanging(ctx: &Context) -> Result<()> {
    let authority = Authority::make(&ctx.folder("hanging")?)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let extensions = responder_line(&listener)?;
    let issue = |name| authority.issue(&Leaf { file: name, name, extensions: &extensions, ..Leaf::default() });
    let leaves: Vec<Issued> = HANGING.into_iter().map(issue).collect::<Result<_>>()?;
    let life = Duration::from_secs(STAPLE_LIFE_S as u64);
    let until = Instant::now() + life;
    for one in &leaves {
        fs::write(beside(&one.chain), answer(&authority, one, [-60, STAPLE_LIFE_S])?)?;
    }
    let setup = serving(ctx, &leaves)?;
    let address = setup.proxy.address(0);
    let good = |name: &str| status_of(&authority, address, name, KINDS[0]).map(|said| is_good(&said));
    for name in HANGING {
        ensure!(good(name)?, "{name}: not stapled from its file: {}", setup.proxy.log_tail());
    }
    // Times are whole seconds, and the last of these answers is a little younger than the first.
    thread::sleep((until + Duration::from_secs(1)).saturating_duration_since(Instant::now()));
    for name in HANGING {
        ensure!(!good(name)?, "{name}: an expired staple is sent: {}", setup.proxy.log_tail());
    }
    ensure!(!setup.proxy.log().contains("no fresh staple"), "the responders have not hung so long");
    // A reload reads the files again.
    let Setup { mut proxy, .. } = setup;
    proxy.reload(proxy.settings.clone().tls("strict_sni = true"))?;
    proxy.log_with("\"reloaded\"")?;
    for name in HANGING {
        let said = status_of(&authority, address, name, KINDS[0])?;
        ensure!(!is_good(&said), "{name}: a reload has taken an expired staple");
    }
    proxy.signal(rustix::process::Signal::TERM)?;
    let status = proxy.wait_exit()?;
    proxy.check_end(status)
}

/// As long as 25 polls. What fails is asked again after 6, 12 and 24 of them, a fifth sooner or later.
const REPEATED_FOR: Duration = Duration::from_secs(5);
const QUESTIONS_MAX: usize = 3;

fn repeating(ctx: &Context) -> Result<()> {
    let authority = Authority::make(&ctx.folder("repeating")?)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let extensions = responder_line(&listener)?;
    let issued = authority.issue(&Leaf { extensions: &extensions, ..Leaf::default() })?;
    let (older, held) = (answer(&authority, &issued, [-900, 300])?, answer(&authority, &issued, [-900, 600])?);
    fs::write(beside(&issued.chain), &held)?;
    let (asked, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let repeats = scope.spawn(|| {
            for client in listener.incoming() {
                if over.load(Relaxed) {
                    return Ok(());
                }
                asked.fetch_add(1, Relaxed);
                let client = client?;
                read_question(&client)?;
                write_answer(client, &older)?;
            }
            anyhow::Ok(())
        });
        let leaves = [issued.clone()];
        let kept = serving(ctx, &leaves).and_then(|setup| {
            thread::sleep(REPEATED_FOR);
            let said = status(&authority, setup.proxy.address(0), KINDS[0])?;
            let log = setup.proxy.log();
            super::certificates::end(setup)?;
            Ok((said, log))
        });
        over.store(true, Relaxed);
        TcpStream::connect(listener.local_addr()?)?;
        repeats.join().ok().context("the responder panicked")??;
        let (said, log) = kept?;
        let asked = asked.load(Relaxed);
        ctx.note(&format!("asked {asked} times in {} s at a poll of 200 ms", REPEATED_FOR.as_secs()));
        ensure!((1..=QUESTIONS_MAX).contains(&asked), "asked {asked} times");
        ensure!(fs::read(beside(&issued.chain))? == held, "the older answer has replaced the file");
        ensure!(is_good(&said) && !log.contains("ocsp: a fresh staple"), "{log}");
        let complaints = log.matches("ocsp: no fresh staple").count();
        ensure!(complaints == 1, "said {complaints} times that nothing newer came");
        Ok(())
    })
}
