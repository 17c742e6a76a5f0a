//! The secrets behind a TLS socket's keys, and how much our own key may still protect.

use crate::probe;
use crate::session::record_limit;
use crate::sys::ktls::{self, Direction, Keys};
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ProtocolVersion, SupportedCipherSuite};
use std::io;
use std::os::fd::BorrowedFd;

/// Records left over when a key counts as used up: more than one full pipe can become.
const RESERVE_RECORDS: u64 = 1024;
/// Records of a splice beyond those that its bytes fill: one for each 17 fragments of a pipe of 256, and the last.
const FRAGMENT_RECORDS: u64 = 17;

/// See the module.
pub struct KernelKeys {
    secrets: Box<KernelConnection<ServerConnectionData>>,
    suite: SupportedCipherSuite,
    tls12: bool,
    /// Records that our key has protected, or more: counting exactly would cost a system call each time.
    sealed_at_most: u64,
    limit: u64,
}

impl KernelKeys {
    /// `sequence`: records that our key has protected already. `records_per_key`: of the configuration.
    pub fn new(secrets: KernelConnection<ServerConnectionData>, sequence: u64, records_per_key: u64) -> Self {
        let suite = secrets.negotiated_cipher_suite();
        let limit = record_limit(suite, records_per_key);
        Self {
            tls12: secrets.protocol_version() == ProtocolVersion::TLSv1_2,
            secrets: Box::new(secrets),
            suite,
            sealed_at_most: sequence,
            limit: limit - RESERVE_RECORDS.min(limit / 2),
        }
    }

    pub fn is_tls12(&self) -> bool {
        self.tls12
    }

    /// TLS 1.3, on a kernel that takes keys again.
    pub fn can_renew(&self, kernel: &probe::Kernel) -> bool {
        kernel.rekey && !self.tls12
    }

    /// Derives the next key of a direction (RFC 8446 section 7.2) and installs it.
    pub fn renew(&mut self, client: BorrowedFd<'_>, direction: Direction) -> io::Result<()> {
        let next = match direction {
            Direction::Tx => self.secrets.update_tx_secret(),
            Direction::Rx => self.secrets.update_rx_secret(),
        };
        let next = next.map_err(io::Error::other)?;
        let keys = Keys::new(self.suite, direction, next).ok_or(io::ErrorKind::Unsupported)?;
        keys.install(client, direction)?;
        if direction == Direction::Tx {
            self.sealed_at_most = 0;
        }
        Ok(())
    }

    /// Notes that `bytes` were given to be sealed.
    pub fn sealed(&mut self, bytes: usize) {
        self.sealed_at_most += (bytes / crate::session::RECORD_PLAIN_BYTES) as u64 + FRAGMENT_RECORDS;
    }

    /// Our key has protected all that it may. Asks the kernel only when the estimate says so.
    pub fn is_used_up(&mut self, client: BorrowedFd<'_>) -> bool {
        if self.sealed_at_most < self.limit {
            return false;
        }
        if let Ok(exact) = ktls::record_sequence(client, Direction::Tx) {
            self.sealed_at_most = exact;
        }
        self.sealed_at_most >= self.limit
    }
}
