//! Session tickets whose keys a fleet shares through a folder.
//!
//!   folder ─▶ Shared (polled by control; one node at a time leads and rotates) ─▶ Keys ─▶ Ticketer ─▶ rustls
//!
//! A ticket is `epoch id | salt | AES-256-GCM(key from the epoch's secret and the salt)`: no nonce can come twice under
//! one key, however many nodes write tickets. All state is in the ticket; nothing is stored for it. Which epoch encrypts
//! is decided by the clock of the file server alone (`file.rs`), so nodes whose clocks differ agree.

pub mod file;
pub mod folder;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use aws_lc_rs::rand;
use file::{Epoch, Epochs, ID_BYTES};
use rustls::server::ProducesTickets;
use std::fmt;
use std::sync::RwLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use zeroize::Zeroizing;

const SALT_BYTES: usize = 16;
const KEY_BYTES: usize = 32;

/// What rustls makes and opens tickets with. Control gives it new keys.
pub struct Ticketer {
    state: RwLock<State>,
    lifetime: Duration,
}

struct State {
    epochs: Option<Epochs>,
    /// What the file server's clock is ahead of ours.
    skew: Skew,
}

/// The difference of two clocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Skew {
    pub milliseconds: i64,
}

impl Skew {
    /// Our clock, corrected.
    pub fn now(self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        now.saturating_add_signed(self.milliseconds)
    }
}

impl Ticketer {
    pub fn new(lifetime: Duration) -> Self {
        Self { state: RwLock::new(State { epochs: None, skew: Skew::default() }), lifetime }
    }

    /// The keys and the clock from now on; keys that are not among them are gone.
    pub fn set(&self, epochs: Epochs, skew: Skew) {
        if let Ok(mut state) = self.state.write() {
            *state = State { epochs: Some(epochs), skew };
        }
    }

    /// Forgets keys whose time is over, also while the folder cannot be read.
    pub fn destroy_old(&self) {
        if let Ok(mut state) = self.state.write() {
            let now = state.skew.now();
            if let Some(epochs) = &mut state.epochs {
                epochs.destroy_old(now);
            }
        }
    }

    fn seal(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let mut salt = [0; SALT_BYTES];
        rand::fill(&mut salt).ok()?;
        let (id, key, nonce) = {
            let state = self.state.read().ok()?;
            let epoch = state.epochs.as_ref()?.current(state.skew.now())?;
            let (key, nonce) = of_ticket(epoch, &salt)?;
            (epoch.id, key, nonce)
        };
        let mut ticket = Vec::with_capacity(ID_BYTES + SALT_BYTES + plain.len() + AES_256_GCM.tag_len());
        ticket.extend_from_slice(&id);
        ticket.extend_from_slice(&salt);
        let mut sealed = plain.to_vec();
        key.seal_in_place_append_tag(nonce, Aad::from(&ticket), &mut sealed).ok()?;
        ticket.append(&mut sealed);
        Some(ticket)
    }

    fn open(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (head, sealed) = ticket.split_at_checked(ID_BYTES + SALT_BYTES)?;
        let (id, salt) = head.split_at(ID_BYTES);
        let (key, nonce) = {
            let state = self.state.read().ok()?;
            let epoch = state.epochs.as_ref()?.find(id, state.skew.now())?;
            of_ticket(epoch, salt.try_into().ok()?)?
        };
        let mut plain = sealed.to_vec();
        let len = key.open_in_place(nonce, Aad::from(head), &mut plain).ok()?.len();
        plain.truncate(len);
        Some(plain)
    }
}

/// Key and nonce of one ticket.
fn of_ticket(epoch: &Epoch, salt: &[u8; SALT_BYTES]) -> Option<(LessSafeKey, Nonce)> {
    struct Length;
    impl aws_lc_rs::hkdf::KeyType for Length {
        fn len(&self) -> usize {
            KEY_BYTES + NONCE_LEN
        }
    }
    let mut material = Zeroizing::new([0; KEY_BYTES + NONCE_LEN]);
    let secret = Salt::new(HKDF_SHA256, salt).extract(epoch.secret());
    secret.expand(&[b"tlsplice ticket 1"], Length).ok()?.fill(&mut material[..]).ok()?;
    let (key, nonce) = material.split_at(KEY_BYTES);
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).ok()?);
    Some((key, Nonce::try_assume_unique_for_key(nonce).ok()?))
}

impl ProducesTickets for Ticketer {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(self.lifetime.as_secs()).unwrap_or(u32::MAX)
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.seal(plain)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        self.open(cipher)
    }
}

impl fmt::Debug for Ticketer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticketer").field("lifetime", &self.lifetime).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_MS: u64 = 3_600_000;

    fn ticketer(epochs: &Epochs, skew_ms: i64) -> Ticketer {
        let ticketer = Ticketer::new(Duration::from_secs(3600));
        ticketer.set(Epochs::parse(&epochs.to_bytes()).expect("its own"), Skew { milliseconds: skew_ms });
        ticketer
    }

    #[test]
    fn a_ticket_of_one_is_opened_by_the_other_across_rotations_until_its_key_is_destroyed() {
        let now = Skew::default().now();
        let mut epochs = Epochs::begin(now, HOUR_MS).expect("random");
        let ticket = ticketer(&epochs, 0).encrypt(b"a session").expect("sealed");
        assert_eq!(ticketer(&epochs, 0).decrypt(&ticket).as_deref(), Some(&b"a session"[..]));
        // One that has not read the file for a while, and one whose clock is ahead by an epoch.
        let ahead = ticketer(&epochs, HOUR_MS as i64 + 1).encrypt(b"early").expect("sealed");
        assert_eq!(ticketer(&epochs, 0).decrypt(&ahead).as_deref(), Some(&b"early"[..]));
        epochs = epochs.rotate(now + HOUR_MS).expect("random");
        assert!(ticketer(&epochs, HOUR_MS as i64 + 1).decrypt(&ticket).is_some());
        epochs = epochs.rotate(now + 2 * HOUR_MS).expect("random");
        assert!(ticketer(&epochs, 2 * HOUR_MS as i64 + 1).decrypt(&ticket).is_none(), "its epoch is gone");
    }

    #[test]
    fn old_keys_go_on_time_without_the_file() {
        let now = Skew::default().now();
        let epochs = Epochs::begin(now, HOUR_MS).expect("random").rotate(now + HOUR_MS).expect("random");
        let early = ticketer(&epochs, 0);
        let ticket = early.encrypt(b"x").expect("sealed");
        let late = ticketer(&epochs, 2 * HOUR_MS as i64 + 1);
        late.destroy_old();
        assert!(late.decrypt(&ticket).is_none());
    }

    #[test]
    fn nothing_else_is_a_ticket() {
        let epochs = Epochs::begin(Skew::default().now(), HOUR_MS).expect("random");
        let ticketer = ticketer(&epochs, 0);
        let ticket = ticketer.encrypt(b"a session").expect("sealed");
        for at in 0..ticket.len() {
            let mut bad = ticket.clone();
            bad[at] ^= 1;
            assert!(ticketer.decrypt(&bad).is_none(), "byte {at}");
            assert!(ticketer.decrypt(&ticket[..at]).is_none(), "{at} bytes");
        }
        assert!(Ticketer::new(Duration::from_secs(1)).encrypt(b"x").is_none(), "no keys yet");
    }
}
