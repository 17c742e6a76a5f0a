//! Upstreams that do not speak HTTP as they should: a client gets a 502, or a reset, and never something else.

use crate::client::How;
use crate::environment::{Environment, Relay};
use crate::run::{Context, Test};
use crate::talk::{connect, heard, manual};
use anyhow::{Context as _, Result, ensure};

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    tests.extend(Test::some_guests(env, "http_a_hostile_upstream_is_a_502_or_a_reset", table));
    tests
}

/// What a client gets of it.
#[derive(Debug, Clone, Copy)]
enum Verdict {
    /// A 502 of ours.
    BadGateway,
    /// The beginning of the body, then a reset: never a clean end.
    Cut,
    /// All, and this body.
    Whole(&'static str),
}
use Verdict::{BadGateway, Cut, Whole};

const CASES: [(Verdict, &str); 47] = [
    (BadGateway, ""),
    (BadGateway, "hello\n"),
    (BadGateway, "hello\r\n\r\n"),
    (BadGateway, "<html>an answer of HTTP/0.9</html>"),
    (BadGateway, "HTTP/1.1 200 OK\r\nX: "),
    (BadGateway, "\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 200 OK\nContent-Length: 2\n\nok"),
    (BadGateway, "HTTP/2 200 OK\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 600 OK\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 000 OK\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1  200 OK\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 200OK\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "ICY 200 OK\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775808\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    (BadGateway, "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    (BadGateway, "HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nok"),
    (BadGateway, "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    (BadGateway, "HTTP/1.1 200 OK\r\nX: y\r\n z\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 200 OK\r\nX: \0\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 200 OK\r\nX: y\rSet-Cookie: a=b\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 200 OK\r\nX\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nraw"),
    (BadGateway, "HTTP/1.1 100 Continue\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
    (BadGateway, "HTTP/1.0 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\n\r\nok"),
    (BadGateway, "HTTP/1.1 100 Continue\r\n\r\n"),
    (Cut, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok"),
    (Cut, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"),
    (Cut, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n"),
    // Known before anything of it was passed on.
    (BadGateway, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nContent-Length: 5\r\n\r\n"),
    (Cut, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok"),
    (Whole("ok"), "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray"),
    (Whole("ok"), "HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok"),
    (Whole("ok"), "HTTP/1.1 200 OK\r\n\r\nok"),
    (Whole("ok"), "HTTP/1.0 200 OK\r\n\r\nok"),
    (Whole("ok"), "HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok"),
    (
        Whole("ok"),
        "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ),
    (
        Whole("2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n"),
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nok\r\n000\r\nX-Sum: 1\r\n\r\n",
    ),
    (Whole(""), "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nstray"),
    (Whole(""), "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\nstray"),
    (Whole(""), "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nstray\r\n0\r\n\r\n"),
];

fn table(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = manual(ctx, relay, &[0, 1 << 20])?;
    for (n, (verdict, answer)) in CASES.into_iter().enumerate() {
        for listener in ctx.environment.listeners(n, 2) {
            one(ctx, &setup, listener, verdict, answer)
                .with_context(|| format!("listener {listener}, to be {verdict:?}: {answer:?}"))?;
        }
    }
    setup.finish(ctx).map(drop)
}

/// Two requests are asked, so that what is stray could be taken for the second answer.
fn one(ctx: &Context, setup: &crate::exchange::Setup, listener: usize, verdict: Verdict, answer: &str) -> Result<()> {
    let mut client = connect(ctx, setup, listener)?;
    client
        .send(b"GET /first HTTP/1.1\r\nHost: a\r\n\r\nGET /second HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
    let stream = setup.upstream.accept()?;
    ensure!(heard(&stream, "\r\n\r\n")?.starts_with("GET /first HTTP/1.1\r\n"), "another request came first");
    stream.send(answer.as_bytes())?;
    drop(stream);
    let closes = answer.starts_with("HTTP/1.1 204") && answer.contains("stray")
        || answer == CASES[39].1
        || answer == CASES[40].1;
    if let (Whole(_), false) = (verdict, closes) {
        let second = setup.upstream.accept().context("the second request")?;
        heard(&second, "\r\n\r\n")?;
        second.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond")?;
    }
    let (got, how) = client.rest()?;
    match verdict {
        BadGateway => {
            ensure!(how == How::CloseNotify, "{how:?} after {got:?}");
            let last = got.rfind("HTTP/1.1 502 Bad Gateway\r\n").with_context(|| format!("the client got {got:?}"))?;
            // Interim responses may have come before.
            ensure!(
                got[..last].is_empty() || got.starts_with("HTTP/1.1 100 Continue\r\n\r\n"),
                "the client got {got:?}"
            );
            ensure!(!got.contains("ok") && !got.contains("a=b"), "the client got {got:?}");
        }
        Cut => ensure!(how == How::Reset && got.starts_with("HTTP/1.1 200 OK\r\n"), "{how:?} after {got:?}"),
        Whole(body) => {
            ensure!(how == How::CloseNotify, "{how:?} after {got:?}");
            let rest = if closes {
                got.as_str()
            } else {
                got.strip_suffix("second").with_context(|| format!("the client got {got:?}"))?
            };
            let rest =
                if closes { rest } else { &rest[..rest.rfind("HTTP/1.1 200 OK").context("no second answer")?] };
            ensure!(rest.ends_with(&format!("\r\n\r\n{body}")) && !got.contains("stray"), "the client got {got:?}");
            ensure!(got.contains("\r\nStrict-Transport-Security: "), "the client got {got:?}");
        }
    }
    Ok(())
}
