//! Hands a TLS session to the kernel.
//!
//!   UserTls ──can the kernel?──no──▶ Declined(UserTls, reason)
//!       │ yes
//!      ULP
//!       │      one-way door: the keys leave userspace here
//!       ▼
//!   TLS_TX ─▶ TLS_RX ─▶ KernelTls
//!
//! Every reason to decline is tested above the door, because below it no session is left to fall back to: a failure
//! there ends the connection. A client comes here only at the boundary of a record with nothing left to send, so the
//! sequence numbers are exact. This module moves no bytes and reads no records.

use crate::config::{Listener, Offload, OffloadAfter};
use crate::observe::counters::{Decline, End};
use crate::observe::sockets::Place;
use crate::probe;
use crate::relay::kernel_tls::KernelTls;
use crate::relay::user_tls::UserTls;
use crate::relay::userspace::Door;
use crate::relay::{Client, Ended};
use crate::sys::ktls;
use rustls::SupportedCipherSuite;

/// `offload_after = "auto"`, in bytes: below it, setting kTLS up costs more than it saves. One row until more series
/// have been measured.
const OFFLOAD_AFTER_AUTO_BYTES: u64 = 128 << 10;

/// When this connection goes through the door, or why it never does.
pub fn plan(listener: &Listener, kernel: &probe::Kernel, suite: SupportedCipherSuite) -> Result<Door, Decline> {
    if listener.offload == Offload::Off {
        return Err(Decline::Off);
    }
    if kernel.no_ulp.is_some() {
        return Err(Decline::NoUlp);
    }
    if !kernel.offloads(suite) {
        return Err(Decline::Cipher);
    }
    Ok(Door::After(offload_after(listener)))
}

/// The listener's threshold in bytes.
fn offload_after(listener: &Listener) -> u64 {
    match listener.offload_after {
        OffloadAfter::Auto => OFFLOAD_AFTER_AUTO_BYTES,
        OffloadAfter::Bytes(n) => n,
    }
}

/// The connection goes through the door as soon as its handshake is complete, if the suite allows.
pub fn is_immediate(listener: &Listener, kernel: &probe::Kernel) -> bool {
    listener.offload != Offload::Off && kernel.no_ulp.is_none() && offload_after(listener) == 0
}

/// What came of an attempt.
pub enum Offloaded {
    Kernel(Box<KernelTls>),
    /// It stays where it is, and its door is shut.
    Declined(Box<UserTls>),
    /// Below the door something failed that should not have.
    Failed(Box<Client>, Ended),
}

/// Takes a client that stands at the door through it, and counts what came of it.
pub fn through_the_door(tls: UserTls) -> Offloaded {
    if tls.rekeyed && !tls.client.worker.kernel.rekey {
        // A client that has changed its keys once does so again, and this kernel could not follow.
        return declined(tls, Decline::Rekeyed);
    }
    if ktls::attach(tls.client.sock.fd()).is_err() {
        return declined(tls, Decline::Socket);
    }
    let UserTls { client, keys, .. } = tls;
    match keys.into_kernel(client.sock.fd()) {
        Ok(keys) => {
            client.worker.counters.offloaded.add(1);
            client.moved_to(Place::Kernel);
            Offloaded::Kernel(Box::new(KernelTls::new(client, keys)))
        }
        Err((direction, e)) => {
            tracing::error!(stage = "offload", reason = %e, ?direction, "installing keys failed below the door");
            Offloaded::Failed(Box::new(client), Ended::abort(End::Internal))
        }
    }
}

fn declined(tls: UserTls, why: Decline) -> Offloaded {
    tls.client.worker.counters.declined(why);
    tls.client.moved_to(Place::Declined(why));
    Offloaded::Declined(Box::new(tls))
}
