//! Hands a TLS session to the kernel.
//!
//!   Userspace ──can the kernel?──no──▶ Declined(Userspace, reason)
//!       │ yes
//!      ULP
//!       │      one-way door: the keys leave userspace here
//!       ▼
//!   TLS_TX ─▶ TLS_RX ─▶ Kernel
//!
//! Every reason to decline is tested above the door, because below it no session is left to fall back to: a failure
//! there ends the connection. The relay comes here only at the boundary of a record with nothing left to send, so the
//! sequence numbers are exact. This module moves no bytes and reads no records.

use crate::config::{Listener, Offload, OffloadAfter};
use crate::observe::counters::{Decline, End};
use crate::probe;
use crate::relay::kernel::Kernel;
use crate::relay::userspace::{Door, Userspace};
use crate::relay::{Ended, Link};
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

/// What came of an attempt. The relay that stays has its door shut.
pub enum Offloaded {
    Kernel(Box<Kernel>),
    Declined(Box<Userspace>, Decline),
    /// Below the door something failed that should not have.
    Failed(Box<Link>, Ended),
}

/// Takes a relay that stands at the door through it.
pub fn through_the_door(mut relay: Box<Userspace>) -> Offloaded {
    relay.door = Door::Shut;
    if relay.rekeyed && !relay.link.worker.kernel.rekey {
        // A client that has changed its keys once does so again, and this kernel could not follow.
        return Offloaded::Declined(relay, Decline::Rekeyed);
    }
    if ktls::attach(relay.link.client.fd()).is_err() {
        return Offloaded::Declined(relay, Decline::Socket);
    }
    let Userspace { link, keys, to_upstream, up, down, .. } = *relay;
    match keys.into_kernel(link.client.fd()) {
        Ok(keys) => {
            link.worker.counters.offloaded.add(1);
            Offloaded::Kernel(Box::new(Kernel::new(link, keys, to_upstream, up, down)))
        }
        Err((direction, e)) => {
            tracing::error!(stage = "offload", reason = %e, ?direction, "installing keys failed below the door");
            Offloaded::Failed(Box::new(link), Ended::abort(End::Internal))
        }
    }
}
