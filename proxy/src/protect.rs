//! Record protection in userspace: one direction's key, records opened and sealed where they lie.
//!
//!   [header | explicit nonce? | ciphertext | tag]  ◀── seal ── open ──▶  [ … | plaintext | … ]
//!
//! rustls makes the handshake and every key; what protects a record with them is an AEAD (aead.rs), called here as RFC 8446
//! section 5.2, RFC 5246 section 6.2.3.3, RFC 5288 and RFC 7905 say. Against rustls' own record layer this saves two
//! copies and an allocation for each record, and every record's content type and every change of keys is ours to see,
//! which the door to the kernel needs. This module knows no socket.

mod aead;

use crate::tls::traffic::NextKey;
use aead::{Algorithm, BadMac, Key, NONCE_BYTES, TAG_BYTES};
use rustls::{CipherSuite, ConnectionTrafficSecrets, SupportedCipherSuite};
use std::ops::Range;

/// Bytes of a record's header (RFC 8446 section 5.1).
pub const HEADER_BYTES: usize = 5;
/// Plaintext bytes that a full record carries.
pub const PLAIN_BYTES: usize = 16384;
/// The longest record that may be on the wire: RFC 5246 section 6.2.3 allows 2048 bytes of expansion.
pub const WIRE_BYTES: usize = HEADER_BYTES + PLAIN_BYTES + 2048;
/// The most that sealing adds to one record: header, then an explicit nonce and tag, or a content type and tag.
pub const OVERHEAD_BYTES: usize = HEADER_BYTES + EXPLICIT_NONCE_BYTES + TAG_BYTES;

const EXPLICIT_NONCE_BYTES: usize = 8;

/// Why a record cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenError {
    /// The tag is wrong.
    BadMac,
    /// More than 16384 bytes of plaintext, or more ciphertext than that may become.
    Overflow,
    /// Too short for its own tag.
    Malformed,
    /// All padding (RFC 8446 section 5.4).
    NoType,
}

/// How nonce and additional data are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Tls13,
    Tls12Gcm,
    Tls12ChaCha20,
}

/// One direction's key with its sequence number.
pub struct Protection {
    key: Key,
    iv: [u8; NONCE_BYTES],
    sequence: u64,
    form: Form,
}

impl Protection {
    /// `None`: no such suite in any policy.
    pub fn new(suite: SupportedCipherSuite, sequence: u64, secrets: &ConnectionTrafficSecrets) -> Option<Self> {
        use ConnectionTrafficSecrets as S;
        let (algorithm, key, iv) = match secrets {
            // For TLS 1.2 rustls names both sizes so.
            S::Aes128Gcm { key, iv } if key.as_ref().len() == 32 => (Algorithm::Aes256Gcm, key, iv),
            S::Aes128Gcm { key, iv } => (Algorithm::Aes128Gcm, key, iv),
            S::Aes256Gcm { key, iv } => (Algorithm::Aes256Gcm, key, iv),
            S::Chacha20Poly1305 { key, iv } => (Algorithm::ChaCha20Poly1305, key, iv),
            _ => return None,
        };
        let form = match suite {
            SupportedCipherSuite::Tls13(_) => Form::Tls13,
            SupportedCipherSuite::Tls12(_) if matches!(secrets, S::Chacha20Poly1305 { .. }) => Form::Tls12ChaCha20,
            SupportedCipherSuite::Tls12(_) => Form::Tls12Gcm,
        };
        let key = Key::new(algorithm, key.as_ref())?;
        Some(Self { key, iv: iv.as_ref().try_into().ok()?, sequence, form })
    }

    /// Of a key that followed another, in TLS 1.3. `None`: no such suite in any policy.
    pub fn next(suite: SupportedCipherSuite, next: &NextKey) -> Option<Self> {
        let algorithm = match suite.suite() {
            CipherSuite::TLS13_AES_128_GCM_SHA256 => Algorithm::Aes128Gcm,
            CipherSuite::TLS13_AES_256_GCM_SHA384 => Algorithm::Aes256Gcm,
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => Algorithm::ChaCha20Poly1305,
            _ => return None,
        };
        let key = Key::new(algorithm, next.key())?;
        Some(Self { key, iv: next.iv, sequence: 0, form: Form::Tls13 })
    }

    /// Records protected so far: the number of the next.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Bytes before the plaintext in a sealed record.
    pub fn head_bytes(&self) -> usize {
        match self.form {
            Form::Tls12Gcm => HEADER_BYTES + EXPLICIT_NONCE_BYTES,
            Form::Tls13 | Form::Tls12ChaCha20 => HEADER_BYTES,
        }
    }

