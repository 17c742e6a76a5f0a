//! Heads: whatever comes in, what goes out is read the same by a second strict reader, and pieces change nothing.
//! The first byte says where the input is cut, and what the response answers.
#![no_main]

mod http;

use http::framing::Body;
use http::head::Scanner;
use http::request::Request;
use http::response::{Asked, Kind, Response};
use libfuzzer_sys::fuzz_target;
use std::net::{IpAddr, Ipv4Addr};

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
    let second = Request::parse(again, CLIENT).expect("what is passed on is good");
    assert_eq!((second.body, &second.target, &second.method), (first.body, &first.target, &first.method));
    assert!(first.host.is_empty() || first.host == second.host);
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
    let second = Response::parse(again, &asked).expect("what is passed on is good");
    assert_eq!(second.status, first.status);
    if let (Kind::Final { body: a, .. }, Kind::Final { body: b, .. }) = (first.kind, second.kind) {
        assert_eq!(if minor == 0 && a == Body::Chunked { Body::UntilClose } else { a }, b);
    }
}
