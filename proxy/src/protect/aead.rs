//! The AEAD under a record: aws-lc's, or ring's where that one is made for the processor.
//!
//! For AES-GCM aws-lc has code for AVX-512 and code for AES-NI alone. Processors between them have VAES on AVX2 (AMD's
//! Zen 3, Intel's Alder Lake), where ring's takes four tenths of the time. In a build for the policy `fips` it is always the
//! validated module.

use crate::sys::wiped::Wiped;
use aws_lc_rs::aead as aws_lc;
use ring::aead as ring;

pub const TAG_BYTES: usize = 16;
pub const NONCE_BYTES: usize = 12;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    Aes128Gcm,
    Aes256Gcm,
    ChaCha20Poly1305,
}

/// The tag is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadMac;

/// One key, bound to its algorithm.
pub enum Key {
    AwsLc(aws_lc::LessSafeKey),
    Ring(Wiped<ring::LessSafeKey>),
}

impl Key {
    /// `None`: the key is not as long as the algorithm's.
    pub fn new(algorithm: Algorithm, key: &[u8]) -> Option<Self> {
        match in_ring(algorithm).filter(|_| ring_is_faster()) {
            Some(theirs) => Self::of_ring(theirs, key),
            None => Self::of_aws_lc(algorithm, key),
        }
    }

    fn of_ring(theirs: &'static ring::Algorithm, key: &[u8]) -> Option<Self> {
        let key = ring::LessSafeKey::new(ring::UnboundKey::new(theirs, key).ok()?);
        Some(Self::Ring(Wiped::new(key)))
    }

    fn of_aws_lc(algorithm: Algorithm, key: &[u8]) -> Option<Self> {
        let theirs = match algorithm {
            Algorithm::Aes128Gcm => &aws_lc::AES_128_GCM,
            Algorithm::Aes256Gcm => &aws_lc::AES_256_GCM,
            Algorithm::ChaCha20Poly1305 => &aws_lc::CHACHA20_POLY1305,
        };
        Some(Self::AwsLc(aws_lc::LessSafeKey::new(aws_lc::UnboundKey::new(theirs, key).ok()?)))
    }

    /// Encrypts `text` where it lies and gives its tag. No nonce may come twice.
    #[inline]
    pub fn seal(&self, nonce: [u8; NONCE_BYTES], aad: &[u8], text: &mut [u8]) -> [u8; TAG_BYTES] {
        let mut bytes = [0; TAG_BYTES];
        // Both refuse only lengths beyond the AEAD's own, which are far beyond a record's.
        const WHY: &str = "a record is shorter than any AEAD's limit";
        match self {
            Self::AwsLc(key) => {
                let nonce = aws_lc::Nonce::assume_unique_for_key(nonce);
                let tag = key.seal_in_place_separate_tag(nonce, aws_lc::Aad::from(aad), text);
                bytes.copy_from_slice(tag.expect(WHY).as_ref());
            }
            Self::Ring(key) => {
                let nonce = ring::Nonce::assume_unique_for_key(nonce);
                let tag = key.get().seal_in_place_separate_tag(nonce, ring::Aad::from(aad), text);
                bytes.copy_from_slice(tag.expect(WHY).as_ref());
            }
        }
        bytes
    }

    /// Decrypts `text` where it lies, its tag behind it.
    #[inline]
    pub fn open(&self, nonce: [u8; NONCE_BYTES], aad: &[u8], text: &mut [u8]) -> Result<(), BadMac> {
        match self {
            Self::AwsLc(key) => {
                let nonce = aws_lc::Nonce::assume_unique_for_key(nonce);
                key.open_in_place(nonce, aws_lc::Aad::from(aad), text).map(drop).map_err(|_| BadMac)
            }
            Self::Ring(key) => {
                let nonce = ring::Nonce::assume_unique_for_key(nonce);
                key.get().open_in_place(nonce, ring::Aad::from(aad), text).map(drop).map_err(|_| BadMac)
            }
        }
    }
}

/// ChaCha20-Poly1305 gains nothing by VAES.
fn in_ring(algorithm: Algorithm) -> Option<&'static ring::Algorithm> {
    match algorithm {
        Algorithm::Aes128Gcm => Some(&ring::AES_128_GCM),
        Algorithm::Aes256Gcm => Some(&ring::AES_256_GCM),
        Algorithm::ChaCha20Poly1305 => None,
    }
}

#[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
fn ring_is_faster() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("vaes") && has!("vpclmulqdq") && has!("avx2") && !has!("avx512vl")
}

#[cfg(not(all(target_arch = "x86_64", not(feature = "fips"))))]
fn ring_is_faster() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_libraries_protect_alike() {
        for (algorithm, len) in [(Algorithm::Aes128Gcm, 16), (Algorithm::Aes256Gcm, 32)] {
            let key: Vec<u8> = (0..len).collect();
            let theirs = in_ring(algorithm).expect("AES-GCM");
            let ring = Key::of_ring(theirs, &key).expect("as long as it has to be");
            let aws_lc = Key::of_aws_lc(algorithm, &key).expect("as long as it has to be");
            for bytes in [0, 1, 15, 16, 17, 255, 4096, 16_385] {
                let plain: Vec<u8> = (0..bytes).map(|at| at as u8).collect();
                for (one, other) in [(&ring, &aws_lc), (&aws_lc, &ring)] {
                    let mut text = plain.clone();
                    let tag = one.seal([3; 12], b"head", &mut text);
                    text.extend_from_slice(&tag);
                    let mut damaged = text.clone();
                    damaged[bytes / 2] ^= 1;
                    assert_eq!(other.open([3; 12], b"head", &mut damaged), Err(BadMac));
                    assert_eq!(other.open([3; 12], b"head", &mut text), Ok(()));
                    assert_eq!(text[..bytes], plain);
                }
            }
        }
    }

    #[test]
    fn a_key_of_another_length_is_none() {
        for algorithm in [Algorithm::Aes128Gcm, Algorithm::Aes256Gcm, Algorithm::ChaCha20Poly1305] {
            assert!(Key::new(algorithm, &[0; 31]).is_none());
        }
    }
}
