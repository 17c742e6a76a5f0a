//! `tlsplice grade` against differently configured servers of nginx, and the judges from outside against tlsplice.

use super::programs::program;
use crate::authority::{Authority, Issued, Leaf, openssl};
use crate::environment::{Environment, Kernel};
use crate::exchange::Setup;
use crate::process::{Guarded, free_port};
use crate::proxy::loopback;
use crate::run::{Context, Test};
use crate::upstream::{Kind, Upstream};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::fmt::Write as _;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// testssl.sh is a shell script, and takes minutes on a busy machine.
const JUDGES_LIMIT: Duration = Duration::from_secs(1_200);

pub fn tests(env: &Environment) -> Vec<Test> {
    if env.kernel != Kernel::Host {
        // Nothing here depends on the kernel, and the judges are on the machine's own files.
        return Vec::new();
    }
    let mut judged = Test::new(env, "testssl_and_sslyze_give_the_policies_their_grades", judged);
    judged.limit = JUDGES_LIMIT;
    let mut agreed = Test::new(env, "grade_follows_the_guide_on_twelve_servers_of_nginx", twelve);
    agreed.limit = Duration::from_secs(180);
    vec![agreed, judged]
}

const HSTS: &str = "add_header Strict-Transport-Security \"max-age=63072000; includeSubDomains\" always;";
const GOOD: &str = "ssl_protocols TLSv1.2 TLSv1.3; ssl_ciphers ECDHE+AESGCM:@SECLEVEL=0;";

/// One server: its certificate, its lines, and the grade by the guide.
struct Server<'a> {
    chain: &'a Path,
    key: &'a Path,
    lines: String,
    grade: &'a str,
    /// A word of the reason.
    reason: &'a str,
}

struct Nginx {
    _process: Guarded,
    addresses: Vec<SocketAddr>,
}

impl Nginx {
    fn start(ctx: &Context, name: &str, servers: &[(Option<(&Path, &Path)>, String)]) -> Result<Self> {
        let folder = ctx.environment.tmp.join(name);
        fs::create_dir_all(&folder)?;
        let here = folder.display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {here}/{kind};"))
            .concat();
        let mut text = format!(
            "user root; daemon off; master_process off; pid {here}/pid; error_log {here}/error.log;\nevents {{}}\nhttp {{ access_log off; {temporary}\n"
        );
        let mut addresses = Vec::new();
        for (certificate, lines) in servers {
            let address = loopback(free_port()?);
            addresses.push(address);
            let tls = certificate.map_or(String::new(), |(chain, key)| {
                format!("ssl_certificate {}; ssl_certificate_key {};", chain.display(), key.display())
            });
            let ssl = if tls.is_empty() { "" } else { " ssl" };
            let _ =
                writeln!(text, "server {{ listen {address}{ssl}; {tls} {lines} location / {{ return 200 fine; }} }}");
        }
        text.push_str("}\n");
        let (config, libssl) = (folder.join("nginx.conf"), folder.join("openssl.cnf"));
        fs::write(&config, text)?;
        // What is old has to be possible.
        let old = "openssl_conf=d\n[d]\nssl_conf=s\n[s]\nsystem_default=x\n[x]\nCipherString=DEFAULT:@SECLEVEL=0\nMinProtocol=None\n";
        fs::write(&libssl, old)?;
        let mut command = program("nginx")?;
        command.arg("-e").arg(folder.join("error.log")).arg("-p").arg(&folder).arg("-c").arg(&config);
        command.env("OPENSSL_CONF", libssl).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = Guarded::spawn(&mut command)?;
        let deadline = Instant::now() + ctx.environment.patience();
        while addresses.iter().any(|address| TcpStream::connect(address).is_err()) {
            let log = || fs::read_to_string(folder.join("error.log")).unwrap_or_default();
            ensure!(process.exited()?.is_none(), "nginx has ended: {}", log());
            ensure!(Instant::now() < deadline, "nginx does not listen: {}", log());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self { _process: process, addresses })
    }
}

/// `tlsplice grade --json`: exit code and report.
fn grade(ctx: &Context, address: SocketAddr, root: &Path) -> Result<(Option<i32>, Value)> {
    let mut command = Command::new(&ctx.environment.bin);
    command.args(["grade", "--json", "--connect", &address.to_string(), "--sni", crate::certificate::NAME, "--ca"]);
    let output = command.arg(root).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let report = serde_json::from_slice(&output.stdout).with_context(|| said.into_owned())?;
    Ok((output.status.code(), report))
}

