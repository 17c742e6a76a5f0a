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
use crate::tls::policy::Negotiation;
use rustls::SupportedCipherSuite;

/// When this connection goes through the door, or why it never does.
pub fn plan(
    listener: &Listener,
    tls: &Negotiation,
    kernel: &probe::Kernel,
    suite: SupportedCipherSuite,
) -> Result<Door, Decline> {
    if let Some(why) = is_shut(listener, tls, kernel) {
        return Err(why);
    }
    if !kernel.offloads(suite) {
        return Err(Decline::Cipher);
    }
    Ok(Door::After(offload_after(listener, kernel)))
}

/// Why no connection of this listener goes through the door, whatever its suite.
fn is_shut(listener: &Listener, tls: &Negotiation, kernel: &probe::Kernel) -> Option<Decline> {
    if listener.offload == Offload::Off {
        return Some(Decline::Off);
    }
    if !tls.kernel_may_protect {
        return Some(Decline::Policy);
    }
    kernel.no_ulp.is_some().then_some(Decline::NoUlp)
}

/// The listener's threshold in bytes.
fn offload_after(listener: &Listener, kernel: &probe::Kernel) -> u64 {
    match listener.offload_after {
        OffloadAfter::Auto => kernel.costs.offload_after_bytes,
        OffloadAfter::Bytes(n) => n,
    }
}

/// The connection goes through the door as soon as its handshake is complete, if the suite allows.
pub fn is_immediate(listener: &Listener, tls: &Negotiation, kernel: &probe::Kernel) -> bool {
    is_shut(listener, tls, kernel).is_none() && offload_after(listener, kernel) == 0
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
    let UserTls { mut client, keys, .. } = tls;
    client.sock.limit_room();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::tls::policy::{Resumption, server_config};
    use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384;

    #[test]
    fn the_first_reason_to_stay_is_the_one_that_is_told() {
        let file = "[tls]\ncertificates = [\"a.pem\"]\n[[listener]]\naddress = \"[::]:1\"\nupstream = \"u\"\n\
                    offload_after = 0\n[[upstream]]\nname = \"u\"\nservers = [\"unix:/u\"]\n";
        let config = Config::parse(std::path::Path::new("test"), file).expect("valid");
        let certificates = crate::tls::certificates::testing::resolver(&["a.test"]);
        let resumption = Resumption::of_this_process().expect("random");
        let mut tls = server_config(&config.tls, certificates, &resumption).expect("usable");
        let mut listener = Listener::clone(&config.listeners[0]);
        let mut kernel = probe::Kernel {
            release: String::new(),
            no_ulp: None,
            suites: Vec::new(),
            rekey: true,
            short_splice_safe: true,
            opens_in_place: true,
            partial_record_wakes: false,
            costs: probe::cost::Costs::of(""),
        };
        let why = |listener: &Listener, tls: &Negotiation, kernel: &probe::Kernel| {
            (plan(listener, tls, kernel, TLS13_AES_256_GCM_SHA384).err(), is_immediate(listener, tls, kernel))
        };
        assert_eq!(why(&listener, &tls, &kernel), (Some(Decline::Cipher), true));
        kernel.no_ulp = Some("none".to_owned());
        assert_eq!(why(&listener, &tls, &kernel), (Some(Decline::NoUlp), false));
        tls.kernel_may_protect = false;
        assert_eq!(why(&listener, &tls, &kernel), (Some(Decline::Policy), false));
        listener.offload = Offload::Off;
        assert_eq!(why(&listener, &tls, &kernel), (Some(Decline::Off), false));
    }
}
