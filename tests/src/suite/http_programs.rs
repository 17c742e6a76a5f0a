//! Mode http between programs of others: nginx behind, curl, wrk and h2load in front; WebSockets of Python on both sides.

use super::real_clients::Nginx;
use crate::client::How;
use crate::environment::{Environment, Relay};
use crate::exchange::Setup;
use crate::process::find_program;
use crate::run::{Context, Test};
use crate::talk::{connect, setup_with};
use crate::upstream::{Kind, Upstream};
use anyhow::{Context as _, Result, ensure};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub fn tests(env: &Environment) -> Vec<Test> {
    // The guests' images hold neither wrk nor h2load.
    if env.is_guest() {
        return Vec::new();
    }
    let mut tests = Vec::new();
    tests.extend(Test::one_relay(env, "http_nginx_behind_and_curl_wrk_h2load_in_front", programs));
    tests.extend(Test::one_relay(env, "http_websockets_of_python_talk_through_it", websockets));
    tests
}

fn run(program: &str, args: &[&str]) -> Result<String> {
    let program = find_program(program).with_context(|| format!("no {program} on this machine"))?;
    let output = Command::new(&program).args(args).stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}: {complaint}{text}", program.display(), output.status);
    Ok(text)
}

fn programs(ctx: &Context, relay: Relay) -> Result<()> {
    let ours = Upstream::serve(&ctx.environment, Kind::V4, crate::http::serve)?;
    let nginx = Nginx::start(ctx, ours.address())?;
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = setup_with(ctx, relay, &[0, 100_000], upstream, |mut settings| {
        settings.listeners.iter_mut().for_each(|listener| listener.server = nginx.address.to_string());
        settings
    })?;
    for listener in 0..2 {
        let url = |path: &str| format!("https://{}/{path}", setup.proxy.address(listener));
        let head = run("curl", &["-skI", "--max-time", "20", &url("16385")])?;
        ensure!(head.contains("Strict-Transport-Security: max-age=63072000; includeSubDomains"), "curl -I: {head}");
        let size = ["-sk", "--max-time", "60", "-o", "/dev/null", "-w", "%{size_download}"];
        let got = run("curl", &[&size[..], &["-r", "5-104", &url("1048576")]].concat())?;
        ensure!(got == "100", "curl -r: {got}");
        let got = run("curl", &[&size[..], &[url("1048576").as_str()]].concat())?;
        ensure!(got == "1048576", "curl: {got}");
        load(ctx, &setup, &url("16385"))?;
    }
    strange(ctx, &setup)?;
    setup.finish(ctx).map(drop)
}

fn load(ctx: &Context, setup: &Setup, url: &str) -> Result<()> {
    let requests = |setup: &Setup| -> Result<u64> {
        Ok(setup.proxy.metrics()?.sum("tlsplice_http_requests_total", &[("status", "2xx")]))
    };
    let before = requests(setup)?;
    let text = run("h2load", &["--h1", "-n", "2000", "-c", "20", "-m", "5", url])?;
    ensure!(text.contains("2000 succeeded, 0 failed, 0 errored, 0 timeout"), "h2load: {text}");
    // A request is counted once its response has been handed on, so the last ones after their client has ended; and a
    // wrk before it may have left some.
    let deadline = Instant::now() + Duration::from_secs(10);
    while requests(setup)? < before + 2000 {
        ensure!(Instant::now() < deadline, "h2load's requests are not counted");
        std::thread::sleep(Duration::from_millis(20));
    }
    let text = run("wrk", &["-t", "1", "-c", "20", "-d", "2s", url])?;
    ensure!(!text.contains("Socket errors") && !text.contains("Non-2xx"), "wrk: {text}");
    let rate = text.lines().find(|line| line.contains("Requests/sec")).context("wrk says no rate")?;
    ctx.note(&format!("wrk: {}", rate.trim()));
    Ok(())
}

/// nginx' own answers to what it refuses come through as they are.
fn strange(ctx: &Context, setup: &Setup) -> Result<()> {
    let mut client = connect(ctx, setup, 0)?;
    client.send(b"GET /nothing HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
    let (got, how) = client.rest()?;
    ensure!(
        got.starts_with("HTTP/1.1 404 Not Found\r\n") && got.contains("nginx") && how == How::CloseNotify,
        "{got:?}"
    );
    Ok(())
}

/// An echoing server, and a client that compares: its words are the port that each of them uses.
const WEBSOCKETS: &str = "
import asyncio, os, ssl, sys, websockets
async def echo(socket):
    async for message in socket:
        await socket.send(message)
async def talk(port):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with websockets.connect(f'wss://127.0.0.1:{port}/chat?x', ssl=context, max_size=None) as socket:
        for size in [0, 1, 125, 126, 65535, 65536, 3000001]:
            sent = os.urandom(size)
            await socket.send(sent)
            assert await socket.recv() == sent, size
        await asyncio.wait_for(await socket.ping(), 20)
    assert socket.close_code == 1000, socket.close_code
async def main(behind, ports):
    async with websockets.serve(echo, '127.0.0.1', behind, max_size=None):
        for port in ports * 3:
            await talk(port)
asyncio.run(main(int(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
print('done')
";

fn websockets(ctx: &Context, relay: Relay) -> Result<()> {
    let behind = crate::process::free_port()?;
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = setup_with(ctx, relay, &[0, 100_000], upstream, |mut settings| {
        settings.listeners.iter_mut().for_each(|listener| listener.server = format!("127.0.0.1:{behind}"));
        settings
    })?;
    // Debian's own Python, which has its packages.
    let ports = [behind, setup.proxy.address(0).port(), setup.proxy.address(1).port()].map(|port| port.to_string());
    let output =
        Command::new("/usr/bin/python3").args(["-c", WEBSOCKETS]).args(&ports).stdin(Stdio::null()).output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && output.stdout == b"done\n", "python: {}: {complaint}", output.status);
    let metrics = setup.finish(ctx)?;
    let switched = metrics.sum("tlsplice_http_requests_total", &[("status", "1xx")]);
    ensure!(switched == 6 && metrics.ended("clean") == 6, "{switched} upgrades, endings: {}", metrics.endings());
    Ok(())
}