fn twelve(ctx: &Context) -> Result<()> {
    let authority = Authority::make(&ctx.environment.tmp.join("graded"))?;
    let issue = |leaf: Leaf<'_>| authority.issue(&Leaf { key: "rsa:2048", ..leaf });
    let good = issue(Leaf { file: "good", ..Leaf::default() })?;
    let sha1 = issue(Leaf { file: "sha1", hash: "-sha1", ..Leaf::default() })?;
    let short = authority.issue(&Leaf { file: "short", key: "rsa:1024", ..Leaf::default() })?;
    let expired = issue(Leaf { file: "expired", days: "0", ..Leaf::default() })?;
    let other = issue(Leaf { file: "other", name: "other.example", ..Leaf::default() })?;
    let itself = self_signed(&authority)?;
    fn server<'a>(of: &'a Issued, lines: &str, grade: &'a str, reason: &'a str) -> Server<'a> {
        Server { chain: &of.chain, key: &of.key, lines: lines.to_owned(), grade, reason }
    }
    let with_hsts = |lines: &str| format!("{lines} {HSTS}");
    let (best, only_12) = (with_hsts(GOOD), "ssl_protocols TLSv1.2; ssl_ciphers ");
    let old = with_hsts("ssl_protocols TLSv1 TLSv1.1 TLSv1.2 TLSv1.3; ssl_ciphers ECDHE+AES:@SECLEVEL=0;");
    let tls12 = |ciphers: &str| with_hsts(&format!("{only_12}{ciphers}:@SECLEVEL=0;"));
    let (no_secrecy, no_aead, no_13) =
        (tls12("AES256-GCM-SHA384:AES128-GCM-SHA256"), tls12("ECDHE-RSA-AES256-SHA"), tls12("ECDHE+AESGCM"));
    let servers = [
        server(&good, &best, "A+", ""),
        server(&good, GOOD, "A", "Strict-Transport-Security"),
        server(&good, &old, "B", "TLS 1.0"),
        server(&good, &no_secrecy, "B", "forward secrecy"),
        Server { chain: &good.leaf, ..server(&good, &best, "T", "the chain ends") },
        server(&sha1, &best, "T", "SHA-1"),
        server(&good, &no_aead, "B", "AEAD"),
        server(&expired, &best, "T", "expired"),
        server(&other, &best, "M", "is not for"),
        server(&short, &best, "B", "RSA 1024"),
        server(&itself, &best, "T", "its root is none"),
        server(&good, &no_13, "A-", "TLS 1.3"),
    ];
    let configured: Vec<_> = servers.iter().map(|s| (Some((s.chain, s.key)), s.lines.clone())).collect();
    let nginx = Nginx::start(ctx, "graded-nginx", &configured)?;
    // The expired one has to have expired.
    std::thread::sleep(Duration::from_secs(1));
    for (server, address) in servers.iter().zip(&nginx.addresses) {
        let (code, report) = grade(ctx, *address, &authority.root)?;
        let what = || format!("{}, {}: {report}", server.chain.display(), server.lines);
        ensure!(report["grade"] == server.grade, "expected {}: {}", server.grade, what());
        ensure!(report["reasons"].to_string().contains(server.reason), "no word of {:?}: {}", server.reason, what());
        ensure!(code == Some(i32::from(server.grade != "A+")), "exit {code:?}: {}", what());
    }
    ctx.note("twelve servers graded as the guide says");
    Ok(())
}

fn self_signed(authority: &Authority) -> Result<Issued> {
    let name = crate::certificate::NAME;
    let (subject, names) = (format!("/CN={name}"), format!("subjectAltName=DNS:{name}"));
    let make =
        ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "90", "-keyout", "self.key", "-out", "self.pem"];
    openssl(&authority.folder, &[&make[..], &["-subj", &subject, "-addext", &names]].concat())?;
    let at = |name: &str| authority.folder.join(name);
    Ok(Issued { leaf: at("self.pem"), chain: at("self.pem"), key: at("self.key") })
}

fn judge(variable: &str) -> Result<PathBuf> {
    let path =
        std::env::var_os(variable).with_context(|| format!("{variable} is not set: cargo xtask test sets it"))?;
    Ok(PathBuf::from(path))
}

