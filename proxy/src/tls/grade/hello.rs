//! ClientHellos of our own, and what servers answer: rustls cannot offer what must be refused.
//!
//!   Offer ─▶ ClientHello ─▶ (socket, elsewhere) ─▶ records ─▶ Answer: hello, chain, key exchange, or an alert
//!
//! In TLS 1.3 no key share is offered, so the server names its suite and group in a HelloRetryRequest and no key is
//! needed. Nothing is ever decrypted here.

use super::Protocol;
use crate::tls::x509::ec_as_rsa_bits;
use rustls::pki_types::CertificateDer;

/// One offer.
#[derive(Debug, Clone)]
pub struct Offer<'a> {
    pub version: Protocol,
    pub suites: &'a [u16],
    pub groups: &'a [u16],
    pub name: Option<&'a str>,
    pub compression: bool,
    pub fallback: bool,
}

/// What the server made of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    pub hello: Option<ServerHello>,
    pub chain: Vec<CertificateDer<'static>>,
    pub exchange: Option<Exchange>,
    /// The description of a fatal alert.
    pub alert: Option<u8>,
    /// ServerHelloDone, or all there is to see in TLS 1.3.
    pub complete: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerHello {
    pub version: u16,
    pub suite: u16,
    pub compressed: bool,
    pub secure_renegotiation: bool,
    /// TLS 1.3.
    pub group: Option<u16>,
}

/// The key exchange of TLS 1.2 and older.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchange {
    Group(u16),
    DiffieHellman { bits: u32 },
}

impl Exchange {
    pub fn name(self) -> String {
        match self {
            Self::Group(id) => group(id).map_or_else(|| format!("group {id}"), |(name, _)| name.to_owned()),
            Self::DiffieHellman { bits } => format!("DH {bits}"),
        }
    }

    pub fn as_rsa_bits(self) -> u32 {
        match self {
            Self::Group(id) => group(id).map_or(3072, |(_, bits)| bits),
            Self::DiffieHellman { bits } => bits,
        }
    }
}

/// Groups, with the curve's bits or those of the prime.
const GROUPS: [(u16, &str, u32); 21] = [
    (0x11ec, "X25519MLKEM768", 255),
    (0x11eb, "SecP256r1MLKEM768", 256),
    (29, "x25519", 255),
    (23, "secp256r1", 256),
    (24, "secp384r1", 384),
    (25, "secp521r1", 521),
    (30, "x448", 448),
    (26, "brainpoolP256r1", 256),
    (27, "brainpoolP384r1", 384),
    (28, "brainpoolP512r1", 512),
    (22, "secp256k1", 256),
    (21, "secp224r1", 224),
    (19, "secp192r1", 192),
    (16, "secp160r1", 160),
    (1, "sect163k1", 163),
    (9, "sect283k1", 283),
    (256, "ffdhe2048", 2048),
    (257, "ffdhe3072", 3072),
    (258, "ffdhe4096", 4096),
    (259, "ffdhe6144", 6144),
    (260, "ffdhe8192", 8192),
];

pub fn all_groups() -> Vec<u16> {
    GROUPS.iter().map(|(id, _, _)| *id).collect()
}

/// Name, and the bits of RSA that are as strong.
pub fn group(id: u16) -> Option<(&'static str, u32)> {
    let (_, name, bits) = GROUPS.iter().find(|(known, _, _)| *known == id)?;
    Some((name, if *bits >= 1024 { *bits } else { ec_as_rsa_bits(*bits) }))
}

const RENEGOTIATION_SCSV: u16 = 0x00ff;
const FALLBACK_SCSV: u16 = 0x5600;
const RENEGOTIATION_INFO: u16 = 0xff01;
/// Everything that was ever in use, best first: the chain should not be withheld for want of one.
const SIGNATURES: [u16; 16] = [
    0x0403, 0x0503, 0x0603, 0x0807, 0x0808, 0x0804, 0x0805, 0x0806, 0x0401, 0x0501, 0x0601, 0x0203, 0x0201, 0x0402,
    0x0202, 0x0101,
];
/// The random of a ServerHello that is a HelloRetryRequest begins so (RFC 8446 section 4.1.3).
const RETRY_RANDOM: [u8; 4] = [0xcf, 0x21, 0xad, 0x74];

