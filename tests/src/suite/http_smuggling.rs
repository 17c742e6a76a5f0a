//! Requests that two readers could understand differently: each is refused, or passed on so that there is one way left.
//!
//! The table is the union of what is published about request smuggling: CL.TE, TE.CL, TE.TE in its disguises, lengths that
//! are none, line ends that are none, folded lines, chunk sizes and extensions, Host and target, hop-by-hop fields. The
//! server behind is strict itself, and fails on anything that it could read in two ways.

use crate::client::How;
use crate::environment::{Environment, Relay};
use crate::run::{Context, Test};
use crate::talk::{connect, echo, setup};
use crate::upstream::{Kind, Upstream};
use anyhow::{Context as _, Result, ensure};

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    tests.extend(Test::some_guests(env, "http_smuggling_is_refused_or_passed_on_in_one_meaning", table));
    tests
}

/// What a client gets: one answer of this status and the end, or so many good ones.
#[derive(Debug, Clone, Copy)]
enum Verdict {
    Refused(u16),
    Passed(usize),
}
use Verdict::{Passed, Refused};

const HOST: &str = "Host: a\r\n";
/// Behind everything that could be taken for a body.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";

fn post(fields: &str, body: &str) -> String {
    format!("POST / HTTP/1.1\r\n{HOST}{fields}\r\n{body}")
}

fn get(fields: &str) -> String {
    format!("GET / HTTP/1.1\r\n{HOST}{fields}\r\n")
}