/// The checks that testssl.sh wants done before it grades, and no more.
const RATED: [&str; 17] =
    ["-p", "-s", "-f", "-S", "-h", "-H", "-I", "-T", "--robot", "-R", "-C", "-O", "-Z", "-D", "-A", "-4", "-J"];

/// What testssl.sh finds: id, severity and finding of each; without `all`, what it grades by.
fn testssl(ctx: &Context, address: SocketAddr, roots: &Path, all: bool) -> Result<Vec<(String, String, String)>> {
    let report = ctx.environment.tmp.join(format!("testssl-{}.json", address.port()));
    let mut command = Command::new(judge("TLSPLICE_TESTSSL")?);
    command.args(["--quiet", "--color", "0", "--warnings", "off", "--ip", "127.0.0.1", "--add-ca"]).arg(roots);
    if !all {
        command.args(RATED);
    }
    command.arg("--jsonfile").arg(&report).arg(format!("{}:{}", crate::certificate::NAME, address.port()));
    let output = command.stdin(Stdio::null()).output().context("run testssl.sh")?;
    let text = fs::read_to_string(&report).with_context(|| String::from_utf8_lossy(&output.stdout).into_owned())?;
    let findings: Vec<Value> = serde_json::from_str(&text)?;
    let word = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    Ok(findings.iter().map(|one| (word(one, "id"), word(one, "severity"), word(one, "finding"))).collect())
}

/// What the server does not cause: the test's machine, its authority, and what the upstream's answers lack.
const NOT_OURS: [&str; 4] = ["engine_problem", "security_headers", "DNS_CAArecord", "cert_revocation"];

/// A policy before the judges, and what they have to say.
struct Case<'a> {
    mode: &'static str,
    policy: &'a str,
    certificates: Vec<&'a Issued>,
    /// All that testssl.sh has is asked, and its scores count; it takes minutes.
    all: bool,
    mozilla: Option<&'a str>,
}

/// What all cases have in common.
struct Judges {
    /// Of both authorities.
    roots: PathBuf,
    /// Sends HSTS from its first address, and none from its second.
    behind: Nginx,
}

/// tlsplice before an nginx that sends HSTS: what testssl and sslyze say of each policy, and that `grade` agrees.
fn judged(ctx: &Context) -> Result<()> {
    let folder = ctx.environment.tmp.join("judged");
    // Mozilla's modern configuration wants ECDSA all the way up; an RSA leaf is for clients that know nothing else.
    let (by_ecdsa, by_rsa) =
        (Authority::with_key(&folder.join("ecdsa"), "P-384")?, Authority::make(&folder.join("rsa"))?);
    let issue = |by: &Authority, file, key| by.issue(&Leaf { file, key, ..Leaf::default() });
    let (ecdsa, strong) = (issue(&by_ecdsa, "ecdsa", "P-256")?, issue(&by_ecdsa, "strong", "P-384")?);
    let rsa = issue(&by_rsa, "rsa", "rsa:2048")?;
    let roots = folder.join("roots.pem");
    fs::write(&roots, fs::read_to_string(&by_ecdsa.root)? + &fs::read_to_string(&by_rsa.root)?)?;
    // A client that leaves without a close_notify has its upstream until that has nothing more to say.
    const SHORT: &str = "keepalive_timeout 2s; client_header_timeout 2s;";
    let behind = Nginx::start(ctx, "judged-nginx", &[(None, format!("{SHORT} {HSTS}")), (None, SHORT.to_owned())])?;
    let judges = Judges { roots, behind };
    let case = |mode, policy, certificates, all, mozilla| Case { mode, policy, certificates, all, mozilla };
    let both = || vec![&ecdsa, &rsa];
    // The longest first.
    let cases = [
        case("http", "a-plus", both(), true, None),
        case("tcp", "labs-100", vec![&strong], true, None),
        case("tcp", "a-plus", both(), false, Some("intermediate")),
        case("http", "a-plus", vec![&rsa], false, None),
        case("http", "a-plus", vec![&ecdsa], false, None),
        case("tcp", "modern", vec![&ecdsa], false, Some("modern")),
    ];
    // A judge does one thing after the other, so two cases take little more time than one.
    let next = AtomicUsize::new(0);
    let work = || {
        std::iter::from_fn(|| cases.get(next.fetch_add(1, Relaxed))).try_for_each(|case| {
            case.judge(ctx, &judges).with_context(|| format!("{}, mode {}", case.policy, case.mode))
        })
    };
    std::thread::scope(|scope| {
        let beside = scope.spawn(work);
        let here = work();
        beside.join().ok().context("a case panicked")?.and(here)
    })
}

