//! The keys of a session: each is derived from the one before, and userspace or the kernel uses it.
//!
//!   handshake ─▶ Keyring ─▶ Protection (userspace), both directions ──door──▶ KernelKeys
//!
//! A session that may go through the door keeps the current secrets, since the kernel wants them in its own form.

use crate::probe;
use crate::protect::{PLAIN_BYTES, Protection, record_limit};
use crate::session::SessionKeys;
use crate::sys::ktls::{self, Direction, Keys};
use crate::tls::traffic::{NextKey, Traffic};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets, SupportedCipherSuite};
use std::io;
use std::os::fd::BorrowedFd;

/// Records left over when a key counts as used up: more than one full pipe can become.
const RESERVE_RECORDS: u64 = 1024;
/// Parts of a key are parts of no more than this: one for 2^24 records is not short while thousands are left.
const PARTED_RECORDS: u64 = 1024;
/// Records of a splice beyond those that its bytes fill: one for each 17 fragments of a pipe of 256, and the last.
const FRAGMENT_RECORDS: u64 = 17;

/// What derives the keys, and what they are for.
pub struct Keyring {
    suite: SupportedCipherSuite,
    /// TLS 1.2 has one key for each direction, and no next.
    traffic: Option<Box<Traffic>>,
    /// Records that one key of ours may protect.
    limit: u64,
}

impl Keyring {
    pub fn suite(&self) -> SupportedCipherSuite {
        self.suite
    }

    pub fn is_tls12(&self) -> bool {
        matches!(self.suite, SupportedCipherSuite::Tls12(_))
    }

    fn next(&mut self, direction: Direction) -> io::Result<NextKey> {
        let next = match (&mut self.traffic, self.suite.tls13()) {
            (Some(traffic), Some(suite)) => traffic.next(direction, suite),
            (None, _) | (_, None) => None,
        };
        next.ok_or_else(|| io::ErrorKind::Unsupported.into())
    }
}

/// Both keys in userspace.
pub struct UserKeys {
    pub ring: Keyring,
    pub tx: Protection,
    pub rx: Protection,
    tx_secret: Secret,
    rx_secret: Secret,
}

/// A key as it can be given to the kernel.
enum Secret {
    /// The handshake's.
    First(ConnectionTrafficSecrets),
    Next(NextKey),
}

impl Secret {
    fn keys(self, suite: SupportedCipherSuite, direction: Direction, sequence: u64) -> Option<Keys> {
        match self {
            Self::First(secrets) => Keys::new(suite, direction, (sequence, secrets)),
            Self::Next(next) => Keys::next(suite, &next, sequence),
        }
    }
}

impl UserKeys {
    /// Of a session whose handshake is complete.
    pub fn new(session: SessionKeys, records_per_key: u64) -> io::Result<Self> {
        let SessionKeys { suite, keys, traffic } = session;
        let ExtractedSecrets { tx: (tx_sequence, tx_secret), rx: (rx_sequence, rx_secret) } = keys;
        let protection = |sequence, secret: &_| {
            Protection::new(suite, sequence, secret).ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
        };
        let (tx, rx) = (protection(tx_sequence, &tx_secret)?, protection(rx_sequence, &rx_secret)?);
        let ring = Keyring { suite, traffic, limit: record_limit(suite, records_per_key) };
        Ok(Self { ring, tx, rx, tx_secret: Secret::First(tx_secret), rx_secret: Secret::First(rx_secret) })
    }

    /// Goes on to the next key of a direction, whose sequence starts at 0.
    pub fn renew(&mut self, direction: Direction) -> io::Result<()> {
        let next = self.ring.next(direction)?;
        let protection = Protection::next(self.ring.suite, &next).ok_or(io::ErrorKind::Unsupported)?;
        match direction {
            Direction::Tx => (self.tx, self.tx_secret) = (protection, Secret::Next(next)),
            Direction::Rx => (self.rx, self.rx_secret) = (protection, Secret::Next(next)),
        }
        Ok(())
    }

    /// Records that our key may still protect, and one for the KeyUpdate or the close_notify that says so.
    pub fn records_left(&self) -> u64 {
        self.ring.limit.saturating_sub(self.tx.sequence() + 1)
    }

    /// Our key has protected all the records that it may, or would with `more`.
    pub fn is_used_up(&self, more: usize) -> bool {
        self.records_left() < more as u64
    }

    /// Our key has no next, and less than one part in `parts` is left of it.
    pub fn is_short(&self, parts: u64) -> bool {
        self.ring.is_tls12() && self.records_left() < self.ring.limit.min(PARTED_RECORDS) / parts
    }

    /// Gives both keys to the kernel. The direction names what failed.
    pub fn into_kernel(self, client: BorrowedFd<'_>) -> Result<KernelKeys, (Direction, io::Error)> {
        let Self { ring, tx, rx, tx_secret, rx_secret } = self;
        let sequence = tx.sequence();
        for (direction, used) in [(Direction::Tx, (sequence, tx_secret)), (Direction::Rx, (rx.sequence(), rx_secret))] {
            let (sequence, secret) = used;
            let keys = secret.keys(ring.suite, direction, sequence).ok_or(io::ErrorKind::Unsupported.into());
            keys.and_then(|k| k.install(client, direction)).map_err(|e| (direction, e))?;
        }
        Ok(KernelKeys { ring, sealed_at_most: sequence })
    }
}

/// Both keys in the kernel.
pub struct KernelKeys {
    ring: Keyring,
    /// Records that our key has protected, or more: counting exactly would cost a system call each time.
    sealed_at_most: u64,
}

impl KernelKeys {
    pub fn is_tls12(&self) -> bool {
        self.ring.is_tls12()
    }

    /// TLS 1.3, on a kernel that takes keys again.
    pub fn can_renew(&self, kernel: &probe::Kernel) -> bool {
        kernel.rekey && !self.is_tls12()
    }

    /// Installs the next key of a direction.
    pub fn renew(&mut self, client: BorrowedFd<'_>, direction: Direction) -> io::Result<()> {
        let next = self.ring.next(direction)?;
        let keys = Keys::next(self.ring.suite, &next, 0).ok_or(io::ErrorKind::Unsupported)?;
        keys.install(client, direction)?;
        if direction == Direction::Tx {
            self.sealed_at_most = 0;
        }
        Ok(())
    }

    /// Notes that `bytes` were given to be sealed.
    pub fn sealed(&mut self, bytes: usize) {
        self.sealed_at_most += (bytes / PLAIN_BYTES) as u64 + FRAGMENT_RECORDS;
    }

    /// Our key has protected all that it may. Asks the kernel only when the estimate says so.
    pub fn is_used_up(&mut self, client: BorrowedFd<'_>) -> bool {
        self.has_sealed(client, self.usable())
    }

    /// Less than one part in `parts` is left of our key.
    pub fn is_short(&mut self, client: BorrowedFd<'_>, parts: u64) -> bool {
        self.has_sealed(client, self.usable() - self.usable().min(PARTED_RECORDS) / parts)
    }

    fn usable(&self) -> u64 {
        self.ring.limit - RESERVE_RECORDS.min(self.ring.limit / 2)
    }

    fn has_sealed(&mut self, client: BorrowedFd<'_>, limit: u64) -> bool {
        if self.sealed_at_most < limit {
            return false;
        }
        if let Ok(exact) = ktls::record_sequence(client, Direction::Tx) {
            self.sealed_at_most = exact;
        }
        self.sealed_at_most >= limit
    }
}