    /// Bytes behind the plaintext in a sealed record.
    pub fn tail_bytes(&self) -> usize {
        match self.form {
            Form::Tls13 => 1 + TAG_BYTES,
            Form::Tls12Gcm | Form::Tls12ChaCha20 => TAG_BYTES,
        }
    }

    /// iv XOR sequence (RFC 8446 section 5.3); for TLS 1.2 GCM its last 8 bytes are the explicit nonce, as in rustls,
    /// so that the sequence goes on where the handshake left it and no nonce comes twice.
    fn nonce(&self) -> [u8; NONCE_BYTES] {
        let mut nonce = self.iv;
        for (byte, count) in nonce[NONCE_BYTES - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= count;
        }
        nonce
    }

    /// The additional data of TLS 1.2 (RFC 5246 section 6.2.3.3), of a record of `plain` bytes.
    fn tls12_aad(&self, content_type: u8, plain: usize) -> [u8; 13] {
        let mut aad = [0; 13];
        aad[..8].copy_from_slice(&self.sequence.to_be_bytes());
        aad[8..11].copy_from_slice(&[content_type, 3, 3]);
        aad[11..].copy_from_slice(&(plain as u16).to_be_bytes());
        aad
    }

    /// Seals the record in `slot`, whose plaintext of `plain` bytes (at most `PLAIN_BYTES`) lies behind
    /// `head_bytes()` and has `tail_bytes()` behind it. Returns the record's length.
    pub fn seal(&mut self, content_type: u8, slot: &mut [u8], plain: usize) -> usize {
        let head = self.head_bytes();
        let total = head + plain + self.tail_bytes();
        let body = ((total - HEADER_BYTES) as u16).to_be_bytes();
        let nonce = self.nonce();
        let (front, rest) = slot[..total].split_at_mut(head);
        let (text, tag) = rest.split_at_mut(total - head - TAG_BYTES);
        let outer =
            if self.form == Form::Tls13 { crate::sys::ktls::content_type::APPLICATION_DATA } else { content_type };
        front[..HEADER_BYTES].copy_from_slice(&[outer, 3, 3, body[0], body[1]]);
        let sealed = match self.form {
            Form::Tls13 => {
                text[plain] = content_type;
                self.key.seal(nonce, front, text)
            }
            Form::Tls12Gcm | Form::Tls12ChaCha20 => {
                front[HEADER_BYTES..].copy_from_slice(&nonce[NONCE_BYTES - (head - HEADER_BYTES)..]);
                self.key.seal(nonce, &self.tls12_aad(content_type, plain), text)
            }
        };
        tag.copy_from_slice(&sealed);
        self.sequence += 1;
        total
    }

    /// Opens the one record that `record` is, header included. Gives its content type and where its plaintext lies.
    pub fn open(&mut self, record: &mut [u8]) -> Result<(u8, Range<usize>), OpenError> {
        let head = self.head_bytes();
        let expansion = match self.form {
            Form::Tls13 => 256,
            // RFC 5246 allows any cipher 2048; these add this much.
            Form::Tls12Gcm | Form::Tls12ChaCha20 => head - HEADER_BYTES + TAG_BYTES,
        };
        if record.len() > HEADER_BYTES + PLAIN_BYTES + expansion {
            return Err(OpenError::Overflow);
        }
        let plain = record.len().checked_sub(head + TAG_BYTES).ok_or(OpenError::Malformed)?;
        let mut nonce = self.nonce();
        let (front, text) = record.split_at_mut(head);
        let opened = match self.form {
            Form::Tls13 => self.key.open(nonce, front, text),
            Form::Tls12Gcm | Form::Tls12ChaCha20 => {
                nonce[NONCE_BYTES - (head - HEADER_BYTES)..].copy_from_slice(&front[HEADER_BYTES..]);
                self.key.open(nonce, &self.tls12_aad(front[0], plain), text)
            }
        };
        opened.map_err(|BadMac| OpenError::BadMac)?;
        self.sequence += 1;
        let (content_type, len) = match self.form {
            Form::Tls13 => inner_type(&text[..plain])?,
            Form::Tls12Gcm | Form::Tls12ChaCha20 => (front[0], plain),
        };
        if len > PLAIN_BYTES { Err(OpenError::Overflow) } else { Ok((content_type, head..head + len)) }
    }
}

/// The content type behind the data and before the padding (RFC 8446 section 5.4), and the data's length.
fn inner_type(inner: &[u8]) -> Result<(u8, usize), OpenError> {
    let at = inner.iter().rposition(|&byte| byte != 0).ok_or(OpenError::NoType)?;
    Ok((inner[at], at))
}

/// Records that one key of this suite may protect: the suite's own confidentiality limit, which the configuration may
/// only lower. ChaCha20-Poly1305 has none (RFC 8446 section 5.5).
pub fn record_limit(suite: SupportedCipherSuite, configured: u64) -> u64 {
    let own = match suite {
        SupportedCipherSuite::Tls12(s) => s.common.confidentiality_limit,
        SupportedCipherSuite::Tls13(s) => s.common.confidentiality_limit,
    };
    if own == u64::MAX { own } else { own.min(configured) }
}