impl Case<'_> {
    fn judge(&self, ctx: &Context, judges: &Judges) -> Result<()> {
        let Self { mode, policy, certificates, all, mozilla } = self;
        let (is_http, roots) = (*mode == "http", &judges.roots);
        let scores = if *policy == "labs-100" { ["100"; 3] } else { ["100", "90", "90"] };
        let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
        let setup = Setup::with(ctx, ctx.environment.relays()[0], &[0], upstream, |mut settings| {
            settings.certificates = certificates.iter().flat_map(|one| [one.chain.clone(), one.key.clone()]).collect();
            settings.listeners[0].mode = mode;
            // HSTS is ours in mode http, and the upstream's in mode tcp.
            settings.listeners[0].server = judges.behind.addresses[usize::from(is_http)].to_string();
            settings.tls(&format!("policy = {policy:?}"))
        })?;
        let address = setup.proxy.address(0);
        let (code, report) = grade(ctx, address, roots)?;
        ensure!(report["grade"] == "A+" && code == Some(0), "{report}");
        let ours = ["protocol_score", "key_exchange_score", "cipher_score"].map(|key| report[key].to_string());
        ensure!(ours == scores, "grade scores {ours:?}");
        if is_http {
            let head = head_of(address, roots)?;
            ensure!(head.contains("\r\nstrict-transport-security: max-age=63072000"), "curl -I: {head}");
        }
        let found = testssl(ctx, address, roots, *all)?;
        let theirs = agrees(&found, scores, *all)?;
        if let Some(mozilla) = mozilla {
            sslyze(roots, address, mozilla)?;
        }
        let keys = certificates.len();
        let sslyze = mozilla.unwrap_or("not asked");
        ctx.note(&format!("{policy}, mode {mode}, {keys} keys: testssl A+ {theirs}, sslyze {sslyze}"));
        let Setup { mut proxy, .. } = setup;
        proxy.settled()?;
        proxy.signal(rustix::process::Signal::TERM)?;
        let status = proxy.wait_exit()?;
        proxy.check_end(status)
    }
}

/// What testssl.sh has found is an A+ with these scores, and nothing above LOW that the server causes. Gives the scores.
fn agrees(found: &[(String, String, String)], scores: [&str; 3], all: bool) -> Result<String> {
    let of = |id: &str| found.iter().find(|(found, _, _)| found == id).map(|(_, _, finding)| finding.as_str());
    ensure!(of("overall_grade") == Some("A+"), "testssl says {:?}", of("overall_grade"));
    let theirs =
        ["protocol_support_score", "key_exchange_score", "cipher_strength_score"].map(|id| of(id).unwrap_or_default());
    ensure!(!all || theirs == scores, "testssl scores {theirs:?}, expected {scores:?}");
    // An id may have the certificate's number behind it.
    let is_of_the_test = |id: &str| id.split(' ').next().is_some_and(|id| NOT_OURS.contains(&id));
    // WARN: a check of testssl.sh that came to no result, as on a busy machine.
    let is_bad = |severity: &str| !matches!(severity, "OK" | "INFO" | "LOW" | "WARN");
    let bad: Vec<_> = found.iter().filter(|(id, severity, _)| is_bad(severity) && !is_of_the_test(id)).collect();
    ensure!(bad.is_empty(), "above LOW: {bad:?}");
    Ok(theirs.join("/"))
}

/// What `curl -I` prints, in lower case.
fn head_of(address: SocketAddr, root: &Path) -> Result<String> {
    let mut command = Command::new("curl");
    command
        .args(["-sI", "--cacert"])
        .arg(root)
        .arg(format!("https://localhost:{}/", address.port()))
        .stdin(Stdio::null());
    let output = command.output().context("run curl")?;
    Ok(String::from_utf8_lossy(&output.stdout).to_lowercase())
}

fn sslyze(root: &Path, address: SocketAddr, mozilla: &str) -> Result<()> {
    let mut command = Command::new(judge("TLSPLICE_SSLYZE")?);
    command.arg("--certinfo_ca_file").arg(root).args(["--mozilla_config", mozilla]);
    // The certificates have this name too.
    command.arg(format!("localhost:{}", address.port())).stdin(Stdio::null());
    let output = command.output().context("run sslyze")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(said.contains("OK - Compliant"), "sslyze --mozilla_config {mozilla}: {said}");
    Ok(())
}
