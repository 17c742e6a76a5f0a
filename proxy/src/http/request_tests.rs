use super::*;
use crate::http::head::Scanner;
use proptest::prelude::*;

const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

fn parse(head: &str) -> Result<Request, Refusal> {
    parse_bytes(head.as_bytes())
}

fn parse_bytes(head: &[u8]) -> Result<Request, Refusal> {
    match Scanner::request().scan(head, 32 << 10)? {
        Some(extent) => Request::parse(&head[extent.start..extent.end], CLIENT),
        None => panic!("not whole: {:?}", String::from_utf8_lossy(head)),
    }
}

fn text(request: &Request) -> &str {
    std::str::from_utf8(&request.head).expect("text in, text out")
}

#[test]
fn a_request_is_written_anew() {
    let request =
        parse("POST /a?b=c HTTP/1.1\r\nhost: x.org\r\nX-One:  1 \r\nContent-Length: 007\r\n\r\n").expect("good");
    assert_eq!((request.path(), request.body, request.keep_alive), ("/a", Body::Length(7), true));
    let expected = "POST /a?b=c HTTP/1.1\r\nHost: x.org\r\nX-One: 1\r\nContent-Length: 7\r\n\
                    X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: x.org\r\n\
                    Forwarded: for=192.0.2.1;proto=https;host=\"x.org\"\r\nVia: 1.1 tlsplice\r\n\r\n";
    assert_eq!(text(&request), expected);
    let v6 = Request::parse(b"GET / HTTP/1.0\r\n\r\n", "2001:db8::1".parse().expect("an address")).expect("good");
    assert!(text(&v6).contains("\r\nForwarded: for=\"[2001:db8::1]\";proto=https\r\n"), "{}", text(&v6));
    assert!(!v6.keep_alive);
}

#[test]
fn what_the_client_says_of_its_way_is_dropped() {
    let fields = "X-Forwarded-For: 1.1.1.1\r\nx_forwarded_for: 1.1.1.1\r\nForwarded: for=1.1.1.1\r\nX-Forwarded-Port: 1\r\n\
                  X-Real-IP: 1.1.1.1\r\nProxy: x\r\n";
    let request = parse(&format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).expect("good");
    assert!(!text(&request).contains("1.1.1.1"), "{}", text(&request));
    assert!(!text(&request).contains("Proxy: x"));
}

#[test]
fn fields_of_the_connection_end_here() {
    let fields =
        "Connection: x-hop, close\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nProxy-Connection: x\r\nTE: trailers\r\nX-End: 2\r\n";
    let request = parse(&format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).expect("good");
    let head = text(&request);
    assert!(!head.contains("X-Hop") && !head.contains("Keep-Alive") && !head.contains("Proxy-Connection"), "{head}");
    assert!(head.contains("\r\nX-End: 2\r\n") && head.contains("\r\nConnection: TE\r\nTE: trailers\r\n"), "{head}");
    assert!(!request.keep_alive);
}

