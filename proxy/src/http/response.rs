//! A response's head: understood, judged, and written anew for the client.
//!
//! The upstream is trusted with what it says, not with how: a status line that is none, an interim response that frames
//! a body, a 101 that nobody asked for, a length said twice are 502, whatever a lenient client would make of them.

use super::field::{Connection, Field, members};
use super::framing::{Body, Framing};
use super::head::FIELDS_MAX;
use super::refusal::Refusal;
use super::request::{put, say};
use httparse::Header;
use std::cell::RefCell;
use std::time::{SystemTime, UNIX_EPOCH};

/// What the request that it answers decides about a response.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub to_head: bool,
    /// The client's minor version.
    pub minor: u8,
    pub upgrade: Option<&'a str>,
    /// The client's connection can go on behind this response, as far as the request and we are concerned.
    pub keep_alive: bool,
    pub hsts: &'a str,
}

/// What the relay has to know of a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub kind: Kind,
    /// The head as the client gets it; empty if it does not.
    pub head: Vec<u8>,
    /// What its trailers must not be either.
    pub connection: Connection,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Another head follows.
    Interim,
    /// 101: the connection is the other protocol's now.
    Switched,
    Final {
        body: Body,
        /// The client is told to expect another response on this connection.
        keep_client: bool,
        /// The upstream's connection can take another request behind the body.
        keep_upstream: bool,
    },
}

impl Response {
    /// Parses a whole head, which a `Scanner` has found.
    ///
    /// # Errors
    /// 502, for what a client could understand in another way than we do.
    pub fn parse(head: &[u8], asked: &Asked<'_>) -> Result<Self, Refusal> {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut parsed = httparse::Response::new(&mut fields);
        let mut config = httparse::ParserConfig::default();
        // RFC 9112 section 5.1: a proxy removes it, which writing the head anew does.
        config.allow_spaces_after_header_name_in_responses(true);
        match config.parse_response(&mut parsed, head) {
            Ok(httparse::Status::Complete(end)) if end == head.len() => {}
            Ok(_) => return Err(Refusal::bad_gateway("a response head that ends elsewhere")),
            Err(_) => return Err(Refusal::bad_gateway("a response head that is none")),
        }
        let (Some(minor), Some(status)) = (parsed.version, parsed.code) else {
            return Err(Refusal::bad_gateway("a status line without its parts"));
        };
        let seen = Seen::of(parsed.headers, minor).map_err(Refusal::of_upstream)?;
        let kind = seen.kind(status, minor, asked)?;
        let head = Vec::with_capacity(head.len() + 160);
        let mut response = Self { status, kind, head, connection: Connection::default() };
        // RFC 9110 section 15.2: a client of HTTP/1.0 knows no interim responses.
        if kind != Kind::Interim || asked.minor == 1 {
            response.write(parsed.reason.unwrap_or_default(), &seen, parsed.headers, asked);
        }
        response.connection = seen.connection;
        Ok(response)
    }

