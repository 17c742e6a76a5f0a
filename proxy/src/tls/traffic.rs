//! The traffic secrets of TLS 1.3, and the keys that follow keys (RFC 8446 sections 7.2 and 7.3).
//!
//!   rustls, in a handshake ─▶ Catcher ─▶ caught() ─▶ Traffic ─▶ next() ─▶ a key and an iv, for each KeyUpdate
//!
//! rustls would derive them too, by a `KernelConnection` that weighs 0.8 KiB, and every idle connection would keep one for
//! a KeyUpdate that hardly any client sends. So the two secrets are caught where rustls hands them to a key log, and
//! nothing of its connection is kept. They leave this module only as keys, and are erased when dropped.

use crate::sys::ktls::Direction;
use rustls::crypto::tls13::OkmBlock;
use rustls::{CipherSuite, KeyLog, Tls13CipherSuite};
use std::cell::RefCell;
use zeroize::Zeroize;

/// The longest hash of the policies' suites, SHA-384.
const SECRET_BYTES: usize = 48;
const KEY_BYTES: usize = 32;
pub const IV_BYTES: usize = 12;

/// Both directions' current secrets, of a server.
pub struct Traffic {
    /// The client's, which what we receive is protected by.
    rx: Secret,
    tx: Secret,
}

struct Secret {
    bytes: [u8; SECRET_BYTES],
    len: u8,
}

/// One direction's key, erased when dropped.
pub struct NextKey {
    key: [u8; KEY_BYTES],
    len: usize,
    pub iv: [u8; IV_BYTES],
}

impl NextKey {
    pub fn key(&self) -> &[u8] {
        &self.key[..self.len]
    }
}

impl Traffic {
    /// Goes on to a direction's next secret, and gives its key.
    pub fn next(&mut self, direction: Direction, suite: &Tls13CipherSuite) -> Option<NextKey> {
        let secret = match direction {
            Direction::Tx => &mut self.tx,
            Direction::Rx => &mut self.rx,
        };
        let mut next = Secret { bytes: [0; SECRET_BYTES], len: secret.len };
        secret.expand(suite, b"traffic upd", &mut next.bytes[..usize::from(secret.len)])?;
        *secret = next;
        let len = match suite.common.suite {
            CipherSuite::TLS13_AES_128_GCM_SHA256 => 16,
            _ => KEY_BYTES,
        };
        let mut key = NextKey { key: [0; KEY_BYTES], len, iv: [0; IV_BYTES] };
        secret.expand(suite, b"key", &mut key.key[..len])?;
        secret.expand(suite, b"iv", &mut key.iv)?;
        Some(key)
    }
}

impl Secret {
    fn of(bytes: &[u8]) -> Option<Self> {
        let mut secret = Self { bytes: [0; SECRET_BYTES], len: u8::try_from(bytes.len()).ok()? };
        secret.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(secret)
    }

    /// HKDF-Expand-Label with an empty context (RFC 8446 section 7.1).
    fn expand(&self, suite: &Tls13CipherSuite, label: &[u8], into: &mut [u8]) -> Option<()> {
        const PREFIX: &[u8] = b"tls13 ";
        let expander = suite.hkdf_provider.expander_for_okm(&OkmBlock::new(&self.bytes[..usize::from(self.len)]));
        let length = u16::try_from(into.len()).ok()?.to_be_bytes();
        let label_len = [u8::try_from(PREFIX.len() + label.len()).ok()?];
        expander.expand_slice(&[&length, &label_len, PREFIX, label, &[0]], into).ok()
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

impl Drop for NextKey {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

#[derive(Default)]
struct Caught {
    rx: Option<Secret>,
    tx: Option<Secret>,
}

thread_local! {
    /// Of the handshake that this thread has just gone on with.
    static CAUGHT: RefCell<Caught> = RefCell::default();
}

/// What the last calls into rustls on this thread have derived, once.
pub fn caught() -> Option<Box<Traffic>> {
    let Caught { rx, tx } = CAUGHT.take();
    Some(Box::new(Traffic { rx: rx?, tx: tx? }))
}

/// Takes the two secrets; it writes nothing anywhere.
#[derive(Debug)]
pub struct Catcher;

const CLIENT: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER: &str = "SERVER_TRAFFIC_SECRET_0";

impl KeyLog for Catcher {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        CAUGHT.with_borrow_mut(|caught| match label {
            CLIENT => caught.rx = Secret::of(secret),
            SERVER => caught.tx = Secret::of(secret),
            _ => {}
        });
    }

    fn will_log(&self, label: &str) -> bool {
        matches!(label, CLIENT | SERVER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::crypto::aws_lc_rs::cipher_suite as suites;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("hex");
        digits.chunks(2).map(pair).collect()
    }

    /// The key and iv of RFC 8448 section 3, from the server's application traffic secret there.
    #[test]
    fn keys_are_those_of_the_rfc_s_trace() {
        let secret =
            Secret::of(&hex("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643")).expect("fits");
        let suite = suites::TLS13_AES_128_GCM_SHA256.tls13().expect("TLS 1.3");
        let (mut key, mut iv) = ([0; 16], [0; 12]);
        secret.expand(suite, b"key", &mut key).expect("short");
        secret.expand(suite, b"iv", &mut iv).expect("short");
        assert_eq!(key.to_vec(), hex("9f02283b6c9c07efc26bb9f2ac92e356"));
        assert_eq!(iv.to_vec(), hex("cf782b88dd83549aadf1e984"));
    }

    #[test]
    fn each_direction_goes_on_by_itself() {
        let secret = |byte: u8| Secret::of(&[byte; 48]).expect("fits");
        let mut traffic = Traffic { rx: secret(1), tx: secret(2) };
        let suite = suites::TLS13_AES_256_GCM_SHA384.tls13().expect("TLS 1.3");
        let mut next = |direction| traffic.next(direction, suite).expect("short").key().to_vec();
        let keys = [next(Direction::Tx), next(Direction::Tx), next(Direction::Rx), next(Direction::Rx)];
        assert!(keys.iter().all(|key| key.len() == 32));
        assert!((0..4).all(|a| (0..a).all(|b| keys[a] != keys[b])));
    }

    #[test]
    fn nothing_is_caught_twice_or_by_halves() {
        Catcher.log(CLIENT, &[], &[1; 32]);
        assert!(caught().is_none());
        Catcher.log(CLIENT, &[], &[1; 32]);
        Catcher.log(SERVER, &[], &[2; 32]);
        Catcher.log("EXPORTER_SECRET", &[], &[3; 32]);
        assert!(caught().is_some());
        assert!(caught().is_none());
        assert!(!Catcher.will_log("CLIENT_RANDOM") && !Catcher.will_log("EXPORTER_SECRET"));
    }
}