fn cases() -> Vec<(Verdict, String)> {
    let mut cases = Vec::new();
    let mut refused = |status, request: String| cases.push((Refused(status), request));
    // Both framings, in either order and in any disguise.
    for te in [
        "Transfer-Encoding: chunked",
        "transfer-encoding:chunked",
        "Transfer-Encoding:\tchunked",
        "Transfer-Encoding: Chunked",
    ] {
        refused(400, post(&format!("Content-Length: 6\r\n{te}\r\n"), &format!("0\r\n\r\n{SMUGGLED}")));
        refused(400, post(&format!("{te}\r\nContent-Length: 6\r\n"), &format!("0\r\n\r\n{SMUGGLED}")));
    }
    for te in [
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding: 'chunked'",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding: chunked,",
        "Transfer-Encoding: ,chunked",
        "Transfer-Encoding:",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding\t: chunked",
        " Transfer-Encoding: chunked",
        "\tTransfer-Encoding: chunked",
        "X: y\r\n Transfer-Encoding: chunked",
        "Transfer-Encoding:\r\n chunked",
        "Transfer-Encoding: chunked\r\n ",
        "Transfer-Encoding: \x0bchunked",
        "Transfer-Encoding: \x0cchunked",
        "Transfer-Encoding: \0chunked",
        "Transfer-Encoding: chunked\0",
        "Transfer_Encoding: chunked",
        "Transfer-Encoding\0: chunked",
        "X: y\nTransfer-Encoding: chunked",
        "X: y\rTransfer-Encoding: chunked",
        "Transfer-Encoding: ch\u{fc}nked",
        "Transfer-Encoding: chunk",
        "Transfer-Encoding: chunked chunked",
        "Foo\r\nTransfer-Encoding: chunked",
        ": y\r\nTransfer-Encoding: chunked",
    ] {
        refused(400, post(&format!("{te}\r\n"), &format!("0\r\n\r\n{SMUGGLED}")));
        refused(400, post(&format!("Content-Length: 5\r\n{te}\r\n"), &format!("0\r\n\r\n{SMUGGLED}")));
    }
    refused(501, post("Transfer-Encoding: gzip, chunked\r\n", &format!("0\r\n\r\n{SMUGGLED}")));
    refused(400, format!("POST / HTTP/1.0\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{SMUGGLED}"));
    // Lengths.
    for cl in [
        "Content-Length: 5\r\nContent-Length: 5",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 0\r\ncontent-length: 5",
        "Content-Length: 5, 5",
        "Content-Length: 5,6",
        "Content-Length: +5",
        "Content-Length: -5",
        "Content-Length: 0x5",
        "Content-Length: 5a",
        "Content-Length: 5 5",
        "Content-Length: 5.0",
        "Content-Length: 5e0",
        "Content-Length: \"5\"",
        "Content-Length:",
        "Content-Length: ,5",
        "Content-Length: 9223372036854775808",
        "Content-Length: 18446744073709551621",
        "Content-Length: 99999999999999999999999999999999",
        "Content-Length : 5",
        "Content-Length\t: 5",
        " Content-Length: 5",
        "Content-Length: 5\r\n ",
        "Content-Length:\r\n 5",
        "Content_Length: 5",
        "Content-Length: \x0b5",
        "Content-Length: 5\0",
        "X: y\nContent-Length: 5",
        "X: y\rContent-Length: 5",
        "Content-Length: \u{665}",
        "Connection: Content-Length\r\nContent-Length: 5",
        "Connection: close, transfer-encoding\r\nContent-Length: 5",
    ] {
        refused(400, post(&format!("{cl}\r\n"), &format!("hello{SMUGGLED}")));
    }
    // Chunks.
    for chunks in [
        "5\nhello\r\n0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "5\r\nhello\r\n0\n\r\n",
        "5\r\nhello\r\n0\r\n\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        " 5\r\nhello\r\n0\r\n\r\n",
        "5 \r\nhello\r\n0\r\n\r\n",
        "5\t\r\nhello\r\n0\r\n\r\n",
        "\r\n5\r\nhello\r\n0\r\n\r\n",
        "5,5\r\nhello\r\n0\r\n\r\n",
        "5h\r\nhello\r\n0\r\n\r\n",
        "4\r\nhello\r\n0\r\n\r\n",
        "6\r\nhello\r\n0\r\n\r\n",
        "ffffffffffffffff\r\nhello\r\n",
        "10000000000000005\r\nhello\r\n",
        "00000000000000005\r\nhello\r\n",
        ";\r\nhello\r\n",
        "5;a\nhello\r\n0\r\n\r\n",
        "5;a\rb\r\nhello\r\n0\r\n\r\n",
        "5;\0\r\nhello\r\n0\r\n\r\n",
        "5\r\r\nhello\r\n0\r\n\r\n",
        "0\r\nX: 1\n\r\n",
        "0\r\nX: 1\r\r\n\r\n",
        "0\r\n X: 1\r\n\r\n",
        "0\r\nX : 1\r\n\r\n",
        "0\r\nX\r\n\r\n",
        "0\r\nContent-Length: 5\r\n\r\n",
        "0\r\nTransfer-Encoding: chunked\r\n\r\n",
        "0\r\nHost: b\r\n\r\n",
        "0\r\nX-Forwarded-For: 1\r\n\r\n",
        "0\r\nContent_Length: 5\r\n\r\n",
        "0\r\nAuthorization: x\r\n\r\n",
        "0\r\nConnection: close\r\n\r\n",
        "0\r\nTrailer: x\r\n\r\n",
    ] {
        refused(400, post("Transfer-Encoding: chunked\r\n", &format!("{chunks}{SMUGGLED}")));
    }
    // Request lines, versions, targets, Host.
    for request in [
        format!("GET / HTTP/1.1\n{HOST}\r\n"),
        format!("GET /\r\n\r\n{SMUGGLED}"),
        format!("GET  / HTTP/1.1\r\n{HOST}\r\n"),
        format!("GET /  HTTP/1.1\r\n{HOST}\r\n"),
        format!("GET\t/ HTTP/1.1\r\n{HOST}\r\n"),
        format!("GET / HTTP/1.1 \r\n{HOST}\r\n"),
        format!("GET / HTTP/1.1\x0b\r\n{HOST}\r\n"),
        format!(" GET / HTTP/1.1\r\n{HOST}\r\n"),
        format!("GET / HTTP/01.1\r\n{HOST}\r\n"),
        format!("GET / HTTP/1.1x\r\n{HOST}\r\n"),
        format!("GET / http/1.1\r\n{HOST}\r\n"),
        format!("GET / HTTP 1.1\r\n{HOST}\r\n"),
        format!("GET /a b HTTP/1.1\r\n{HOST}\r\n"),
        format!("GET /#x HTTP/1.1\r\n{HOST}\r\n"),
        format!("GET a HTTP/1.1\r\n{HOST}\r\n"),
        format!("GET * HTTP/1.1\r\n{HOST}\r\n"),
        format!("GET http://u@a/ HTTP/1.1\r\n{HOST}\r\n"),
        format!("GET ftp://a/ HTTP/1.1\r\n{HOST}\r\n"),
        format!("GET http:///a HTTP/1.1\r\n{HOST}\r\n"),
        format!("G\0T / HTTP/1.1\r\n{HOST}\r\n"),
        format!("GE(T / HTTP/1.1\r\n{HOST}\r\n"),
        "GET / HTTP/1.1\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost:\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost: a b\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost : a\r\n\r\n".into(),
        "GET / HTTP/1.1\r\n Host: a\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nX: y\r\nHost\r\n: a\r\n\r\n".into(),
        "GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n".into(),
        get("X: \x01\r\n"),
        get("X: \x7f\r\n"),
        get("X\u{e9}: y\r\n"),
        get("X y: z\r\n"),
        get("Connection: host\r\n"),
        get("X: y\r\n\tz\r\n"),
        "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n".into(),
        "\nGET / HTTP/1.1\r\nHost: a\r\n\r\n".into(),
        "\0".into(),
    ] {
        refused(400, request);
    }
    refused(505, format!("GET / HTTP/2.0\r\n{HOST}\r\n"));
    refused(505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into());
    refused(505, format!("GET / HTTP/1.2\r\n{HOST}\r\n"));
    refused(501, format!("CONNECT a:80 HTTP/1.1\r\n{HOST}\r\n"));
    refused(405, format!("TRACE / HTTP/1.1\r\n{HOST}\r\n"));
    refused(417, post("Expect: x\r\nContent-Length: 1\r\n", "x"));
    refused(431, get(&format!("X: {}\r\n", "y".repeat(33 << 10))));
    refused(431, get(&"X: y\r\n".repeat(200)));
    refused(431, format!("GET /{} HTTP/1.1\r\n{HOST}\r\n", "y".repeat(33 << 10)));

    let mut passed = |count, request: String| cases.push((Passed(count), request));
    passed(2, post("Content-Length: 5\r\n", &format!("hello{SMUGGLED}")));
    passed(2, post("Content-Length: 0000000000000000000005\r\n", &format!("hello{SMUGGLED}")));
    passed(2, post("Transfer-Encoding: chunked\r\n", &format!("5\r\nhello\r\n0\r\n\r\n{SMUGGLED}")));
    passed(
        2,
        post(
            "Transfer-Encoding:   chunked  \r\n",
            &format!("5;a=\"b;c\" ; d\r\nhello\r\n00\r\nX: y\r\n\r\n{SMUGGLED}"),
        ),
    );
    passed(2, post("Transfer-Encoding: CHUNKED\r\n", &format!("0005\r\nhello\r\n0\r\n\r\n{SMUGGLED}")));
    passed(2, format!("{}{SMUGGLED}", get("Content-Length: 0\r\n")));
    // A GET with a body is one request with a body, and not two.
    passed(1, get(&format!("Content-Length: {}\r\n", SMUGGLED.len())) + SMUGGLED);
    passed(1, get("Transfer-Encoding: chunked\r\n") + &format!("{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n", SMUGGLED.len()));
    passed(1, format!("\r\n{}", get("")));
    passed(
        1,
        get(
            "Connection: x-forwarded-for, x-y\r\nX-Y: z\r\nX-Forwarded-For: 1.1.1.1\r\nX_Forwarded_Host: b\r\nForwarded: for=1.1.1.1\r\n",
        ),
    );
    passed(1, "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n".into());
    passed(1, get("Connection: upgrade, http2-settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"));
    cases
}

