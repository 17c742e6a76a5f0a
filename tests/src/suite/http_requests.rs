//! Mode http, request by request: what is passed on, connections that are kept, half-closes, upgrades, timeouts, the log.

use crate::client::How;
use crate::environment::{Environment, Relay};
use crate::exchange::Setup;
use crate::proxy::{Proxy, Settings, loopback};
use crate::run::{Context, Test};
use crate::talk::{connect, connect_with_alpn, echo, heard, heard_to_end, manual, setup, setup_with};
use crate::upstream::{Kind, PeerEnd, Upstream};
use anyhow::{Result, ensure};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |name, run| tests.extend(Test::some_guests(env, name, run));
    add("http_a_request_and_its_response_are_written_anew", written_anew);
    add("http_pipelined_requests_are_answered_in_order_on_kept_connections", pipelined);
    add("http_a_client_that_half_closes_gets_the_whole_answer", half_close);
    add("http_an_expected_100_and_a_late_body", expect_continue);
    add("http_trailers_of_one_connection_are_dropped", trailers);
    add("http_no_body_behind_head_204_and_304", no_body);
    add("http_an_old_client_gets_no_chunks", old_client);
    add("http_an_upgrade_becomes_a_tunnel_with_half_closes", upgrade);
    add("http_a_request_cut_short_resets_the_upstream", cut_short);
    add("http_a_kept_connection_that_the_upstream_closed_is_not_noticed", stale);
    add("http_502_504_and_408_have_an_id_that_the_log_has", our_answers);
    add("http_a_drain_ends_idle_connections_and_finishes_requests", drain);
    add("http_an_early_response_ends_an_upload", early_response);
    tests.push(Test::new(env, "redirect_answers_308_and_serves_challenges", redirect));
    tests
}

const GET: &str = "GET /x?secret=1 HTTP/1.1\r\nHost: a.org\r\n";

fn written_anew(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = setup_with(ctx, relay, &[0, 1 << 20], upstream, |mut settings| {
        settings.log.push("client_address = \"truncated\"".into());
        settings
    })?;
    for listener in 0..2 {
        let mut client = connect(ctx, &setup, listener)?;
        client.send(
            format!("{GET}Cookie: secret=2\r\nX-Forwarded-For: 9.9.9.9\r\nConnection: x-hop\r\nX-Hop: 1\r\n\r\n")
                .as_bytes(),
        )?;
        let stream = setup.upstream.accept()?;
        let head = heard(&stream, "\r\n\r\n")?;
        let expected = "GET /x?secret=1 HTTP/1.1\r\nHost: a.org\r\nCookie: secret=2\r\nX-Forwarded-For: 127.0.0.1\r\n\
                        X-Forwarded-Proto: https\r\nX-Forwarded-Host: a.org\r\nForwarded: for=127.0.0.1;proto=https;host=\"a.org\"\r\n\
                        Via: 1.1 tlsplice\r\n\r\n";
        ensure!(head == expected, "the upstream got {head:?}");
        stream.send(b"HTTP/1.1 200 Fine\r\nKeep-Alive: timeout=5\r\nStrict-Transport-Security: max-age=1\r\nDate: today\r\nContent-Length: 2\r\n\r\nok")?;
        let got = client.until("ok")?;
        let expected = "HTTP/1.1 200 Fine\r\nDate: today\r\nStrict-Transport-Security: max-age=63072000; includeSubDomains\r\n\
                        Content-Length: 2\r\n\r\nok";
        ensure!(got == expected, "the client got {got:?}");
        client.finish()?;
    }
    let alpn = connect_with_alpn(ctx, &setup, &["h2", "http/1.1"])?;
    ensure!(alpn.as_deref() == Some("http/1.1"), "ALPN chose {alpn:?}");
    let request = "\"message\":\"request\"";
    let log = setup.proxy.log_with(request)?;
    let line = log.lines().find(|line| line.contains(request)).expect("it was just there");
    let line: serde_json::Value = serde_json::from_str(line)?;
    ensure!(line["path"] == "/x" && line["status"] == 200 && line["peer"] == "127.0.0.0", "{line}");
    ensure!(!log.contains("secret") && !log.contains("\"peer\":\"127.0.0.1"), "the log tells too much: {log}");
    setup.finish(ctx).map(drop)
}

