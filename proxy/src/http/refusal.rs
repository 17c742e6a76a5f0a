//! Answers of our own: why a message is not passed on, in a status, a word for the log, and a short body.

use std::fmt;
use std::fmt::Write as _;
use std::time::SystemTime;

/// The statuses that we answer with ourselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    BadRequest,
    MethodNotAllowed,
    RequestTimeout,
    ExpectationFailed,
    FieldsTooLarge,
    NotImplemented,
    BadGateway,
    GatewayTimeout,
    VersionNotSupported,
}

impl Status {
    pub fn code(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::MethodNotAllowed => 405,
            Self::RequestTimeout => 408,
            Self::ExpectationFailed => 417,
            Self::FieldsTooLarge => 431,
            Self::NotImplemented => 501,
            Self::BadGateway => 502,
            Self::GatewayTimeout => 504,
            Self::VersionNotSupported => 505,
        }
    }

    pub fn reason(self) -> &'static str {
        match self {
            Self::BadRequest => "Bad Request",
            Self::MethodNotAllowed => "Method Not Allowed",
            Self::RequestTimeout => "Request Timeout",
            Self::ExpectationFailed => "Expectation Failed",
            Self::FieldsTooLarge => "Request Header Fields Too Large",
            Self::NotImplemented => "Not Implemented",
            Self::BadGateway => "Bad Gateway",
            Self::GatewayTimeout => "Gateway Timeout",
            Self::VersionNotSupported => "HTTP Version Not Supported",
        }
    }
}

/// A message that is not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    pub status: Status,
    /// For the log: the client is told the status and the id only.
    pub why: &'static str,
}

impl Refusal {
    pub const fn new(status: Status, why: &'static str) -> Self {
        Self { status, why }
    }

    pub const fn bad_request(why: &'static str) -> Self {
        Self::new(Status::BadRequest, why)
    }

    pub const fn bad_gateway(why: &'static str) -> Self {
        Self::new(Status::BadGateway, why)
    }

    /// The same fault, found in what an upstream sent.
    pub const fn of_upstream(self) -> Self {
        Self::new(Status::BadGateway, self.why)
    }
}

/// What names one request in the log and in an answer of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id(pub u64);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A whole response of ours, after which the connection closes. `to_head`: the body is only counted.
pub fn page(status: Status, id: Id, hsts: Option<&str>, to_head: bool) -> Vec<u8> {
    let (code, reason) = (status.code(), status.reason());
    let body = format!("{code} {reason}\nid {id}\n");
    let mut text = format!("HTTP/1.1 {code} {reason}\r\nDate: {}\r\n", httpdate::fmt_http_date(SystemTime::now()));
    if let Some(hsts) = hsts {
        let _ = write!(text, "Strict-Transport-Security: {hsts}\r\n");
    }
    if status == Status::MethodNotAllowed {
        // RFC 9110 section 15.5.6 asks for it; what the upstream allows beyond these is its own to say.
        text.push_str("Allow: GET, HEAD, POST, PUT, DELETE, OPTIONS, PATCH\r\n");
    }
    let _ = write!(
        text,
        "Content-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    if !to_head {
        text.push_str(&body);
    }
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_says_its_status_and_id_and_closes() {
        let text = String::from_utf8(page(Status::BadGateway, Id(0xab), Some("max-age=1"), false)).expect("text");
        assert!(text.starts_with("HTTP/1.1 502 Bad Gateway\r\nDate: "), "{text}");
        assert!(text.contains("\r\nStrict-Transport-Security: max-age=1\r\n"), "{text}");
        assert!(text.contains("\r\nConnection: close\r\n"), "{text}");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        assert_eq!(body, "502 Bad Gateway\nid 00000000000000ab\n");
        assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{text}");
        let to_head = page(Status::BadGateway, Id(0xab), None, true);
        assert!(to_head.ends_with(b"\r\n\r\n"));
    }
}