fn table(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, echo)?;
    let setup = setup(ctx, relay, &[0, 1 << 20], upstream)?;
    let cases = cases();
    for (n, (verdict, request)) in cases.iter().enumerate() {
        for listener in ctx.environment.listeners(n, 2) {
            one(ctx, &setup, listener, *verdict, request).with_context(|| {
                format!("listener {listener}, to be {verdict:?}: {:?}", &request[..request.len().min(300)])
            })?;
        }
    }
    ctx.note(&format!("{} requests", cases.len()));
    setup.finish(ctx).map(drop)
}

fn one(ctx: &Context, setup: &crate::exchange::Setup, listener: usize, verdict: Verdict, request: &str) -> Result<()> {
    let mut client = connect(ctx, setup, listener)?;
    client.send(request.as_bytes())?;
    client.client.tx.close_notify()?;
    let (got, how) = client.rest()?;
    // The echo holds request lines, which have no status behind the version.
    let statuses = got.match_indices("HTTP/1.1 ").map(|(at, text)| got[at + text.len()..].get(..3).unwrap_or_default());
    let statuses: Vec<&str> = statuses.collect();
    ensure!(how == How::CloseNotify, "the client's stream ended by {how:?} after {got:?}");
    match verdict {
        Refused(status) => {
            ensure!(statuses == [status.to_string()], "the client got {got:?}");
            ensure!(got.contains("\r\nConnection: close\r\n") && got.contains("\nid "), "the client got {got:?}");
        }
        Passed(count) => {
            ensure!(
                statuses.iter().filter(|s| **s == "200").count() == count && statuses.len() == count,
                "the client got {got:?}"
            );
            ensure!(!got.contains("1.1.1.1") && !got.contains("X-Y: z"), "passed on: {got:?}");
        }
    }
    Ok(())
}
