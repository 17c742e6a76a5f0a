//! Others read what is exposed: Debian's promtool accepts it, its Prometheus scrapes it and answers with the figures that
//! were sent, by the configuration, rules and dashboard that tlsplice ships.

use super::kernel_metrics::{Pins, all_closed, figures};
use crate::counted::{Kind, Server, Truth, client_config, connect, storm};
use crate::environment::Environment;
use crate::process::{Guarded, find_program, free_port};
use crate::proxy::{Proxy, Settings, loopback};
use crate::run::{Context, Test};
use crate::scrape::http_get;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SCRAPE: &str = include_str!("../../../proxy/dist/prometheus.yml");
const RULES: &str = include_str!("../../../proxy/dist/tlsplice.rules.yml");
const DASHBOARD: &str = include_str!("../../../proxy/dist/grafana-dashboard.json");

pub fn tests(env: &Environment) -> Vec<Test> {
    if env.is_guest() || !env.counts_in_kernel() {
        // No image of a guest holds Prometheus; what it reads is the same text.
        return Vec::new();
    }
    vec![
        Test::new(env, "promtool_accepts_metrics_and_rules", promtool),
        Test::new(env, "a_real_prometheus_answers_with_the_figures_that_were_sent", scrape),
        Test::new(env, "top_tells_of_listeners_names_and_connections", top),
    ]
}

/// A tlsplice that has served some, and what it served.
struct Served {
    proxy: Proxy,
    server: Server,
    truth: Arc<Truth>,
    pins: Pins,
}

fn served(ctx: &Context) -> Result<Served> {
    let pins = Pins::mount(ctx)?;
    let truth = Arc::new(Truth::default());
    let server = Server::start(truth.clone())?;
    let relay = ctx.environment.relays()[0];
    let mut settings = Settings::new(ctx, relay)?.listen(50_000, &server.address.to_string())?;
    pins.settings(&mut settings);
    let proxy = Proxy::start(ctx, settings)?;
    let config = client_config(ctx)?;
    storm(4, 100, |_, random| {
        let sizes = (random.range(1, 100_000), random.range(1, 100_000));
        connect(&config, proxy.address(0), &truth, Kind::Clean, sizes)
    })?;
    all_closed(ctx, || proxy.metrics())?;
    Ok(Served { proxy, server, truth, pins })
}

fn program(name: &str) -> Result<PathBuf> {
    find_program(name).with_context(|| format!("{name} is not in PATH: `cargo xtask setup peers` fetches it"))
}

fn promtool(ctx: &Context) -> Result<()> {
    let Served { proxy, pins, .. } = served(ctx)?;
    let (_, scraped) = http_get(proxy.settings.admin, "/metrics")?;
    let output = Command::new(&ctx.environment.bin).args(["metrics", "--pins"]).arg(pins.folder()).output()?;
    for (what, text) in [("/metrics", scraped.as_str()), ("tlsplice metrics", std::str::from_utf8(&output.stdout)?)] {
        let mut check = Command::new(program("promtool")?);
        check.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut check = check.spawn()?;
        check.stdin.take().context("its stdin is a pipe")?.write_all(text.as_bytes())?;
        let output = check.wait_with_output()?;
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "promtool check metrics, of {what}: {}: {said}", output.status);
    }
    ensure!(
        as_openmetrics(proxy.settings.admin)?.ends_with("# EOF\n"),
        "OpenMetrics is not given to those who accept it"
    );
    let rules = ctx.environment.tmp.join("tlsplice.rules.yml");
    fs::write(&rules, RULES)?;
    let output = Command::new(program("promtool")?).args(["check", "rules"]).arg(&rules).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "promtool check rules: {said}{}", String::from_utf8_lossy(&output.stderr));
    let rules = said.lines().find(|line| line.contains("rules found")).unwrap_or_default().trim();
    ctx.note(&format!("metrics accepted; rules: {rules}"));
    proxy.finish(ctx).map(drop)
}

fn as_openmetrics(admin: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect(admin)?;
    write!(stream, "GET /metrics HTTP/1.0\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(
        answer.contains("application/openmetrics-text"),
        "another type: {}",
        answer.lines().take(5).collect::<String>()
    );
    Ok(answer)
}