#[test]
fn no_field_that_connection_names_is_passed_on() {
    let ask = |method: &str, named: &str| {
        let fields = format!("Connection: {named}\r\nExpect: 100-continue\r\nMax-Forwards: 3\r\nDate: x\r\n");
        text(&parse(&format!("{method} / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).expect("good")).to_owned()
    };
    for method in ["POST", "OPTIONS"] {
        let (all, none) = (ask(method, "keep-alive"), ask(method, "expect, MAX-Forwards, date"));
        for field in ["\r\nExpect: ", "\r\nMax-Forwards: ", "\r\nDate: "] {
            assert!(all.contains(field) && !none.contains(field), "{field:?}: {all}{none}");
        }
    }
}

#[test]
fn an_upgrade_is_asked_for_only_where_it_may_come() {
    let ask = |fields: &str| parse(&format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).expect("good").upgrade;
    assert_eq!(ask("Connection: Upgrade\r\nUpgrade: websocket\r\n"), Some("websocket".into()));
    assert_eq!(ask("Upgrade: websocket\r\n"), None);
    assert_eq!(ask("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n"), None);
    assert_eq!(ask("Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n"), None);
    assert_eq!(ask("Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n"), None);
}

#[test]
fn an_absolute_target_decides_the_host() {
    let request = parse("GET http://b:8/x HTTP/1.1\r\nHost: a\r\n\r\n").expect("good");
    assert!(text(&request).starts_with("GET /x HTTP/1.1\r\nHost: b:8\r\n"), "{}", text(&request));
    assert!(parse("GET http://b/x HTTP/1.1\r\n\r\n").is_err());
}

#[test]
fn max_forwards_counts_down_for_options() {
    let ask = |hops: &str| parse(&format!("OPTIONS * HTTP/1.1\r\nHost: a\r\nMax-Forwards: {hops}\r\n\r\n"));
    assert!(ask("2").is_ok_and(|r| text(&r).contains("\r\nMax-Forwards: 1\r\n")));
    assert!(matches!(ask("0"), Err(r) if r.status == Status::NotImplemented));
    assert!(ask("-1").is_err() && ask("x").is_err());
}

#[test]
fn what_is_no_request_has_the_status_that_says_so() {
    let host = "Host: a\r\n\r\n";
    for (status, head) in [
        (400, "GET /\r\n\r\n".to_owned()),
        (400, format!("GET / HTTP/1.1 \r\n{host}")),
        (400, format!("GET  / HTTP/1.1\r\n{host}")),
        (400, format!(" GET / HTTP/1.1\r\n{host}")),
        (400, format!("GET / http/1.1\r\n{host}")),
        (400, format!("GET /a b HTTP/1.1\r\n{host}")),
        (400, format!("GET /#a HTTP/1.1\r\n{host}")),
        (400, format!("GET /é HTTP/1.1\r\n{host}")),
        (400, format!("G(T / HTTP/1.1\r\n{host}")),
        (400, "GET / HTTP/1.1\r\n\r\n".into()),
        (400, format!("GET / HTTP/1.1\r\nHost: b\r\n{host}")),
        (400, "GET / HTTP/1.0\r\nHost: b\r\nHost: b\r\n\r\n".into()),
        (400, "GET / HTTP/1.1\r\nHost:\r\n\r\n".into()),
        (400, "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n".into()),
        (400, format!("GET / HTTP/1.1\r\nX : 1\r\n{host}")),
        (400, format!("GET / HTTP/1.1\r\nX\r\n{host}")),
        (400, format!("GET / HTTP/1.1\r\n: 1\r\n{host}")),
        (400, format!("GET / HTTP/1.1\r\nX(: 1\r\n{host}")),
        (400, format!("POST / HTTP/1.1\r\nContent_Length: 5\r\n{host}")),
        (400, format!("POST / HTTP/1.1\r\nConnection: content-length\r\nContent-Length: 5\r\n{host}")),
        (400, format!("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n{host}")),
        (400, format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n{host}")),
        (405, format!("TRACE / HTTP/1.1\r\n{host}")),
        (417, format!("GET / HTTP/1.1\r\nExpect: 200-maybe\r\n{host}")),
        (431, format!("GET / HTTP/1.1\r\n{}{host}", "X: 1\r\n".repeat(FIELDS_MAX))),
        (501, format!("CONNECT a:1 HTTP/1.1\r\n{host}")),
        (501, format!("POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n{host}")),
        (505, format!("GET / HTTP/2.0\r\n{host}")),
        (505, format!("GET / HTTP/1.2\r\n{host}")),
        (400, format!("GET / HTTP/1.10\r\n{host}")),
    ] {
        assert_eq!(parse(&head).map_err(|r| r.status.code()).map(|r| r.head), Err(status), "{head:?}");
    }
}

proptest! {
    /// Whatever comes in: what goes out is read the same by a second strict reader, and frames the same body.
    #[test]
    fn what_is_passed_on_has_one_meaning(
        line in "(GET|POST|PUT|X)  ?(/[a-z#?]{0,4}|http://[a-z:@]{0,4}/|\\*) HTTP/1\\.[01]",
        fields in proptest::collection::vec("(Host|Content-Length|content-length|Transfer-Encoding|Transfer_Encoding|Connection|TE|X-Forwarded-For|Expect|X-[a-z]{1,3}): ?(a|5|05|chunked|close|x-a, host|100-continue|[ -~]{0,6})", 0..6),
    ) {
        let head = format!("{line}\r\n{}\r\n\r\n", fields.join("\r\n")).replace("\r\n\r\n\r\n", "\r\n\r\n");
        if let Ok(first) = parse(&head) {
            let second = parse_bytes(&first.head).expect("what we write is good");
            prop_assert_eq!(second.body, first.body);
            prop_assert_eq!(&second.target, &first.target);
            prop_assert_eq!(second.host.as_str(), if first.host.is_empty() { NO_HOST } else { first.host.as_str() });
            let lower = first.head.to_ascii_lowercase();
            let count = |name: &[u8]| lower.windows(name.len()).filter(|w| *w == name).count();
            prop_assert!(count(b"\r\nhost: ") == 1 && count(b"\r\ncontent-length: ") + count(b"\r\ntransfer-encoding: ") <= 1);
            prop_assert_eq!(count(b"\r\nx-forwarded-for: "), 1);
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut head = b"GET / HTTP/1.1\r\nHost: a\r\n".to_vec();
        head.extend_from_slice(&bytes);
        head.extend_from_slice(b"\r\n\r\n");
        let _ = Request::parse(&head, CLIENT);
        let _ = Request::parse(&bytes, CLIENT);
    }
}
