//! The TLS record layer, both versions, with nothing hidden: any type, any size, any padding (RFC 5246 section 6.2.3.3,
//! RFC 7905, RFC 8446 section 5.2).

use anyhow::{Context as _, Result, bail, ensure};
use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;

pub const CHANGE_CIPHER_SPEC: u8 = 20;
pub const ALERT: u8 = 21;
pub const HANDSHAKE: u8 = 22;
pub const DATA: u8 = 23;

pub const HEADER_BYTES: usize = 5;
pub const TAG_BYTES: usize = 16;
/// The most plaintext that a record may hold.
pub const MAX_PLAINTEXT_BYTES: usize = 16_384;
/// Ciphertext with all that a version may add: what a reader must be ready for.
pub const MAX_BODY_BYTES: usize = MAX_PLAINTEXT_BYTES + 256;

/// The three ways to build a nonce and the additional data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Tls13,
    Tls12Gcm,
    Tls12ChaCha,
}

/// The key of one direction, with its sequence number.
#[derive(Debug)]
pub struct Key {
    aead: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
    shape: Shape,
}

impl Key {
    pub fn new(tls13: bool, (sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self> {
        use ConnectionTrafficSecrets::{Aes128Gcm, Aes256Gcm, Chacha20Poly1305};
        let (algorithm, key, iv, gcm) = match secrets {
            Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv, true),
            Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv, true),
            Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv, false),
            _ => bail!("a suite that these tests do not know"),
        };
        let shape = match (tls13, gcm) {
            (true, _) => Shape::Tls13,
            (false, true) => Shape::Tls12Gcm,
            (false, false) => Shape::Tls12ChaCha,
        };
        let aead =
            UnboundKey::new(algorithm, key.as_ref()).map(LessSafeKey::new).ok().context("key of a wrong length")?;
        let iv = iv.as_ref().try_into().context("iv of a wrong length")?;
        Ok(Self { aead, iv, sequence, shape })
    }

    fn nonce(&self) -> [u8; NONCE_LEN] {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        nonce
    }

    fn aad12(&self, kind: u8, plaintext_len: usize) -> Vec<u8> {
        let mut aad = self.sequence.to_be_bytes().to_vec();
        aad.extend([kind, 3, 3]);
        aad.extend((plaintext_len as u16).to_be_bytes());
        aad
    }

    /// Appends one record to `out`. `padding` zeros are added inside where the version has room for them.
    pub fn seal(&mut self, out: &mut Vec<u8>, kind: u8, payload: &[u8], padding: usize) -> Result<()> {
        let start = out.len();
        let nonce = self.nonce();
        let (outer, explicit, inner) = match self.shape {
            Shape::Tls13 => (DATA, 0, 1 + padding),
            Shape::Tls12Gcm => (kind, 8, 0),
            Shape::Tls12ChaCha => (kind, 0, 0),
        };
        let body = explicit + payload.len() + inner + TAG_BYTES;
        out.extend([outer, 3, 3]);
        out.extend(u16::try_from(body).context("a record of 64 KiB or more")?.to_be_bytes());
        out.extend(&nonce[NONCE_LEN - explicit..]);
        let text = out.len();
        out.extend_from_slice(payload);
        let aad = if self.shape == Shape::Tls13 {
            out.push(kind);
            out.resize(out.len() + padding, 0);
            out[start..start + HEADER_BYTES].to_vec()
        } else {
            self.aad12(kind, payload.len())
        };
        let tag = self
            .aead
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), &mut out[text..])
            .ok()
            .context("seal a record")?;
        out.extend_from_slice(tag.as_ref());
        self.sequence += 1;
        Ok(())
    }

    /// Opens one record in place: its inner type and where its plaintext lies in `record`.
    pub fn open(&mut self, record: &mut [u8]) -> Result<(u8, std::ops::Range<usize>)> {
        let (header, body) = record.split_at_mut(HEADER_BYTES);
        let kind = header[0];
        let explicit = if self.shape == Shape::Tls12Gcm { 8 } else { 0 };
        ensure!(body.len() >= explicit + TAG_BYTES, "a record of {} bytes is too short", body.len());
        let mut nonce = self.nonce();
        nonce[NONCE_LEN - explicit..].copy_from_slice(&body[..explicit]);
        let aad = match self.shape {
            Shape::Tls13 => header.to_vec(),
            Shape::Tls12Gcm | Shape::Tls12ChaCha => self.aad12(kind, body.len() - explicit - TAG_BYTES),
        };
        let nonce = Nonce::assume_unique_for_key(nonce);
        let plain = self.aead.open_in_place(nonce, Aad::from(aad), &mut body[explicit..]).ok();
        let plain =
            plain.with_context(|| format!("record {} of this key (type {kind}) does not decrypt", self.sequence))?;
        self.sequence += 1;
        let start = HEADER_BYTES + explicit;
        if self.shape != Shape::Tls13 {
            return Ok((kind, start..start + plain.len()));
        }
        let end = plain.iter().rposition(|b| *b != 0).context("a TLS 1.3 record without a type")?;
        Ok((plain[end], start..start + end))
    }
}

/// The length of the whole record that starts here, if its header is there.
pub fn record_len(bytes: &[u8]) -> Option<usize> {
    let header = bytes.get(..HEADER_BYTES)?;
    Some(HEADER_BYTES + usize::from(u16::from_be_bytes([header[3], header[4]])))
}

/// A record as it came: what a test of nonces and sizes needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub outer_kind: u8,
    pub len: usize,
    /// The first eight bytes of the body: the explicit nonce of a TLS 1.2 GCM record.
    pub first8: [u8; 8],
}

impl Seen {
    pub fn of(record: &[u8]) -> Self {
        let mut first8 = [0; 8];
        let body = &record[HEADER_BYTES..];
        let n = body.len().min(8);
        first8[..n].copy_from_slice(&body[..n]);
        Self { outer_kind: record[0], len: record.len(), first8 }
    }
}
