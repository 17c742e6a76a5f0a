//! Heads: whatever comes in, what goes out is read the same by a second strict reader, and by the most lenient one.
//!
//!   bytes ─▶ found, whole and in pieces ─▶ parsed ─▶ written anew ─▶ found ─▶ parsed ─▶ written the same
//!
//! The first byte says where the input is cut, and what the response answers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::net::{IpAddr, Ipv4Addr};
use tlsplice::http::framing::Body;
use tlsplice::http::head::{FIELDS_MAX, Scanner};
use tlsplice::http::request::Request;
use tlsplice::http::response::{Asked, Kind, Response};

const LIMIT: usize = 32 << 10;
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fuzz_target!(|input: &[u8]| {
    let Some((&first, bytes)) = input.split_first() else { return };
    request(bytes, usize::from(first));
    response(bytes, first);
});

fn scan(mut scanner: Scanner, bytes: &[u8], cut: usize) -> Option<&[u8]> {
    let whole = scanner.clone().scan(bytes, LIMIT);
    let cut = cut.min(bytes.len());
    let first = scanner.scan(&bytes[..cut], LIMIT);
    let pieces = if first == Ok(None) { scanner.scan(bytes, LIMIT) } else { first };
    assert_eq!(whole, pieces);
    whole.ok().flatten().map(|extent| &bytes[extent.start..extent.end])
}

fn request(bytes: &[u8], cut: usize) {
    let Some(head) = scan(Scanner::request(), bytes, cut) else { return };
    let Ok(first) = Request::parse(head, CLIENT) else { return };
    let again = scan(Scanner::request(), &first.head, cut).expect("what is passed on is a head");
    assert_eq!(again.len(), first.head.len());
    assert_eq!(loosely(again, "host").len(), 1);
    framed_as(again, first.body, false);
    for name in ["x-forwarded-for", "x-forwarded-proto", "forwarded"] {
        assert_eq!(loosely(again, name).len(), 1, "{name}");
    }
    // It is counted down, and at 0 it is for the next one.
    if first.method == "OPTIONS" && !loosely(again, "max-forwards").is_empty() {
        return;
    }
    // We add fields of our own, and take no more from others than we take.
    if lines(again).len() > FIELDS_MAX + 1 {
        return;
    }
    let second = Request::parse(again, CLIENT).expect("what is passed on is good");
    assert_eq!((second.body, &second.target, &second.method), (first.body, &first.target, &first.method));
    assert_eq!(second.upgrade, first.upgrade);
    if !first.host.is_empty() {
        assert_eq!(first.host, second.host);
        // The second passage names itself beside the first, and changes nothing else.
        let mut once = lines(&first.head);
        once.push(b"Via: 1.1 tlsplice");
        once.sort_unstable();
        let mut twice = lines(&second.head);
        twice.sort_unstable();
        assert_eq!(once, twice);
    }
}

fn response(bytes: &[u8], bits: u8) {
    let Some(head) = scan(Scanner::response(), bytes, usize::from(bits)) else { return };
    let minor = bits & 1;
    let asked = Asked {
        to_head: bits & 2 != 0,
        minor,
        upgrade: (bits & 4 != 0).then_some("websocket"),
        keep_alive: minor == 1,
        hsts: "max-age=63072000",
    };
    let Ok(first) = Response::parse(head, &asked) else { return };
    if first.head.is_empty() {
        return;
    }
    let again = scan(Scanner::response(), &first.head, 0).expect("what is passed on is a head");
    assert_eq!(again.len(), first.head.len());
    if lines(again).len() > FIELDS_MAX + 1 {
        return;
    }
    let second = Response::parse(again, &asked).expect("what is passed on is good");
    assert_eq!(second.status, first.status);
    match (first.kind, second.kind) {
        (Kind::Final { body: a, keep_client, .. }, Kind::Final { body: b, .. }) => {
            let sent = if minor == 0 && a == Body::Chunked { Body::UntilClose } else { a };
            assert_eq!(sent, b);
            assert_eq!(loosely(again, "strict-transport-security").len(), 1);
            framed_as(again, sent, true);
            assert!(sent != Body::UntilClose || !keep_client, "its end is the connection's");
        }
        (a, b) => assert_eq!(a, b),
    }
    assert_eq!(without_close(&first.head), without_close(&second.head));
}

/// The fields in order of their bytes. A 204 with a length ends its connection, and is passed on without the length.
fn without_close(head: &[u8]) -> Vec<&[u8]> {
    let mut lines = lines(head);
    lines.retain(|line| *line != b"Connection: close");
    lines.sort_unstable();
    lines
}

/// Lines by CRLF alone, the two empty ones at the end left out.
fn lines(head: &[u8]) -> Vec<&[u8]> {
    let mut lines: Vec<&[u8]> = head.split(|byte| *byte == b'\n').collect();
    assert_eq!((lines.pop(), lines.pop()), (Some(&b""[..]), Some(&b"\r"[..])));
    lines.into_iter().map(|line| line.strip_suffix(b"\r").expect("no bare LF")).collect()
}

/// What the sloppiest reader finds under a name: CR or LF ends a line, blanks and control bytes around a name are passed over,
/// and `_` is `-`.
fn loosely<'a>(head: &'a [u8], name: &str) -> Vec<&'a [u8]> {
    let fields = head.split(|byte| matches!(byte, b'\r' | b'\n' | 0)).skip(1).filter_map(|line| {
        let at = line.iter().position(|byte| *byte == b':')?;
        let written: Vec<u8> = line[..at]
            .iter()
            .filter(|byte| !byte.is_ascii_whitespace() && !byte.is_ascii_control())
            .map(|byte| if *byte == b'_' { b'-' } else { byte.to_ascii_lowercase() })
            .collect();
        (written == name.as_bytes()).then(|| line[at + 1..].trim_ascii())
    });
    fields.collect()
}

/// One framing, and the one that we have found.
fn framed_as(head: &[u8], body: Body, is_response: bool) {
    let (lengths, codings) = (loosely(head, "content-length"), loosely(head, "transfer-encoding"));
    assert!(lengths.len() + codings.len() <= 1, "two framings");
    match body {
        Body::Length(length) => assert_eq!(lengths, [length.to_string().as_bytes()]),
        Body::Chunked => assert_eq!(codings, [&b"chunked"[..]]),
        Body::UntilClose => assert!(lengths.is_empty() && codings.is_empty()),
        // An answer to HEAD, and a 304, tell the length of what they leave out.
        Body::None => assert!(codings.is_empty() && (is_response || lengths.iter().all(|length| *length == b"0"))),
    }
}
