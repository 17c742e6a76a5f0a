//! A request's head: understood, judged, and written anew for the upstream.
//!
//!   bytes ─▶ Scanner ─▶ httparse ─▶ Seen (what frames, routes, controls) ─▶ Request, with the upstream's head
//!
//! What is passed on has one Host, one framing, no field of the client's connection, and our word for where the client
//! is and how it came (RFC 7239); what it said of that itself is dropped, since anybody can say it.

use super::field::{Connection, Field, members};
use super::framing::{Body, Framing};
use super::head::FIELDS_MAX;
use super::refusal::{Refusal, Status};
use super::target::{Target, is_host};
use httparse::Header;
use std::net::IpAddr;

/// What an upstream gets for a client of HTTP/1.0 that names no host: HTTP/1.1 asks for one, and an empty one is refused.
const NO_HOST: &str = "localhost";

/// What the relay has to know of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// What the upstream is asked for: a path with its query, or `*`.
    pub target: String,
    /// Empty only where an HTTP/1.0 client named none.
    pub host: String,
    pub body: Body,
    /// The minor version: 0 or 1.
    pub minor: u8,
    /// The client wants the connection to go on.
    pub keep_alive: bool,
    /// The protocols that the client asks to go on with, in its words.
    pub upgrade: Option<String>,
    /// What its trailers must not be either.
    pub connection: Connection,
    /// The head as the upstream gets it.
    pub head: Vec<u8>,
}

impl Request {
    pub fn is_head(&self) -> bool {
        self.method == "HEAD"
    }

    /// The path without its query, for the log.
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// May be sent again when an upstream goes away without an answer: idempotent, and nothing of a body is lost
    /// (RFC 9110 section 9.2.2).
    pub fn is_replayable(&self) -> bool {
        self.body == Body::None
            && self.upgrade.is_none()
            && matches!(self.method.as_str(), "GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE")
    }

    /// Parses a whole head, which a `Scanner` has found, of a client at this address.
    ///
    /// # Errors
    /// What cannot be passed on without a doubt about its meaning.
    pub fn parse(head: &[u8], client: IpAddr) -> Result<Self, Refusal> {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut parsed = httparse::Request::new(&mut fields);
        match parsed.parse(head) {
            Ok(httparse::Status::Complete(end)) if end == head.len() => {}
            Ok(_) => return Err(Refusal::bad_request("a head that ends elsewhere")),
            Err(e) => return Err(refusal(e, head)),
        }
        let (Some(method), Some(target), Some(minor)) = (parsed.method, parsed.path, parsed.version) else {
            return Err(Refusal::bad_request("a request line without its three parts"));
        };
        match method {
            "CONNECT" => return Err(Refusal::new(Status::NotImplemented, "CONNECT")),
            // It would show the client what only the upstream is told.
            "TRACE" => return Err(Refusal::new(Status::MethodNotAllowed, "TRACE")),
            _ => {}
        }
        let target = Target::parse(method, target)?;
        let seen = Seen::of(parsed.headers, minor)?;
        if method == "OPTIONS" && seen.max_forwards == Some(0) {
            // RFC 9110 section 7.6.2: it is for us, and we have no options.
            return Err(Refusal::new(Status::NotImplemented, "OPTIONS with Max-Forwards 0"));
        }
        let mut request = Self {
            method: method.to_owned(),
            target: target.path.into_owned(),
            host: seen.host(target.authority, minor)?.to_owned(),
            body: seen.framing.of_request()?,
            minor,
            keep_alive: minor == 1 && !seen.connection.close,
            upgrade: None,
            connection: Connection::default(),
            head: Vec::with_capacity(head.len() + 256),
        };
        if minor == 1 && seen.connection.upgrade && request.body == Body::None {
            request.upgrade = seen.upgrade.filter(|all| members(all).all(may_take_over)).map(str::to_owned);
        }
        request.write(&seen, parsed.headers, client);
        request.connection = seen.connection;
        Ok(request)
    }

    fn write(&mut self, seen: &Seen<'_>, fields: &[Header<'_>], client: IpAddr) {
        let mut out = std::mem::take(&mut self.head);
        let host = if self.host.is_empty() { NO_HOST } else { &self.host };
        say(&mut out, &[&self.method, " ", &self.target, " HTTP/1.1\r\nHost: ", host, "\r\n"]);
        for field in fields {
            let keep = match Field::of(field.name) {
                Field::Other | Field::Date | Field::StrictTransportSecurity => !seen.connection.names(field.name),
                Field::Expect => self.minor == 1 && !seen.connection.names(field.name),
                Field::MaxForwards => self.method != "OPTIONS" && !seen.connection.names(field.name),
                Field::Host
                | Field::ContentLength
                | Field::TransferEncoding
                | Field::Connection
                | Field::Upgrade
                | Field::Te
                | Field::HopByHop
                | Field::Forwarding
                | Field::Disguised => false,
            };
            if keep {
                put(&mut out, field.name, field.value);
            }
        }
        if let (Some(hops), "OPTIONS", false) =
            (seen.max_forwards, self.method.as_str(), seen.connection.names("max-forwards"))
        {
            say(&mut out, &["Max-Forwards: ", &(hops - 1).to_string(), "\r\n"]);
        }
        match self.body {
            Body::Length(length) => say(&mut out, &["Content-Length: ", &length.to_string(), "\r\n"]),
            Body::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
            // RFC 9110 section 8.6: a method that usually has a body says that there is none.
            Body::None if seen.framing.is_framed() => out.extend_from_slice(b"Content-Length: 0\r\n"),
            Body::None | Body::UntilClose => {}
        }
        match (&self.upgrade, seen.te_trailers) {
            (Some(protocols), _) => say(&mut out, &["Connection: upgrade\r\nUpgrade: ", protocols, "\r\n"]),
            (None, true) => out.extend_from_slice(b"Connection: TE\r\nTE: trailers\r\n"),
            (None, false) => {}
        }
        let address = client.to_string();
        let [open, close] = if client.is_ipv6() { ["\"[", "]\""] } else { [""; 2] };
        say(&mut out, &["X-Forwarded-For: ", &address, "\r\nX-Forwarded-Proto: https\r\n"]);
        if self.host.is_empty() {
            say(&mut out, &["Forwarded: for=", open, &address, close, ";proto=https\r\n"]);
        } else {
            let host = &self.host;
            say(&mut out, &["X-Forwarded-Host: ", host, "\r\nForwarded: for=", open, &address, close]);
            say(&mut out, &[";proto=https;host=\"", host, "\"\r\n"]);
        }
        say(&mut out, &["Via: 1.", if self.minor == 0 { "0" } else { "1" }, " tlsplice\r\n\r\n"]);
        self.head = out;
    }
}

