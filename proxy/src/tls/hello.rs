//! Reads a ClientHello before rustls does, for what rustls does not look at.
//!
//!   records ─▶ handshake message ─▶ ClientHello ─▶ fallback? unknown name? ─▶ pass, or the alert
//!
//! TLS 1.1 and older (rustls says handshake_failure, and not why), TLS_FALLBACK_SCSV (RFC 7507) and, with `strict_sni`, names that are not served (RFC 6066 section 3). What cannot be
//! read passes: rustls finds the words for it. Nothing here is negotiated.

use super::resolver::Resolver;
use crate::protect::{HEADER_BYTES, record_bytes};
use std::sync::Arc;

const CONTENT_HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const TLS_FALLBACK_SCSV: [u8; 2] = [0x56, 0x00];
const TLS13: [u8; 2] = [3, 4];
const TLS12: [u8; 2] = [3, 3];
const TLS10: [u8; 2] = [3, 1];
const EXTENSION_SERVER_NAME: u16 = 0;
const EXTENSION_SUPPORTED_VERSIONS: u16 = 43;

/// What this server refuses before rustls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the client offers no version above TLS 1.1")]
    OldVersion,
    /// RFC 7507 section 3. Every policy has TLS 1.3.
    #[error("the client falls back below TLS 1.3 (TLS_FALLBACK_SCSV)")]
    Fallback,
    #[error("no certificate has the name that the client asks for (strict_sni)")]
    UnknownName,
}

impl Refusal {
    /// A fatal alert, unprotected, in a record of the client's own version.
    fn alert_record(self, version: [u8; 2]) -> [u8; 7] {
        let description = match self {
            Self::OldVersion => 70,
            Self::Fallback => 86,
            Self::UnknownName => 112,
        };
        let [major, minor] = version;
        [21, major, minor, 0, 2, 2, description]
    }
}

/// What came of a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// The message is not complete.
    Incomplete,
    Passes,
    Refused {
        why: Refusal,
        alert: [u8; 7],
    },
}

/// What a ClientHello is held against, and what has come of it.
pub struct Gate {
    strict: Option<Arc<Resolver>>,
    message: Vec<u8>,
}

impl Gate {
    pub fn new(strict: Option<Arc<Resolver>>) -> Self {
        Self { strict, message: Vec::new() }
    }

    /// Judges a connection by its next record. Each is given once, before rustls has it: a hello may come in ten thousand,
    /// and rustls moves their parts together where they lie.
    pub fn judge(&mut self, record: &[u8]) -> Judgement {
        let message = match put_together(&mut self.message, record) {
            Message::Incomplete => return Judgement::Incomplete,
            Message::Other => return Judgement::Passes,
            Message::ClientHello(body) => body,
        };
        let Some(hello) = Hello::read(message) else { return Judgement::Passes };
        // What is no version is answered as TLS 1.0, which everybody reads.
        let version = if hello.version[0] == 3 { hello.version.min(TLS12) } else { TLS10 };
        let refused = |why: Refusal| Judgement::Refused { why, alert: why.alert_record(version) };
        if hello.falls_back && !hello.offers_tls13 {
            return refused(Refusal::Fallback);
        }
        if hello.version < TLS12 && !hello.lists_versions {
            return refused(Refusal::OldVersion);
        }
        if let Some(known) = &self.strict
            && !hello.server_name.is_some_and(|name| known.knows(name))
        {
            return refused(Refusal::UnknownName);
        }
        Judgement::Passes
    }
}

enum Message<'a> {
    Incomplete,
    Other,
    ClientHello(&'a [u8]),
}

