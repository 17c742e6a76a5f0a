//! The secrets of a session: rustls derives each key from the one before, and userspace or the kernel uses it.
//!
//!   handshake ─▶ Keyring ─▶ Protection (userspace), both directions ──door──▶ KernelKeys
//!
//! A session that may go through the door keeps the current secrets, since the kernel wants them in its own form.

use crate::probe;
use crate::protect::{PLAIN_BYTES, Protection, record_limit};
use crate::sys::ktls::{self, Direction, Keys};
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets, ProtocolVersion, SupportedCipherSuite};
use std::io;
use std::os::fd::BorrowedFd;

/// Records left over when a key counts as used up: more than one full pipe can become.
const RESERVE_RECORDS: u64 = 1024;
/// Records of a splice beyond those that its bytes fill: one for each 17 fragments of a pipe of 256, and the last.
const FRAGMENT_RECORDS: u64 = 17;

/// What derives the keys (RFC 8446 section 7.2), and what they are for.
pub struct Keyring {
    secrets: Box<KernelConnection<ServerConnectionData>>,
    /// Records that one key of ours may protect.
    limit: u64,
}

impl Keyring {
    fn new(secrets: KernelConnection<ServerConnectionData>, records_per_key: u64) -> Self {
        let limit = record_limit(secrets.negotiated_cipher_suite(), records_per_key);
        Self { limit, secrets: Box::new(secrets) }
    }

    pub fn suite(&self) -> SupportedCipherSuite {
        self.secrets.negotiated_cipher_suite()
    }

    pub fn is_tls12(&self) -> bool {
        self.secrets.protocol_version() == ProtocolVersion::TLSv1_2
    }

    fn next(&mut self, direction: Direction) -> io::Result<ConnectionTrafficSecrets> {
        let next = match direction {
            Direction::Tx => self.secrets.update_tx_secret(),
            Direction::Rx => self.secrets.update_rx_secret(),
        };
        // The sequence of a new key starts at 0.
        next.map(|(_, secrets)| secrets).map_err(io::Error::other)
    }
}

/// Both keys in userspace.
pub struct UserKeys {
    pub ring: Keyring,
    pub tx: Protection,
    pub rx: Protection,
    tx_secret: ConnectionTrafficSecrets,
    rx_secret: ConnectionTrafficSecrets,
}

impl UserKeys {
    /// Of a session whose handshake is complete.
    pub fn new(
        (extracted, secrets): (ExtractedSecrets, KernelConnection<ServerConnectionData>),
        records_per_key: u64,
    ) -> io::Result<Self> {
        let ring = Keyring::new(secrets, records_per_key);
        let ExtractedSecrets { tx: (tx_sequence, tx_secret), rx: (rx_sequence, rx_secret) } = extracted;
        let protection = |sequence, secret: &_| {
            Protection::new(ring.suite(), sequence, secret).ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
        };
        let (tx, rx) = (protection(tx_sequence, &tx_secret)?, protection(rx_sequence, &rx_secret)?);
        Ok(Self { ring, tx, rx, tx_secret, rx_secret })
    }

    /// Goes on to the next key of a direction.
    pub fn renew(&mut self, direction: Direction) -> io::Result<()> {
        let secret = self.ring.next(direction)?;
        let protection = Protection::new(self.ring.suite(), 0, &secret).ok_or(io::ErrorKind::Unsupported)?;
        match direction {
            Direction::Tx => (self.tx, self.tx_secret) = (protection, secret),
            Direction::Rx => (self.rx, self.rx_secret) = (protection, secret),
        }
        Ok(())
    }

    /// Our key has protected all the records that it may, or would with `more`.
    pub fn is_used_up(&self, more: usize) -> bool {
        // One more is kept for the KeyUpdate or the close_notify that says so.
        self.tx.sequence() + more as u64 + 1 > self.ring.limit
    }

    /// Gives both keys to the kernel. The direction names what failed.
    pub fn into_kernel(self, client: BorrowedFd<'_>) -> Result<KernelKeys, (Direction, io::Error)> {
        let Self { ring, tx, rx, tx_secret, rx_secret } = self;
        let sequence = tx.sequence();
        for (direction, used) in [(Direction::Tx, (sequence, tx_secret)), (Direction::Rx, (rx.sequence(), rx_secret))] {
            let keys = Keys::new(ring.suite(), direction, used).ok_or(io::ErrorKind::Unsupported.into());
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
        let secret = self.ring.next(direction)?;
        let keys = Keys::new(self.ring.suite(), direction, (0, secret)).ok_or(io::ErrorKind::Unsupported)?;
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
        let limit = self.ring.limit - RESERVE_RECORDS.min(self.ring.limit / 2);
        if self.sealed_at_most < limit {
            return false;
        }
        if let Ok(exact) = ktls::record_sequence(client, Direction::Tx) {
            self.sealed_at_most = exact;
        }
        self.sealed_at_most >= limit
    }
}