fn pipelined(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = setup(ctx, relay, &[0, 3_000], Upstream::serve(&ctx.environment, Kind::Unix, echo)?)?;
    for listener in 0..2 {
        let mut client = connect(ctx, &setup, listener)?;
        let mut all = String::new();
        for n in 0..100 {
            all += &format!("PUT /{n} HTTP/1.1\r\nHost: a\r\nContent-Length: {n}\r\n\r\n{}", "b".repeat(n));
        }
        client.send(all.as_bytes())?;
        for n in 0..100 {
            let head = client.until("\r\n\r\n")?;
            ensure!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head:?}");
            let echoed = client.until("\r\n\r\n")?;
            ensure!(echoed.starts_with(&format!("PUT /{n} HTTP/1.1\r\n")), "answer {n} is {echoed:?}");
            ensure!(n == 0 || client.until(&"b".repeat(n))?.len() == n, "another body");
        }
        client.finish()?;
    }
    let metrics = setup.proxy.metrics()?;
    let count = |state| metrics.sum("tlsplice_http_upstream_connections_total", &[("state", state)]);
    ensure!(
        count("new") <= 8 && count("new") + count("reused") == 200,
        "{} new, {} reused",
        count("new"),
        count("reused")
    );
    ensure!(metrics.sum("tlsplice_http_requests_total", &[("status", "2xx")]) == 200, "requests are not counted");
    setup.finish(ctx).map(drop)
}

fn half_close(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = manual(ctx, relay, &[0, 1 << 20])?;
    for listener in 0..2 {
        for notify in [true, false] {
            let mut client = connect(ctx, &setup, listener)?;
            client.send(format!("{GET}\r\n").as_bytes())?;
            if notify {
                client.client.tx.close_notify()?;
            }
            client.client.tx.fin()?;
            let stream = setup.upstream.accept()?;
            heard(&stream, "\r\n\r\n")?;
            std::thread::sleep(Duration::from_millis(100));
            let body = "z".repeat(3_000_000);
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            // Not all of it fits between the two: it is read while it is sent.
            let (sent, rest) = std::thread::scope(|scope| {
                let sending = scope.spawn(|| stream.send(answer.as_bytes()));
                let rest = client.rest();
                (sending.join(), rest)
            });
            sent.expect("no panic in a send")?;
            let (got, how) = rest?;
            ensure!(got.ends_with(&body) && how == How::CloseNotify, "{} bytes, {how:?}", got.len());
        }
    }
    setup.finish(ctx).map(drop)
}

fn expect_continue(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = manual(ctx, relay, &[0, 1 << 20])?;
    for listener in 0..2 {
        let mut client = connect(ctx, &setup, listener)?;
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        let stream = setup.upstream.accept()?;
        ensure!(heard(&stream, "\r\n\r\n")?.contains("\r\nExpect: 100-continue\r\n"), "the expectation was lost");
        stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        ensure!(client.until("\r\n\r\n")? == "HTTP/1.1 100 Continue\r\n\r\n", "another interim response");
        client.send(b"5;x\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n")?;
        ensure!(heard(&stream, "1\r\n\r\n")? == "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n", "another body");
        stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
        client.until("\r\n\r\n")?;
        client.finish()?;
    }
    setup.finish(ctx).map(drop)
}

fn trailers(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = manual(ctx, relay, &[0, 1 << 20])?;
    for listener in 0..2 {
        let mut client = connect(ctx, &setup, listener)?;
        let body =
            "Connection: x-hop\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Hop: 1\r\nX-Sum: 2\r\n\r\n";
        client.send(format!("POST / HTTP/1.1\r\nHost: a\r\n{body}"))?;
        let stream = setup.upstream.accept()?;
        heard(&stream, "\r\n\r\n")?;
        let got = heard(&stream, "\r\n\r\n")?;
        ensure!(got == "2\r\nok\r\n0\r\nX-Sum: 2\r\n\r\n", "the upstream got {got:?}");
        stream.send(format!("HTTP/1.1 200 OK\r\n{body}").as_bytes())?;
        client.until("\r\n\r\n")?;
        let got = client.until("\r\n\r\n")?;
        ensure!(got == "2\r\nok\r\n0\r\nX-Sum: 2\r\n\r\n", "the client got {got:?}");
        client.finish()?;
    }
    setup.finish(ctx).map(drop)
}