/// The first handshake message, with what this record has of it.
fn put_together<'a>(message: &'a mut Vec<u8>, record: &[u8]) -> Message<'a> {
    let Some(len) = record_bytes(record).filter(|len| *len <= record.len()) else { return Message::Incomplete };
    if record[0] != CONTENT_HANDSHAKE {
        // rustls passes over a warning before the hello, and refuses what has no place there.
        return Message::Incomplete;
    }
    message.extend_from_slice(&record[HEADER_BYTES..len]);
    match message.as_slice() {
        [CLIENT_HELLO, a, b, c, rest @ ..] => {
            let body = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
            rest.get(..body).map_or(Message::Incomplete, Message::ClientHello)
        }
        [CLIENT_HELLO, ..] | [] => Message::Incomplete,
        [..] => Message::Other,
    }
}

/// What is asked of a ClientHello (RFC 8446 section 4.1.2).
struct Hello<'a> {
    version: [u8; 2],
    lists_versions: bool,
    falls_back: bool,
    offers_tls13: bool,
    server_name: Option<&'a str>,
}

impl<'a> Hello<'a> {
    fn read(body: &'a [u8]) -> Option<Self> {
        let mut rest = body.get(2 + 32..)?;
        vector(&mut rest, 1)?;
        let suites = vector(&mut rest, 2)?;
        vector(&mut rest, 1)?;
        let mut hello = Self {
            version: [*body.first()?, *body.get(1)?],
            lists_versions: false,
            falls_back: suites.chunks_exact(2).any(|suite| suite == TLS_FALLBACK_SCSV),
            offers_tls13: false,
            server_name: None,
        };
        // SSL 3.0 and TLS 1.0 allow a hello without extensions.
        let mut extensions = if rest.is_empty() { rest } else { vector(&mut rest, 2)? };
        while let [a, b, ..] = extensions {
            let kind = u16::from_be_bytes([*a, *b]);
            extensions = &extensions[2..];
            let mut body = vector(&mut extensions, 2)?;
            if kind == EXTENSION_SUPPORTED_VERSIONS {
                hello.lists_versions = true;
                hello.offers_tls13 = vector(&mut body, 1)?.chunks_exact(2).any(|version| version == TLS13);
            } else if kind == EXTENSION_SERVER_NAME {
                hello.server_name = server_name(body);
            }
        }
        Some(hello)
    }
}

/// The first name of type host_name.
fn server_name(mut body: &[u8]) -> Option<&str> {
    let mut list = vector(&mut body, 2)?;
    let [0, ..] = list else { return None };
    list = &list[1..];
    std::str::from_utf8(vector(&mut list, 2)?).ok()
}

