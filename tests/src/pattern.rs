//! Bytes whose value follows from their place, so that a loss, a repeat or a swap shows at its exact offset.

use anyhow::{Result, bail};
use std::sync::OnceLock;

/// Prime, so that no record, page or pipe size divides it.
const PERIOD_BYTES: usize = 1_048_573;
/// The longest slice that `at` may be asked for.
pub const MAX_SLICE_BYTES: usize = 1 << 18;

/// One stream of bytes. Up and down differ, so that neither passes for the other.
#[derive(Clone, Copy)]
pub struct Pattern(&'static [u8]);

impl std::fmt::Debug for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pattern")
    }
}

fn block(seed: u64, byte: impl Fn(u64) -> u8) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes: Vec<u8> = (0..PERIOD_BYTES).map(|_| byte(random.next())).collect();
    bytes.extend_from_within(..MAX_SLICE_BYTES);
    bytes
}

impl Pattern {
    /// From the client to the upstream.
    pub fn up() -> Self {
        static BLOCK: OnceLock<Vec<u8>> = OnceLock::new();
        Self(BLOCK.get_or_init(|| block(1, |word| (word >> 32) as u8)))
    }

    /// From the upstream to the client.
    pub fn down() -> Self {
        static BLOCK: OnceLock<Vec<u8>> = OnceLock::new();
        Self(BLOCK.get_or_init(|| block(2, |word| (word >> 32) as u8)))
    }

    /// Up, in lines of digits: programs that take some letters on their input for commands pass these on.
    pub fn digits() -> Self {
        static BLOCK: OnceLock<Vec<u8>> = OnceLock::new();
        Self(BLOCK.get_or_init(|| {
            block(3, |word| if word.is_multiple_of(64) { b'\n' } else { b'0' + (word >> 32) as u8 % 10 })
        }))
    }

    /// Up to `max` bytes of the stream from `offset` on, at least one.
    pub fn at(self, offset: u64, max: usize) -> &'static [u8] {
        let start = (offset % PERIOD_BYTES as u64) as usize;
        &self.0[start..start + max.min(MAX_SLICE_BYTES)]
    }

    pub fn bytes(self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            bytes.extend_from_slice(self.at(bytes.len() as u64, len - bytes.len()));
        }
        bytes
    }

    /// Fails at the first byte that is not the one of its place.
    pub fn check(self, mut offset: u64, mut got: &[u8]) -> Result<()> {
        while !got.is_empty() {
            let want = self.at(offset, got.len());
            let (head, rest) = got.split_at(want.len());
            if head != want {
                let wrong = head.iter().zip(want).take_while(|(a, b)| a == b).count();
                bail!(
                    "byte {} of the stream is wrong: got {:02x?}, want {:02x?}",
                    offset + wrong as u64,
                    &head[wrong..(wrong + 16).min(head.len())],
                    &want[wrong..(wrong + 16).min(want.len())],
                );
            }
            offset += head.len() as u64;
            got = rest;
        }
        Ok(())
    }
}

/// A small deterministic generator (splitmix64): a failure names its seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `low` to `high`, both included.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_byte_is_found_at_its_offset() {
        let mut bytes = Pattern::up().bytes(3_000_000);
        assert!(Pattern::up().check(0, &bytes).is_ok());
        bytes.remove(2_000_000);
        let why = Pattern::up().check(0, &bytes).expect_err("a byte is missing").to_string();
        assert!(why.starts_with("byte 200000"), "{why}");
    }
}