    fn write(&mut self, reason: &str, seen: &Seen<'_>, fields: &[Header<'_>], asked: &Asked<'_>) {
        let out = &mut self.head;
        say(out, &["HTTP/1.1 ", &self.status.to_string(), " ", reason, "\r\n"]);
        for field in fields {
            let keep = match Field::of(field.name) {
                Field::Other | Field::Date | Field::Host | Field::Expect | Field::MaxForwards | Field::Forwarding => {
                    !seen.connection.names(field.name)
                }
                Field::StrictTransportSecurity
                | Field::ContentLength
                | Field::TransferEncoding
                | Field::Connection
                | Field::Upgrade
                | Field::Te
                | Field::HopByHop
                | Field::Disguised => false,
            };
            if keep {
                put(out, field.name, field.value);
            }
        }
        match self.kind {
            Kind::Interim => {}
            Kind::Switched => {
                let protocol = seen.upgrade.unwrap_or_default();
                say(out, &["Connection: upgrade\r\nUpgrade: ", protocol, "\r\n"]);
                put(out, "Strict-Transport-Security", asked.hsts.as_bytes());
            }
            Kind::Final { body, keep_client, .. } => {
                if !seen.has_date {
                    put_date(out);
                }
                put(out, "Strict-Transport-Security", asked.hsts.as_bytes());
                match (body, seen.framing.length()) {
                    (Body::Chunked, _) if asked.minor == 1 => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
                    // Behind HEAD and in 304 it tells of a body that is not there.
                    (Body::Length(_) | Body::None, Some(length)) if self.status != 204 => {
                        say(out, &["Content-Length: ", &length.to_string(), "\r\n"]);
                    }
                    (Body::Chunked | Body::Length(_) | Body::None | Body::UntilClose, _) => {}
                }
                match (self.status, seen.upgrade) {
                    // It says which protocol would do (RFC 9110 section 15.5.22).
                    (426, Some(protocol)) if keep_client => {
                        say(out, &["Connection: upgrade\r\nUpgrade: ", protocol, "\r\n"]);
                    }
                    (426, Some(protocol)) => {
                        say(out, &["Connection: close, upgrade\r\nUpgrade: ", protocol, "\r\n"]);
                    }
                    _ if !keep_client => out.extend_from_slice(b"Connection: close\r\n"),
                    _ => {}
                }
            }
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// The time, for a response whose upstream says none (RFC 9110 section 6.6.1). Written once a second and kept: writing it
/// takes what the rest of a head does.
fn put_date(out: &mut Vec<u8>) {
    thread_local! {
        static LAST: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
    }
    let now = SystemTime::now();
    let second = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    LAST.with_borrow_mut(|(of, text)| {
        if *of != second || text.is_empty() {
            (*of, *text) = (second, httpdate::fmt_http_date(now));
        }
        put(out, "Date", text.as_bytes());
    });
}

#[derive(Default)]
struct Seen<'a> {
    framing: Framing,
    connection: Connection,
    upgrade: Option<&'a str>,
    has_date: bool,
}

impl<'a> Seen<'a> {
    fn of(fields: &[Header<'a>], minor: u8) -> Result<Self, Refusal> {
        let mut seen = Self::default();
        for field in fields {
            let text = |why| std::str::from_utf8(field.value).map_err(|_| Refusal::bad_request(why));
            match Field::of(field.name) {
                Field::ContentLength => seen.framing.add_length(field.value)?,
                Field::TransferEncoding => seen.framing.add_transfer_encoding(field.value, minor)?,
                Field::Connection => seen.connection.add(text("a Connection that is no text")?)?,
                Field::Upgrade => seen.upgrade = Some(text("an Upgrade that is no text")?),
                Field::Date => seen.has_date = true,
                Field::Disguised
                | Field::Host
                | Field::Expect
                | Field::Te
                | Field::MaxForwards
                | Field::StrictTransportSecurity
                | Field::HopByHop
                | Field::Forwarding
                | Field::Other => {}
            }
        }
        Ok(seen)
    }

    fn kind(&self, status: u16, minor: u8, asked: &Asked<'_>) -> Result<Kind, Refusal> {
        match status {
            101 => self.switched(asked),
            100..=199 if self.framing.is_framed() => {
                Err(Refusal::bad_gateway("an interim response that frames a body"))
            }
            100..=199 if minor == 0 => Err(Refusal::bad_gateway("an interim response in HTTP/1.0")),
            100..=199 => Ok(Kind::Interim),
            200..=599 => {
                let body = self.framing.of_response(status, asked.to_head).map_err(Refusal::of_upstream)?;
                // Only a length that ends at once, or none, is what a 204 can say; behind another there may be a body.
                let is_odd =
                    status == 204 && (self.framing.is_chunked() || self.framing.length().is_some_and(|n| n > 0));
                let ends = body != Body::UntilClose && !is_odd;
                let is_plain = asked.minor == 1 || body != Body::Chunked;
                Ok(Kind::Final {
                    body,
                    keep_client: asked.keep_alive && ends && is_plain,
                    keep_upstream: minor == 1 && !self.connection.close && ends,
                })
            }
            _ => Err(Refusal::bad_gateway("a status that is none")),
        }
    }

    fn switched(&self, asked: &Asked<'_>) -> Result<Kind, Refusal> {
        let (Some(wanted), Some(chosen)) = (asked.upgrade, self.upgrade) else {
            return Err(Refusal::bad_gateway("a 101 that was not asked for"));
        };
        let is_wanted = |chosen: &str| members(wanted).any(|wanted| wanted.eq_ignore_ascii_case(chosen));
        if self.framing.is_framed() || !self.connection.upgrade || !members(chosen).all(is_wanted) {
            return Err(Refusal::bad_gateway("a 101 for what was not asked for"));
        }
        Ok(Kind::Switched)
    }
}

#[cfg(test)]
#[path = "response_tests.rs"]
mod tests;