/// Takes a vector with a length of `width` bytes.
fn vector<'a>(from: &mut &'a [u8], width: usize) -> Option<&'a [u8]> {
    let (length, rest) = from.split_at_checked(width)?;
    let length = length.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    let (vector, rest) = rest.split_at_checked(length)?;
    *from = rest;
    Some(vector)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::certificates::testing;

    fn hello(suites: &[u8], extensions: &[u8]) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, suites.len() as u8]);
        body.extend(suites);
        body.extend([1, 0]);
        if !extensions.is_empty() {
            body.extend([0, extensions.len() as u8]);
            body.extend(extensions);
        }
        let mut message = vec![1, 0, 0, body.len() as u8];
        message.extend(body);
        message
    }

    fn records(message: &[u8], each: usize) -> Vec<u8> {
        message.chunks(each).flat_map(|part| [&[22, 3, 1, 0, part.len() as u8], part].concat()).collect()
    }

    /// What comes of the records, each given once.
    fn judge(mut gate: Gate, mut wire: &[u8]) -> Judgement {
        while let Some(len) = record_bytes(wire).filter(|len| *len <= wire.len()) {
            let judgement = gate.judge(&wire[..len]);
            if judgement != Judgement::Incomplete {
                return judgement;
            }
            wire = &wire[len..];
        }
        gate.judge(wire)
    }

    fn refused(why: Refusal) -> Judgement {
        Judgement::Refused { why, alert: why.alert_record(TLS12) }
    }

    const NAME: &[u8] = b"\0\0\0\x0b\0\x09\0\0\x06a.test";
    const VERSIONS: &[u8] = &[0, 43, 0, 5, 4, 3, 4, 3, 3];

    #[test]
    fn a_fallback_is_refused_only_below_tls_13_and_in_whatever_pieces() {
        let gate = || Gate::new(None);
        let scsv = [0xc0, 0x2f, 0x56, 0x00];
        for each in [1, 7, 200] {
            let wire = records(&hello(&scsv, NAME), each);
            assert_eq!(judge(gate(), &wire), refused(Refusal::Fallback));
            assert_eq!(judge(gate(), &wire[..wire.len() - 1]), Judgement::Incomplete);
        }
        assert_eq!(judge(gate(), &records(&hello(&scsv, VERSIONS), 99)), Judgement::Passes);
        assert_eq!(judge(gate(), &records(&hello(&scsv, &[]), 99)), refused(Refusal::Fallback));
        assert_eq!(judge(gate(), &records(&hello(&[0x56, 0xc0, 0x00, 0x2f], &[]), 99)), Judgement::Passes);
    }

    #[test]
    fn of_a_hello_in_ten_thousand_records_each_is_read_once() {
        let mut message = vec![CLIENT_HELLO, 0, 0x27, 0x10];
        message.resize(4 + 10_000, 3);
        let mut gate = Gate::new(None);
        for (n, byte) in message.iter().enumerate() {
            let is_whole = n + 1 == message.len();
            let judgement = gate.judge(&[CONTENT_HANDSHAKE, 3, 1, 0, 1, *byte]);
            assert_eq!(judgement, if is_whole { Judgement::Passes } else { Judgement::Incomplete });
        }
    }

    #[test]
    fn an_old_version_is_told_so_in_its_own_record() {
        for (version, record) in [([3, 2], [3, 2]), ([3, 0], [3, 0]), ([2, 0], [3, 1])] {
            let mut message = hello(&[0xc0, 0x2f], NAME);
            message[4..6].copy_from_slice(&version);
            let alert = Refusal::OldVersion.alert_record(record);
            let said = judge(Gate::new(None), &records(&message, 99));
            assert_eq!(said, Judgement::Refused { why: Refusal::OldVersion, alert });
        }
        let mut message = hello(&[0x13, 1], VERSIONS);
        message[5] = 1;
        assert_eq!(judge(Gate::new(None), &records(&message, 99)), Judgement::Passes);
    }

    #[test]
    fn strict_names_are_those_of_the_certificates() {
        let gate = |names: &[&str]| Gate::new(Some(testing::resolver(names)));
        let wire = records(&hello(&[0x13, 1], &[NAME, VERSIONS].concat()), 99);
        assert_eq!(judge(gate(&["a.test"]), &wire), Judgement::Passes);
        assert_eq!(judge(gate(&["*.test"]), &wire), Judgement::Passes);
        assert_eq!(judge(gate(&["b.test"]), &wire), refused(Refusal::UnknownName));
        let nameless = records(&hello(&[0x13, 1], VERSIONS), 99);
        assert_eq!(judge(gate(&["a.test"]), &nameless), refused(Refusal::UnknownName));
    }

    #[test]
    fn nothing_that_is_no_client_hello_panics_or_is_refused() {
        let whole = records(&hello(&[0x56, 0], VERSIONS), 99);
        for at in 0..whole.len() {
            for byte in [0, 1, 0x7f, 0xff] {
                let mut bad = whole.clone();
                bad[at] = byte;
                judge(Gate::new(None), &bad);
            }
        }
        assert_eq!(Gate::new(None).judge(b"GET / HTTP/1.1\r\n\r\n"), Judgement::Incomplete);
        assert_eq!(Gate::new(None).judge(&[22, 3, 3, 0, 4, 2, 0, 0, 0]), Judgement::Passes);
    }

    #[test]
    fn a_warning_in_front_opens_no_gate() {
        let wire = [&[21, 3, 3, 0, 2, 1, 90][..], &records(&hello(&[0xc0, 0x2f, 0x56, 0x00], NAME), 99)].concat();
        assert_eq!(judge(Gate::new(None), &wire), refused(Refusal::Fallback));
    }
}