fn no_body(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = manual(ctx, relay, &[0, 1 << 20])?;
    for listener in 0..2 {
        let mut client = connect(ctx, &setup, listener)?;
        let mut stream = None;
        for (method, answer) in [
            ("HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
            ("GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
            ("GET", "HTTP/1.1 204 No Content\r\n\r\n"),
            ("HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ] {
            client.send(format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())?;
            let stream = match &stream {
                Some(stream) => stream,
                None => stream.insert(setup.upstream.accept()?),
            };
            ensure!(heard(stream, "\r\n\r\n")?.starts_with(method), "another request");
            stream.send(answer.as_bytes())?;
            let got = client.until("\r\n\r\n")?;
            ensure!(
                got[..15] == answer[..15] && got.contains("Content-Length: 5") == answer.contains("Content-Length: 5"),
                "{got:?}"
            );
        }
        client.finish()?;
    }
    setup.finish(ctx).map(drop)
}

fn old_client(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = manual(ctx, relay, &[0, 1 << 20])?;
    for listener in 0..2 {
        let mut client = connect(ctx, &setup, listener)?;
        client.send(b"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n")?;
        let stream = setup.upstream.accept()?;
        heard(&stream, "\r\n\r\n")?;
        stream.send(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")?;
        let (got, how) = client.rest()?;
        ensure!(got.starts_with("HTTP/1.1 200 OK\r\n") && got.ends_with("\r\nConnection: close\r\n\r\nok"), "{got:?}");
        ensure!(how == How::CloseNotify && !got.contains("Transfer-Encoding"), "{how:?} {got:?}");
    }
    setup.finish(ctx).map(drop)
}

fn upgrade(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = manual(ctx, relay, &[0, 100_000])?;
    for listener in 0..2 {
        let mut client = connect(ctx, &setup, listener)?;
        client.send(b"GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\nearly")?;
        let stream = setup.upstream.accept()?;
        let head = heard(&stream, "\r\n\r\n")?;
        ensure!(head.contains("\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"), "{head:?}");
        stream.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello")?;
        ensure!(client.until("hello")?.starts_with("HTTP/1.1 101 Switching Protocols\r\n"), "no 101");
        ensure!(heard(&stream, "early")? == "early", "what came with the request was lost");
        for _ in 0..40 {
            client.send([b'u'; 10_000])?;
            stream.read_exactly(&mut [0; 10_000])?;
            stream.send(&[b'd'; 10_000])?;
            client.until(&"d".repeat(10_000))?;
        }
        client.send(b"last words")?;
        client.client.tx.close_notify()?;
        ensure!(heard_to_end(&stream)? == ("last words".into(), PeerEnd::Fin), "the half-close was lost");
        stream.send(b"and ours")?;
        drop(stream);
        ensure!(client.rest()? == ("and ours".into(), How::CloseNotify), "the answer to it was lost");
    }
    setup.finish(ctx).map(drop)
}

fn cut_short(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = manual(ctx, relay, &[0, 1 << 20])?;
    for listener in 0..2 {
        for (fields, body) in [("Content-Length: 100000", "hello"), ("Transfer-Encoding: chunked", "5\r\nhello\r\n")] {
            for notify in [true, false] {
                let mut client = connect(ctx, &setup, listener)?;
                client.send(format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n{body}").as_bytes())?;
                let stream = setup.upstream.accept()?;
                heard(&stream, "hello")?;
                if notify {
                    client.client.tx.close_notify()?;
                }
                // It may be reset by then.
                let _ = client.client.tx.fin();
                let (_, end) = heard_to_end(&stream)?;
                ensure!(end == PeerEnd::Reset, "half a request ended by {end:?}");
            }
        }
        // A chunk that is none: a 400, and no end for the upstream.
        let mut client = connect(ctx, &setup, listener)?;
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")?;
        let stream = setup.upstream.accept()?;
        heard(&stream, "hello\r\n")?;
        client.send(b"xyz\r\n")?;
        let (got, how) = client.rest()?;
        ensure!(got.starts_with("HTTP/1.1 400 ") && how == How::CloseNotify, "{how:?} {got:?}");
        ensure!(heard_to_end(&stream)? == (String::new(), PeerEnd::Reset), "the upstream got a clean end");
    }
    setup.finish(ctx).map(drop)
}

fn stale(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = manual(ctx, relay, &[0])?;
    let mut client = connect(ctx, &setup, 0)?;
    for n in 0..5 {
        client.send(format!("{GET}\r\n").as_bytes())?;
        let mut stream = setup.upstream.accept()?;
        if n == 3 {
            // It takes the request and is gone without a word: asked once more, elsewhere. That is only done on a
            // connection that has served before.
            heard(&stream, "\r\n\r\n")?;
            stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
            client.until("\r\n\r\n")?;
            client.send(format!("{GET}\r\n").as_bytes())?;
            heard(&stream, "\r\n\r\n")?;
            drop(stream);
            stream = setup.upstream.accept()?;
        }
        heard(&stream, "\r\n\r\n")?;
        stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")?;
        client.until("ok")?;
        // Closed while it is idle: the next request finds that out by itself.
        drop(stream);
        std::thread::sleep(Duration::from_millis(20));
    }
    // A POST is not sent twice.
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok")?;
    let stream = setup.upstream.accept()?;
    heard(&stream, "ok")?;
    drop(stream);
    let (got, _) = client.rest()?;
    ensure!(got.starts_with("HTTP/1.1 502 "), "{got:?}");
    ensure!(setup.upstream.accept_now().is_none(), "a POST was sent twice");
    setup.finish(ctx).map(drop)
}

/// The answer is ours, and its id is in the log with this reason.
fn ours(setup: &Setup, got: &str, status: &str) -> Result<()> {
    ensure!(got.starts_with(&format!("HTTP/1.1 {status} ")) && got.contains("\r\nConnection: close\r\n"), "{got:?}");
    ensure!(got.contains("\r\nStrict-Transport-Security: max-age=63072000"), "{got:?}");
    let id = got.rsplit("\nid ").next().unwrap_or_default().trim().to_owned();
    setup.proxy.log_with(&format!("\"id\":\"{id}\"")).map(drop)
}

fn our_answers(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = setup_with(ctx, relay, &[0, 1 << 20], upstream, |settings| {
        let mut settings = settings.http("response_timeout = \"1s\"").http("head_timeout = \"1s\"");
        // The second listener's server is not there.
        settings.listeners[1].server = "unix:/nowhere/at/all".into();
        settings
    })?;
    let mut client = connect(ctx, &setup, 1)?;
    client.send(format!("{GET}\r\n").as_bytes())?;
    ours(&setup, &client.rest()?.0, "502")?;

    let mut client = connect(ctx, &setup, 0)?;
    client.send(format!("{GET}\r\n").as_bytes())?;
    let stream = setup.upstream.accept()?;
    heard(&stream, "\r\n\r\n")?;
    ours(&setup, &client.rest()?.0, "504")?;

    // A head that trickles, and a body that does not come.
    let mut client = connect(ctx, &setup, 0)?;
    for byte in GET.bytes().take(15) {
        if client.send([byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    ours(&setup, &client.rest()?.0, "408")?;
    let mut client = connect(ctx, &setup, 0)?;
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello")?;
    let stream = setup.upstream.accept()?;
    ours(&setup, &client.rest()?.0, "408")?;
    ensure!(heard_to_end(&stream)?.1 == PeerEnd::Reset, "half a request had a clean end");

    // A HEAD has no body, whoever answers.
    let mut client = connect(ctx, &setup, 1)?;
    client.send(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")?;
    let got = client.rest()?.0;
    ensure!(got.starts_with("HTTP/1.1 502 ") && got.ends_with("\r\n\r\n"), "{got:?}");
    setup.finish(ctx).map(drop)
}

fn drain(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = manual(ctx, relay, &[0])?;
    let mut idle = connect(ctx, &setup, 0)?;
    idle.send(format!("{GET}\r\n").as_bytes())?;
    let first = setup.upstream.accept()?;
    heard(&first, "\r\n\r\n")?;
    first.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")?;
    idle.until("ok")?;
    drop(first);
    let mut busy = connect(ctx, &setup, 0)?;
    busy.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok")?;
    let stream = setup.upstream.accept()?;
    heard(&stream, "ok")?;
    let Setup { mut proxy, .. } = setup;
    proxy.signal(Signal::TERM)?;
    let (got, how) = idle.rest()?;
    ensure!(got.is_empty() && how == How::CloseNotify, "an idle connection ended by {how:?}");
    stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")?;
    let (got, how) = busy.rest()?;
    ensure!(
        got.contains("\r\nConnection: close\r\n") && got.ends_with("ok") && how == How::CloseNotify,
        "{how:?} {got:?}"
    );
    let status = proxy.wait_exit()?;
    proxy.check_end(status)
}

fn early_response(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = manual(ctx, relay, &[0, 1 << 20])?;
    for listener in 0..2 {
        let mut client = connect(ctx, &setup, listener)?;
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n")?;
        client.send([b'x'; 100_000])?;
        let stream = setup.upstream.accept()?;
        heard(&stream, "\r\n\r\n")?;
        stream.send(b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")?;
        stream.fin()?;
        client.until("\r\n\r\nno")?;
        drop(stream);
        // The client goes on for a while, and still has its answer.
        for _ in 0..20 {
            if client.send([b'x'; 100_000]).is_err() {
                break;
            }
        }
        let _ = client.client.tx.close_notify();
        drop(client);
    }
    setup.finish(ctx).map(drop)
}

fn redirect(ctx: &Context) -> Result<()> {
    let folder = ctx.environment.tmp.join("acme");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("to-k_en"), "to-k_en.thumb")?;
    let mut settings = Settings::new(ctx, Relay::Userspace)?.listen(0, "127.0.0.1:1")?.mode("redirect");
    settings.http.push(format!("acme_challenge = {:?}", folder.display().to_string()));
    let proxy = Proxy::start(ctx, settings)?;
    let ask = |request: &str| -> Result<String> {
        let mut socket = TcpStream::connect(loopback(proxy.address(0).port()))?;
        socket.set_read_timeout(Some(ctx.environment.patience()))?;
        socket.write_all(request.as_bytes())?;
        let mut got = String::new();
        socket.read_to_string(&mut got)?;
        Ok(got)
    };
    let close = "Host: a.org:8080\r\nConnection: close\r\n\r\n";
    for (request, status, contains) in [
        (format!("GET /x?y=z HTTP/1.1\r\n{close}"), "308", "\r\nLocation: https://a.org/x?y=z\r\n"),
        (format!("GET /.well-known/acme-challenge/to-k_en HTTP/1.1\r\n{close}"), "200", "\r\n\r\nto-k_en.thumb"),
        (format!("GET /.well-known/acme-challenge/other HTTP/1.1\r\n{close}"), "404", ""),
        (format!("GET /.well-known/acme-challenge/../acme/to-k_en HTTP/1.1\r\n{close}"), "404", ""),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx".into(), "308", "\r\nConnection: close\r\n"),
        ("GET / HTTP/1.1\r\n\r\n".into(), "400", "\nid "),
        ("GET / HTTP/1.1\r\nHost: a\r\nX: a\nb\r\n\r\n".into(), "400", "\nid "),
        (
            format!("GET / HTTP/1.1\r\nHost: a\r\n\r\nHEAD /y HTTP/1.1\r\n{close}"),
            "308",
            "Location: https://a.org/y\r\n",
        ),
    ] {
        let got = ask(&request)?;
        ensure!(got.starts_with(&format!("HTTP/1.1 {status} ")) && got.contains(contains), "{request:?}: {got:?}");
        ensure!(!got.contains("Strict-Transport-Security"), "HSTS without TLS: {got:?}");
    }
    let metrics = proxy.finish(ctx)?;
    ensure!(metrics.sum("tlsplice_http_requests_total", &[("status", "3xx")]) == 4, "requests are not counted");
    Ok(())
}