impl Offer<'_> {
    fn wire_version(&self) -> u16 {
        match self.version {
            Protocol::Ssl2 => 0x0002,
            Protocol::Ssl3 => 0x0300,
            Protocol::Tls10 => 0x0301,
            Protocol::Tls11 => 0x0302,
            Protocol::Tls12 | Protocol::Tls13 => 0x0303,
        }
    }

    /// The record, or an SSL 2.0 message.
    pub fn to_bytes(&self, random: [u8; 32]) -> Vec<u8> {
        if self.version == Protocol::Ssl2 {
            return ssl2_hello(random);
        }
        let tls13 = self.version == Protocol::Tls13;
        let mut suites: Vec<u16> = self.suites.to_vec();
        if !tls13 {
            suites.push(RENEGOTIATION_SCSV);
        }
        if self.fallback {
            suites.push(FALLBACK_SCSV);
        }
        let mut body = self.wire_version().to_be_bytes().to_vec();
        body.extend(random);
        // A session id, as TLS 1.3's compatibility mode has it.
        put(&mut body, 1, if tls13 { &random } else { &[] });
        put(&mut body, 2, &words(&suites));
        put(&mut body, 1, if self.compression { &[1, 0] } else { &[0] });
        if self.version != Protocol::Ssl3 {
            put(&mut body, 2, &self.extensions());
        }
        let mut message = vec![1];
        put(&mut message, 3, &body);
        let mut record = vec![22, 3, if self.version == Protocol::Ssl3 { 0 } else { 1 }];
        put(&mut record, 2, &message);
        record
    }

    fn extensions(&self) -> Vec<u8> {
        let mut extensions = Vec::new();
        let mut add = |kind: u16, body: &[u8]| {
            extensions.extend(kind.to_be_bytes());
            put(&mut extensions, 2, body);
        };
        if let Some(name) = self.name {
            let (mut entry, mut list) = (vec![0], Vec::new());
            put(&mut entry, 2, name.as_bytes());
            put(&mut list, 2, &entry);
            add(0, &list);
        }
        let mut groups = Vec::new();
        put(&mut groups, 2, &words(self.groups));
        add(10, &groups);
        add(11, &[1, 0]);
        if self.version >= Protocol::Tls12 {
            let mut signatures = Vec::new();
            put(&mut signatures, 2, &words(&SIGNATURES));
            add(13, &signatures);
        }
        if self.version == Protocol::Tls13 {
            add(43, &[2, 3, 4]);
            add(45, &[1, 1]);
            add(51, &[0, 0]);
        }
        extensions
    }
}

fn ssl2_hello(random: [u8; 32]) -> Vec<u8> {
    const SPECS: [u8; 21] = [1, 0, 0x80, 2, 0, 0x80, 3, 0, 0x80, 4, 0, 0x80, 5, 0, 0x80, 6, 0, 0x40, 7, 0, 0xc0];
    let mut body = vec![1, 0, 2, 0, SPECS.len() as u8, 0, 0, 0, 16];
    body.extend(SPECS);
    body.extend(&random[..16]);
    [&[0x80, body.len() as u8], body.as_slice()].concat()
}

fn words(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// Appends `part` with its length in `width` bytes.
fn put(to: &mut Vec<u8>, width: usize, part: &[u8]) {
    to.extend_from_slice(&part.len().to_be_bytes()[8 - width..]);
    to.extend_from_slice(part);
}

/// Takes a vector with its length in `width` bytes.
fn take<'a>(from: &mut &'a [u8], width: usize) -> Option<&'a [u8]> {
    let length = fixed(from, width)?.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    fixed(from, length)
}

fn fixed<'a>(from: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (part, rest) = from.split_at_checked(length)?;
    *from = rest;
    Some(part)
}