/// The length of the record at the front, header included, once its header is there.
pub fn record_bytes(wire: &[u8]) -> Option<usize> {
    match wire {
        [_, _, _, high, low, ..] => Some(HEADER_BYTES + usize::from(u16::from_be_bytes([*high, *low]))),
        _ => None,
    }
}

/// How many bytes are missing until the last record of `wire` is complete: first of its header, then of its body.
/// Behind a complete one, the header of the next.
pub fn missing_bytes(mut wire: &[u8]) -> usize {
    loop {
        match record_bytes(wire).map(|len| len.min(WIRE_BYTES)) {
            None => return HEADER_BYTES - wire.len(),
            Some(len) if len > wire.len() => return len - wire.len(),
            Some(len) => wire = &wire[len..],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::crypto::aws_lc_rs::cipher_suite as suites;
    use rustls::crypto::cipher::{AeadKey, Iv};

    fn pairs() -> Vec<(Protection, Protection)> {
        let secret = |chacha: bool| {
            let (key, iv) = (AeadKey::from([7; 32]), Iv::new([9; 12]));
            if chacha {
                ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv }
            } else {
                ConnectionTrafficSecrets::Aes256Gcm { key, iv }
            }
        };
        let suites = [
            (suites::TLS13_AES_256_GCM_SHA384, false),
            (suites::TLS13_CHACHA20_POLY1305_SHA256, true),
            (suites::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, false),
            (suites::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, true),
        ];
        let one = |(suite, chacha)| Protection::new(suite, 1, &secret(chacha)).expect("a suite of the policy");
        suites.into_iter().map(|s| (one(s), one(s))).collect()
    }

    #[test]
    fn what_was_sealed_opens_whole_and_once() {
        for (mut tx, mut rx) in pairs() {
            for len in [0, 1, 100, PLAIN_BYTES] {
                let mut slot = vec![0; PLAIN_BYTES + OVERHEAD_BYTES];
                let head = tx.head_bytes();
                slot[head..head + len].fill(0x5a);
                let total = tx.seal(23, &mut slot, len);
                let mut again = slot[..total].to_vec();
                let (content_type, range) = rx.open(&mut slot[..total]).expect("opens");
                assert_eq!((content_type, range.len()), (23, len));
                assert!(slot[range].iter().all(|&b| b == 0x5a));
                assert_eq!(rx.open(&mut again), Err(OpenError::BadMac), "the sequence has gone on");
                rx.sequence = tx.sequence;
            }
        }
    }

    #[test]
    fn one_byte_changed_anywhere_is_refused() {
        for (mut tx, mut rx) in pairs() {
            let mut slot = vec![0x11; 40 + OVERHEAD_BYTES];
            let total = tx.seal(21, &mut slot, 40);
            // The length field is the reader's to judge: it cut the record out by it.
            for at in (0..total).filter(|at| ![1, 2, 3, 4].contains(at)) {
                let mut bad = slot[..total].to_vec();
                bad[at] ^= 1;
                assert!(rx.open(&mut bad).is_err(), "byte {at}");
            }
            assert!(rx.open(&mut slot[..total]).is_ok());
        }
    }

    #[test]
    fn padding_alone_has_no_type() {
        for (mut tx, mut rx) in pairs().into_iter().filter(|(tx, _)| tx.form == Form::Tls13) {
            let mut slot = vec![0; 40 + OVERHEAD_BYTES];
            let total = tx.seal(0, &mut slot, 40);
            assert_eq!(rx.open(&mut slot[..total]), Err(OpenError::NoType));
        }
    }

    #[test]
    fn no_input_panics() {
        for (_, mut rx) in pairs() {
            for len in 0..64 {
                assert!(rx.open(&mut vec![0; len]).is_err());
            }
            assert_eq!(rx.open(&mut vec![0; WIRE_BYTES + 1]), Err(OpenError::Overflow));
        }
    }

    #[test]
    fn exact_reads_ask_for_the_header_and_then_for_the_body() {
        assert_eq!(missing_bytes(&[]), 5);
        assert_eq!(missing_bytes(&[23, 3]), 3);
        assert_eq!(missing_bytes(&[23, 3, 3, 0, 7]), 7);
        assert_eq!(missing_bytes(&[23, 3, 3, 0, 2, 9]), 1);
        assert_eq!(missing_bytes(&[23, 3, 3, 0, 2, 9, 9]), 5);
        assert_eq!(missing_bytes(&[23, 3, 3, 0, 0, 23, 3]), 3);
    }
}
