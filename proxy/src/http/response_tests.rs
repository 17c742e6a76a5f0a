use super::*;
use crate::http::head::Scanner;
use crate::http::refusal::Status;
use proptest::prelude::*;

const GET: Asked<'static> = Asked { to_head: false, minor: 1, upgrade: None, keep_alive: true, hsts: "max-age=9" };

fn parse(head: &str, asked: &Asked<'_>) -> Result<Response, Refusal> {
    let extent = Scanner::response().scan(head.as_bytes(), 32 << 10)?.expect("whole");
    Response::parse(&head.as_bytes()[extent.start..extent.end], asked)
}

fn text(response: &Response) -> &str {
    std::str::from_utf8(&response.head).expect("text in, text out")
}

#[test]
fn a_response_is_written_anew_with_hsts() {
    let head = "HTTP/1.1 200 Fine\r\nDate: x\r\ncontent-length:  5\r\nStrict-Transport-Security: max-age=0\r\n\
                Connection: keep-alive, x-hop\r\nX-Hop: 1\r\nKeep-Alive: 9\r\nX : 2\r\n\r\n";
    let response = parse(head, &GET).expect("good");
    assert_eq!(response.kind, Kind::Final { body: Body::Length(5), keep_client: true, keep_upstream: true });
    let expected =
        "HTTP/1.1 200 Fine\r\nDate: x\r\nX: 2\r\nStrict-Transport-Security: max-age=9\r\nContent-Length: 5\r\n\r\n";
    assert_eq!(text(&response), expected);
}

#[test]
fn a_date_is_added_where_the_upstream_has_none() {
    let response = parse("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", &GET).expect("good");
    assert!(text(&response).contains("\r\nDate: ") && text(&response).contains(" GMT\r\n"), "{}", text(&response));
}

#[test]
fn a_body_until_close_closes_both() {
    for head in ["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.0 200 OK\r\n\r\n"] {
        let response = parse(head, &GET).expect("good");
        assert_eq!(response.kind, Kind::Final { body: Body::UntilClose, keep_client: false, keep_upstream: false });
        assert!(text(&response).contains("\r\nConnection: close\r\n"));
    }
}

#[test]
fn an_old_client_gets_no_chunks_and_no_interim_response() {
    let old = Asked { minor: 0, keep_alive: false, ..GET };
    let response = parse("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", &old).expect("good");
    assert!(matches!(response.kind, Kind::Final { body: Body::Chunked, keep_client: false, .. }));
    assert!(!text(&response).contains("Transfer-Encoding"));
    let interim = parse("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", &old).expect("good");
    assert_eq!((interim.kind, interim.head.len()), (Kind::Interim, 0));
}

#[test]
fn no_body_behind_204_304_and_head() {
    let kind =
        |head: &str, asked: &Asked<'_>| parse(head, asked).map(|r| (r.kind, text(&r).contains("Content-Length: 5")));
    let none = |keep| Kind::Final { body: Body::None, keep_client: keep, keep_upstream: keep };
    assert_eq!(kind("HTTP/1.1 304 X\r\nContent-Length: 5\r\n\r\n", &GET), Ok((none(true), true)));
    assert_eq!(kind("HTTP/1.1 204 X\r\nContent-Length: 5\r\n\r\n", &GET), Ok((none(false), false)));
    assert_eq!(kind("HTTP/1.1 204 X\r\nContent-Length: 0\r\n\r\n", &GET), Ok((none(true), false)));
    let head = Asked { to_head: true, ..GET };
    assert_eq!(kind("HTTP/1.1 200 X\r\nContent-Length: 5\r\n\r\n", &head), Ok((none(true), true)));
    assert_eq!(kind("HTTP/1.1 200 X\r\n\r\n", &head), Ok((none(true), false)));
}

#[test]
fn a_101_is_what_was_asked_for_or_502() {
    let asked = Asked { upgrade: Some("websocket, x"), ..GET };
    let switched = "HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n";
    let response = parse(switched, &asked).expect("good");
    assert_eq!(response.kind, Kind::Switched);
    assert!(text(&response).contains("\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\n"), "{}", text(&response));
    assert!(parse(switched, &GET).is_err());
    assert!(parse(&switched.replace("WebSocket", "other"), &asked).is_err());
    assert!(parse(&switched.replace("Connection: Upgrade\r\n", ""), &asked).is_err());
}

#[test]
fn what_is_no_response_is_502() {
    for head in [
        "hello\r\n\r\n",
        "HTTP/1.1\r\n\r\n",
        "HTTP/1.1 20 OK\r\n\r\n",
        "HTTP/1.1 2000 OK\r\n\r\n",
        "HTTP/1.1 099 OK\r\n\r\n",
        "HTTP/1.1 600 OK\r\n\r\n",
        "HTTP/1.1 2x0 OK\r\n\r\n",
        "HTTP/1.1  200 OK\r\n\r\n",
        "HTTP/1.1 200OK\r\n\r\n",
        "HTTP/2 200 OK\r\n\r\n",
        "HTTP/1.2 200 OK\r\n\r\n",
        "ICY 200 OK\r\n\r\n",
        "\r\nHTTP/1.1 200 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: 1\r\n y\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n",
        "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\n",
        "HTTP/1.0 100 Continue\r\n\r\n",
        "HTTP/1.1 101 Switching\r\n\r\n",
    ] {
        let status = parse(head, &GET).map_err(|r| r.of_upstream().status);
        assert_eq!(status.map(|r| r.head), Err(Status::BadGateway), "{head:?}");
    }
}

proptest! {
    #[test]
    fn what_is_passed_on_has_one_meaning(
        status in "(1[0-9]{2}|200|204|304|[2-6][0-9]{2})",
        fields in proptest::collection::vec("(Content-Length|Transfer-Encoding|Connection|Upgrade|X-[a-z]{1,3}) ?: ?(5|05|chunked|close|x-a|[ -~]{0,6})", 0..6),
        to_head: bool, old: bool,
    ) {
        let asked = Asked { to_head, minor: u8::from(!old), keep_alive: !old, ..GET };
        let head = format!("HTTP/1.1 {status} OK\r\n{}\r\n\r\n", fields.join("\r\n")).replace("\r\n\r\n\r\n", "\r\n\r\n");
        if let Ok(first) = parse(&head, &asked) && !first.head.is_empty() {
            let second = parse(text(&first), &asked).expect("what we write is good");
            prop_assert_eq!(second.status, first.status);
            if let (Kind::Final { body: a, keep_client, .. }, Kind::Final { body: b, .. }) = (first.kind, second.kind) {
                // Chunks become a body until close for an old client.
                prop_assert_eq!(if old && a == Body::Chunked { Body::UntilClose } else { a }, b);
                prop_assert_eq!(!keep_client, text(&first).contains("\r\nConnection: close"));
                prop_assert!(text(&first).contains("\r\nStrict-Transport-Security: max-age=9\r\n"));
            }
        }
    }
}