fn word(from: &mut &[u8]) -> Option<u16> {
    fixed(from, 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
}

impl Answer {
    /// Reads what has come so far. `complete` says whether more would tell more.
    pub fn read(wire: &[u8]) -> Self {
        let mut answer = Self::default();
        // SSL 2.0: a SERVER-HELLO.
        if let [high, _, 4, ..] = wire
            && high & 0x80 != 0
        {
            answer.hello =
                Some(ServerHello { version: 2, suite: 0, compressed: false, secure_renegotiation: false, group: None });
            answer.complete = true;
            return answer;
        }
        let mut messages = Vec::new();
        let mut rest = wire;
        while let [kind, 3, _, ..] = rest {
            let kind = *kind;
            rest = &rest[3..];
            let Some(body) = take(&mut rest, 2) else { break };
            match (kind, body) {
                (22, body) => messages.extend_from_slice(body),
                (21, [2, description, ..]) => {
                    answer.alert = Some(*description);
                    answer.complete = true;
                }
                // A warning goes on; anything else is protected, and the end of what can be seen.
                (21, _) => {}
                _ => answer.complete = true,
            }
        }
        let mut messages = messages.as_slice();
        while let [kind, ..] = messages {
            let kind = *kind;
            messages = &messages[1..];
            let Some(body) = take(&mut messages, 3) else { break };
            answer.message(kind, body);
        }
        answer
    }

    fn message(&mut self, kind: u8, body: &[u8]) {
        match kind {
            2 => {
                self.hello = server_hello(body);
                self.complete |= self.hello.as_ref().is_none_or(|hello| hello.version == 0x0304);
            }
            11 => self.chain = chain(body).unwrap_or_default(),
            12 => self.exchange = self.hello.as_ref().and_then(|hello| exchange(hello.suite, body)),
            14 => self.complete = true,
            _ => {}
        }
    }
}

fn server_hello(mut body: &[u8]) -> Option<ServerHello> {
    let body = &mut body;
    let mut version = word(body)?;
    let random = fixed(body, 32)?;
    let is_retry = random.starts_with(&RETRY_RANDOM);
    take(body, 1)?;
    let suite = word(body)?;
    let compressed = fixed(body, 1)? != [0];
    let mut hello = ServerHello { version, suite, compressed, secure_renegotiation: false, group: None };
    let mut extensions = if body.is_empty() { &[] } else { take(body, 2)? };
    while !extensions.is_empty() {
        let kind = word(&mut extensions)?;
        let mut extension = take(&mut extensions, 2)?;
        match kind {
            43 => version = word(&mut extension)?,
            51 => hello.group = word(&mut extension),
            RENEGOTIATION_INFO => hello.secure_renegotiation = true,
            _ => {}
        }
    }
    hello.version = if is_retry { 0x0304 } else { version };
    Some(hello)
}

fn chain(mut body: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let mut list = take(&mut body, 3)?;
    let mut chain = Vec::new();
    while !list.is_empty() {
        chain.push(CertificateDer::from(take(&mut list, 3)?.to_vec()));
    }
    Some(chain)
}

/// ServerKeyExchange, by the suite.
fn exchange(suite: u16, mut body: &[u8]) -> Option<Exchange> {
    let name = super::probe::suite_name(suite)?;
    let body = &mut body;
    if name.contains("ECDH") {
        // named_curve
        if fixed(body, 1)? != [3] {
            return None;
        }
        return word(body).map(Exchange::Group);
    }
    if name.contains("DH") {
        let prime = take(body, 2)?;
        let zeros = prime.iter().take_while(|byte| **byte == 0).count();
        let first = prime.get(zeros)?;
        let bits = (prime.len() - zeros) * 8 - first.leading_zeros() as usize;
        return Some(Exchange::DiffieHellman { bits: u32::try_from(bits).ok()? });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_or_changed_anywhere_never_panics() {
        let mut hello = vec![3, 3];
        hello.extend([9; 32]);
        hello.extend([0, 0xc0, 0x2f, 0, 0, 5, 0xff, 1, 0, 1, 0]);
        let mut messages = vec![2];
        put(&mut messages, 3, &hello);
        messages.extend([12, 0, 0, 4, 3, 0, 23, 0]);
        messages.extend([14, 0, 0, 0]);
        let mut wire = vec![22, 3, 3];
        put(&mut wire, 2, &messages);
        let answer = Answer::read(&wire);
        let hello = answer.hello.expect("a ServerHello");
        assert!(hello.secure_renegotiation && answer.complete);
        assert_eq!((hello.suite, answer.exchange), (0xc02f, Some(Exchange::Group(23))));
        for at in 0..wire.len() {
            Answer::read(&wire[..at]);
            for byte in [0, 3, 0x7f, 0xff] {
                let mut bad = wire.clone();
                bad[at] = byte;
                Answer::read(&bad);
            }
        }
        assert_eq!(Answer::read(&[21, 3, 3, 0, 2, 2, 86]).alert, Some(86));
    }
}