fn scrape(ctx: &Context) -> Result<()> {
    let Served { proxy, truth, .. } = served(ctx)?;
    let prometheus = Prometheus::start(ctx, proxy.settings.admin)?;
    let sent = truth.client.figures();
    let queries = [
        (r#"sum(tlsplice_connections_opened_total{side="client",source="kernel"})"#, sent[0]),
        (r#"sum(tlsplice_bytes_total{side="client",direction="in"})"#, sent[1]),
        (r#"sum(tlsplice_bytes_total{side="client",direction="out"})"#, sent[2]),
        (r#"sum(tlsplice_bytes_total{side="upstream",direction="out"})"#, truth.upstream.figures()[2]),
        (r#"sum(tlsplice_handshakes_total{result="ok"})"#, sent[0]),
    ];
    let deadline = Instant::now() + ctx.environment.patience() + Duration::from_secs(20);
    for (query, wanted) in queries {
        loop {
            let found = prometheus.query(query)?;
            let value = found.pointer("/data/result/0/value/1").and_then(Value::as_str).unwrap_or("nothing").to_owned();
            if value == wanted.to_string() {
                break;
            }
            ensure!(Instant::now() < deadline, "{query}: Prometheus says {value}, {wanted} were sent");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    let dashboard: Value = serde_json::from_str(DASHBOARD).context("the dashboard is no JSON")?;
    let panels = dashboard["panels"].as_array().context("the dashboard has no panels")?;
    // A rate takes two scrapes, and what nobody did has none.
    let (asked, answered) = loop {
        let (asked, answered) = dashboard_answers(&prometheus, panels)?;
        if answered * 2 > asked {
            break (asked, answered);
        }
        ensure!(Instant::now() < deadline, "of {asked} queries of the dashboard {answered} have an answer");
        std::thread::sleep(Duration::from_millis(500));
    };
    let (status, rules) = http_get(prometheus.address, "/api/v1/rules")?;
    let rules: Value = serde_json::from_str(&rules)?;
    let loaded = rules.pointer("/data/groups/0/rules").and_then(Value::as_array).map_or(0, Vec::len);
    ensure!(status == 200 && loaded > 0, "the rules are not loaded: {rules}");
    ctx.note(&format!(
        "{} figures as sent; {loaded} rules loaded; the dashboard's {asked} queries run, {answered} with an answer",
        queries.len()
    ));
    // Its connection to the admin endpoint would be taken for a leak.
    drop(prometheus);
    proxy.finish(ctx).map(drop)
}

/// How many queries the panels have, and how many of them have an answer.
fn dashboard_answers(prometheus: &Prometheus, panels: &[Value]) -> Result<(usize, usize)> {
    let (mut asked, mut answered) = (0, 0);
    for target in panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten()) {
        let expression = target["expr"].as_str().context("a target without a query")?;
        let query = expression.replace("$__rate_interval", "1m").replace("$instance", ".*");
        let found = prometheus.query(&query)?;
        let rows = found.pointer("/data/result").and_then(Value::as_array).map_or(0, Vec::len);
        asked += 1;
        answered += usize::from(rows > 0);
    }
    Ok((asked, answered))
}

struct Prometheus {
    address: SocketAddr,
    _process: Guarded,
}

impl Prometheus {
    /// By the configuration that is shipped, pointed at this tlsplice and told to hurry.
    fn start(ctx: &Context, admin: SocketAddr) -> Result<Self> {
        // What an earlier try has scraped would be counted too.
        let folder = ctx.folder("prometheus")?;
        let config = SCRAPE.replace("127.0.0.1:9145", &admin.to_string()).replace("interval: 15s", "interval: 1s");
        fs::write(folder.join("prometheus.yml"), config)?;
        fs::write(folder.join("tlsplice.rules.yml"), RULES)?;
        let address = loopback(free_port()?);
        let log = fs::File::create(folder.join("log"))?;
        let process = Guarded::spawn(
            Command::new(program("prometheus")?)
                .arg(format!("--config.file={}", folder.join("prometheus.yml").display()))
                .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
                .arg(format!("--web.listen-address={address}"))
                .stdout(Stdio::null())
                .stderr(log),
        )?;
        let deadline = Instant::now() + ctx.environment.patience() + Duration::from_secs(20);
        while !http_get(address, "/-/ready").is_ok_and(|(status, _)| status == 200) {
            if Instant::now() > deadline {
                bail!("Prometheus is not ready: {}", crate::run::tail(&folder.join("log")));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(Self { address, _process: process })
    }

    fn query(&self, query: &str) -> Result<Value> {
        let mut path = String::from("/api/v1/query?query=");
        for byte in query.bytes() {
            if byte.is_ascii_alphanumeric() {
                path.push(char::from(byte));
            } else {
                write!(path, "%{byte:02X}")?;
            }
        }
        let (status, body) = http_get(self.address, &path)?;
        ensure!(status == 200, "{query}: status {status}: {body}");
        Ok(serde_json::from_str(&body)?)
    }
}

fn top(ctx: &Context) -> Result<()> {
    let Served { proxy, server, truth, pins } = served(ctx)?;
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(crate::client::Client::connect(
            ctx,
            proxy.address(0),
            &crate::client::handshake::Offer::new(ctx, crate::client::handshake::TLS13_AES_256)?,
        )?);
    }
    proxy.wait_for("three to be open", |m| m.sum("tlsplice_connections_live", &[("side", "upstream")]) == 3)?;
    let ask = |admin: Option<SocketAddr>| -> Result<String> {
        let mut command = Command::new(&ctx.environment.bin);
        command.args(["top", "--once", "--config", "/no/such/file", "--pins"]).arg(pins.folder());
        if let Some(admin) = admin {
            command.args(["--admin", &admin.to_string()]);
        }
        let output = command.output()?;
        ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let said = ask(Some(proxy.settings.admin))?;
    let line = |text: &str| said.lines().find(|l| l.contains(text)).map(str::to_owned).with_context(|| said.clone());
    let listener = line(&format!("client    {}", proxy.address(0)))?;
    ensure!(listener.split_whitespace().nth(2) == Some("3"), "not three live: {listener}");
    line(&server.address.to_string())?;
    line(crate::certificate::NAME)?;
    let connections = said.lines().filter(|l| l.contains("A256-GCM")).count();
    ensure!(connections == 3, "{connections} connections are told: {said}");
    ensure!(ask(None)?.contains("--admin"), "without an admin endpoint it does not say what is missing");
    // The file's truth is the load's; these three are beyond it.
    ensure!(figures(&proxy.metrics()?, "client")[0] == truth.client.figures()[0] + 3, "other connections were counted");
    drop(open);
    proxy.finish(ctx).map(drop)
}
