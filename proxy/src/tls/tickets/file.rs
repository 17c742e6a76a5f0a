//! The file of ticket keys: three epochs, each with the time from which it encrypts.
//!
//!   magic | milliseconds of an epoch | generation | 3 × (start | secret) | SHA-256 of all that
//!
//!   time ──▶  previous ─────▶ current ─────▶ next ─────▶        previous opens, current opens and seals, and next is
//!             opens           seals, opens   known           there an epoch before anybody seals with it
//!
//! A ticket sealed at the very end of an epoch can be opened for one epoch more. This module knows no folder.

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand;
use zeroize::{Zeroize, Zeroizing};

const MAGIC: &[u8; 8] = b"TLSPTKT1";
pub const ID_BYTES: usize = 8;
const SECRET_BYTES: usize = 32;
const EPOCHS: usize = 3;
const DIGEST_BYTES: usize = 32;
const HEAD_BYTES: usize = MAGIC.len() + 8 + 8;
/// The file's size, which never differs.
pub const FILE_BYTES: usize = HEAD_BYTES + EPOCHS * (8 + SECRET_BYTES) + DIGEST_BYTES;

/// One key and its time.
pub struct Epoch {
    /// Milliseconds since 1970, by the file server's clock.
    pub start: u64,
    secret: [u8; SECRET_BYTES],
    /// From the secret; names it in tickets.
    pub id: [u8; ID_BYTES],
    destroyed: bool,
}

impl Epoch {
    fn new(start: u64, secret: [u8; SECRET_BYTES]) -> Self {
        let mut id = [0; ID_BYTES];
        let named = Zeroizing::new([b"tlsplice epoch id".as_slice(), &secret].concat());
        id.copy_from_slice(&digest(&SHA256, &named).as_ref()[..ID_BYTES]);
        Self { start, secret, id, destroyed: false }
    }

    fn random(start: u64) -> Option<Self> {
        let mut secret = [0; SECRET_BYTES];
        rand::fill(&mut secret).ok()?;
        Some(Self::new(start, secret))
    }

    fn again(&self) -> Self {
        Self { start: self.start, secret: self.secret, id: self.id, destroyed: self.destroyed }
    }

    pub fn secret(&self) -> &[u8] {
        &self.secret
    }
}

impl Drop for Epoch {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

/// Previous, current and next.
pub struct Epochs {
    pub generation: u64,
    /// Milliseconds.
    pub length: u64,
    epochs: [Epoch; EPOCHS],
}

impl Epochs {
    /// The first file of a folder. `None`: the random source failed.
    pub fn begin(now: u64, length: u64) -> Option<Self> {
        let before = Epoch::random(now.saturating_sub(length))?;
        Some(Self {
            generation: 1,
            length,
            epochs: [before, Epoch::random(now)?, Epoch::random(now.saturating_add(length))?],
        })
    }

    /// `next` has begun: everything moves up, and there is a new `next`.
    pub fn rotate(&self, now: u64) -> Option<Self> {
        let [_, current, next] = &self.epochs;
        // After a long pause of the whole fleet the new one is still known an epoch before it is used.
        let start = next.start.saturating_add(self.length).max(now.saturating_add(self.length / 2));
        Some(Self {
            generation: self.generation.saturating_add(1),
            length: self.length,
            epochs: [current.again(), next.again(), Epoch::random(start)?],
        })
    }

    pub fn is_due(&self, now: u64) -> bool {
        now >= self.epochs[2].start
    }

    /// What seals now.
    pub fn current(&self, now: u64) -> Option<&Epoch> {
        self.epochs.iter().rev().find(|epoch| epoch.start <= now).or(Some(&self.epochs[1])).filter(|e| !e.destroyed)
    }

    /// What opens a ticket of this id.
    pub fn find(&self, id: &[u8], now: u64) -> Option<&Epoch> {
        let at = self.epochs.iter().position(|epoch| epoch.id == *id)?;
        (!self.is_over(at, now)).then(|| &self.epochs[at])
    }

    /// An epoch is over one length after the next began.
    fn is_over(&self, at: usize, now: u64) -> bool {
        let end = self.epochs.get(at + 1).map(|next| next.start.saturating_add(self.length));
        self.epochs[at].destroyed || end.is_some_and(|end| now >= end)
    }

    pub fn destroy_old(&mut self, now: u64) {
        for at in 0..EPOCHS {
            if self.is_over(at, now) {
                self.epochs[at].secret.zeroize();
                self.epochs[at].destroyed = true;
            }
        }
    }

    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(FILE_BYTES));
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.length.to_be_bytes());
        bytes.extend_from_slice(&self.generation.to_be_bytes());
        for epoch in &self.epochs {
            bytes.extend_from_slice(&epoch.start.to_be_bytes());
            bytes.extend_from_slice(&epoch.secret);
        }
        let sum = digest(&SHA256, &bytes);
        bytes.extend_from_slice(sum.as_ref());
        bytes
    }

    /// # Errors
    /// Why it is none.
    pub fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        if bytes.len() != FILE_BYTES {
            return Err("has not the size of a file of ticket keys");
        }
        let (body, sum) = bytes.split_at(FILE_BYTES - DIGEST_BYTES);
        if !body.starts_with(MAGIC) {
            return Err("is no file of ticket keys of this version");
        }
        if digest(&SHA256, body).as_ref() != sum {
            return Err("is damaged: its checksum is wrong");
        }
        let number = |at: usize| body[at..at + 8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let epoch = |index: usize| {
            let at = HEAD_BYTES + index * (8 + SECRET_BYTES);
            let mut secret = [0; SECRET_BYTES];
            secret.copy_from_slice(&body[at + 8..at + 8 + SECRET_BYTES]);
            Epoch::new(number(at), secret)
        };
        let epochs = Self { length: number(8), generation: number(16), epochs: [epoch(0), epoch(1), epoch(2)] };
        let starts = epochs.epochs.each_ref().map(|epoch| epoch.start);
        if epochs.length == 0 || !starts.is_sorted() {
            return Err("has epochs that are not in order");
        }
        // Keys are found by what is made of their secret, so one that came twice would hide the later epoch.
        let [a, b, c] = epochs.epochs.each_ref().map(|epoch| epoch.id);
        if a == b || b == c || a == c {
            return Err("has one key for two epochs");
        }
        Ok(epochs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(change: impl FnOnce(&mut Epochs)) -> Result<Epochs, &'static str> {
        let mut epochs = Epochs::begin(1_000_000, 1_000).expect("random");
        change(&mut epochs);
        Epochs::parse(&epochs.to_bytes())
    }

    #[test]
    fn epochs_are_in_order_and_have_keys_of_their_own() {
        assert!(file(|_| ()).is_ok());
        assert_eq!(file(|epochs| epochs.length = 0).err(), Some("has epochs that are not in order"));
        assert_eq!(file(|epochs| epochs.epochs[0].start = u64::MAX).err(), Some("has epochs that are not in order"));
        let twice = file(|epochs| epochs.epochs[2].secret = epochs.epochs[1].secret);
        assert_eq!(twice.err(), Some("has one key for two epochs"));
    }
}