/// Appends text, piece by piece: every request is written, and formatting would take more than the rest of it.
pub(super) fn say(out: &mut Vec<u8>, pieces: &[&str]) {
    for piece in pieces {
        out.extend_from_slice(piece.as_bytes());
    }
}

/// Appends one field line.
pub(super) fn put(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// A protocol that may take the connection over. One that carries HTTP requests would carry them past every check here.
fn may_take_over(protocol: &str) -> bool {
    let protocol = protocol.to_ascii_lowercase();
    !["h2", "http", "tls"].iter().any(|known| protocol.starts_with(known))
}

fn refusal(error: httparse::Error, head: &[u8]) -> Refusal {
    match error {
        httparse::Error::TooManyHeaders => Refusal::new(Status::FieldsTooLarge, "more fields than a head may have"),
        httparse::Error::Version if names_another_version(head) => {
            Refusal::new(Status::VersionNotSupported, "a version other than HTTP/1.0 and HTTP/1.1")
        }
        httparse::Error::Version => Refusal::bad_request("a request line without a version"),
        httparse::Error::HeaderName => Refusal::bad_request("a field name that is no token"),
        httparse::Error::HeaderValue => Refusal::bad_request("a field value with a control byte"),
        httparse::Error::NewLine | httparse::Error::Status | httparse::Error::Token => {
            Refusal::bad_request("a request line that is none")
        }
    }
}

/// The first line has three parts, and the last is a version.
fn names_another_version(head: &[u8]) -> bool {
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    let mut parts = line.split(|b| *b == b' ').skip(2);
    let version = parts.next().unwrap_or_default();
    let is_version = matches!(version, [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit());
    is_version && parts.next().is_none()
}

/// What frames, routes and controls a request, each at most once.
#[derive(Default)]
struct Seen<'a> {
    framing: Framing,
    connection: Connection,
    host: Option<&'a str>,
    upgrade: Option<&'a str>,
    te_trailers: bool,
    max_forwards: Option<u64>,
}

impl<'a> Seen<'a> {
    fn of(fields: &[Header<'a>], minor: u8) -> Result<Self, Refusal> {
        let mut seen = Self::default();
        for field in fields {
            seen.add(field, minor)?;
        }
        Ok(seen)
    }

    fn add(&mut self, field: &Header<'a>, minor: u8) -> Result<(), Refusal> {
        let text = |why| std::str::from_utf8(field.value).map_err(|_| Refusal::bad_request(why));
        match Field::of(field.name) {
            Field::ContentLength => self.framing.add_length(field.value)?,
            Field::TransferEncoding => self.framing.add_transfer_encoding(field.value, minor)?,
            Field::Disguised => return Err(Refusal::bad_request("a framing field in disguise")),
            Field::Connection => self.connection.add(text("a Connection that is no text")?)?,
            Field::Host => {
                let host = text("a Host that is no text")?;
                if self.host.replace(host).is_some() {
                    return Err(Refusal::bad_request("more than one Host"));
                }
                if !is_host(host) {
                    return Err(Refusal::bad_request("a Host that is none"));
                }
            }
            Field::Expect => {
                if !field.value.eq_ignore_ascii_case(b"100-continue") {
                    return Err(Refusal::new(Status::ExpectationFailed, "an Expect other than 100-continue"));
                }
            }
            Field::Upgrade => {
                if self.upgrade.replace(text("an Upgrade that is no text")?).is_some() {
                    return Err(Refusal::bad_request("more than one Upgrade"));
                }
            }
            Field::Te => self.te_trailers |= members(text("a TE that is no text")?).any(is_trailers),
            Field::MaxForwards => {
                let hops = text("a Max-Forwards that is no text")?;
                let is_number = !hops.is_empty() && hops.bytes().all(|b| b.is_ascii_digit());
                let hops = if is_number { hops.parse().ok() } else { None };
                self.max_forwards = Some(hops.ok_or(Refusal::bad_request("a Max-Forwards that is no number"))?);
            }
            Field::Other | Field::Date | Field::StrictTransportSecurity | Field::HopByHop | Field::Forwarding => {}
        }
        Ok(())
    }

    /// RFC 9112 section 3.2: exactly one Host, and the target's authority instead where it has one.
    fn host(&self, authority: Option<&'a str>, minor: u8) -> Result<&'a str, Refusal> {
        match (self.host, authority) {
            (None, _) if minor == 1 => Err(Refusal::bad_request("no Host")),
            (_, Some(authority)) => Ok(authority),
            (Some(host), None) => Ok(host),
            (None, None) => Ok(""),
        }
    }
}

fn is_trailers(coding: &str) -> bool {
    coding.eq_ignore_ascii_case("trailers")
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
