//! Alerts that end handshakes, by their names: ours tell what was wrong with the client, the client's what is wrong here.
//!
//! One that TLS 1.3 protects cannot be read from what is sent: what rustls means by it is known for most errors.

use super::counters::{Count, Counters};
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use rustls::{AlertDescription, Error};
use std::fmt;
use std::sync::Arc;

/// The IANA registry's, as far as a handshake has them. What is not here is "other", so that no client can make samples.
const NAMES: [(u8, &str); 27] = [
    (0, "close_notify"),
    (10, "unexpected_message"),
    (20, "bad_record_mac"),
    (22, "record_overflow"),
    (40, "handshake_failure"),
    (42, "bad_certificate"),
    (43, "unsupported_certificate"),
    (44, "certificate_revoked"),
    (45, "certificate_expired"),
    (46, "certificate_unknown"),
    (47, "illegal_parameter"),
    (48, "unknown_ca"),
    (49, "access_denied"),
    (50, "decode_error"),
    (51, "decrypt_error"),
    (70, "protocol_version"),
    (71, "insufficient_security"),
    (80, "internal_error"),
    (86, "inappropriate_fallback"),
    (90, "user_canceled"),
    (109, "missing_extension"),
    (110, "unsupported_extension"),
    (112, "unrecognized_name"),
    (113, "bad_certificate_status_response"),
    (115, "unknown_psk_identity"),
    (116, "certificate_required"),
    (120, "no_application_protocol"),
];
const OTHER: usize = NAMES.len();
const PROTECTED: usize = NAMES.len() + 1;
const PLACES: usize = NAMES.len() + 2;

const CONTENT_ALERT: u8 = 21;
const CONTENT_DATA: u8 = 23;

/// An alert that ended a handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alert {
    Received(u8),
    Sent(u8),
    SentProtected,
}

impl Alert {
    /// Of a handshake that failed so; `out` is what it leaves to be sent.
    pub fn of(error: &Error, out: &[u8]) -> Option<Self> {
        if let Error::AlertReceived(alert) = error {
            return Some(Self::Received(u8::from(*alert)));
        }
        let mut rest = out;
        let mut last = None;
        while let [kind, _, _, high, low, behind @ ..] = rest {
            let len = usize::from(*high) << 8 | usize::from(*low);
            let body = behind.get(..len)?;
            last = Some((*kind, body));
            rest = &behind[len..];
        }
        match last? {
            (CONTENT_ALERT, [_, description]) => Some(Self::Sent(*description)),
            (CONTENT_DATA, _) => Some(Self::protected(error)),
            (_, _) => None,
        }
    }

    /// What rustls sends for an error.
    fn protected(error: &Error) -> Self {
        let alert = match error {
            Error::NoApplicationProtocol => AlertDescription::NoApplicationProtocol,
            Error::DecryptError => AlertDescription::BadRecordMac,
            Error::InappropriateMessage { .. } | Error::InappropriateHandshakeMessage { .. } => {
                AlertDescription::UnexpectedMessage
            }
            Error::InvalidMessage(invalid) => AlertDescription::from(*invalid),
            // The enum is not ours, and most of it cannot come up behind a ServerHello.
            _ => return Self::SentProtected,
        };
        Self::Sent(u8::from(alert))
    }
}

/// One worker's counts.
#[derive(Debug)]
pub struct Alerts {
    received: [Count; PLACES],
    sent: [Count; PLACES],
}

impl Default for Alerts {
    fn default() -> Self {
        let none = || std::array::from_fn(|_| Count::default());
        Self { received: none(), sent: none() }
    }
}

impl Alerts {
    pub fn add(&self, alert: Alert) {
        let count = match alert {
            Alert::Received(description) => &self.received[place(description)],
            Alert::Sent(description) => &self.sent[place(description)],
            Alert::SentProtected => &self.sent[PROTECTED],
        };
        count.add(1);
    }
}

fn place(description: u8) -> usize {
    NAMES.iter().position(|(number, _)| *number == description).unwrap_or(OTHER)
}

/// Of all workers; what nobody had is not shown.
pub fn encode(to: &mut DescriptorEncoder<'_>, workers: &[Arc<Counters>]) -> fmt::Result {
    let help = "Alerts that ended a handshake";
    let mut family = to.encode_descriptor("tlsplice_handshake_alerts", help, None, MetricType::Counter)?;
    for (direction, counts) in
        [("received", (|a| &a.received) as fn(&Alerts) -> &[Count; PLACES]), ("sent", |a| &a.sent)]
    {
        for place in 0..PLACES {
            let n: u64 = workers.iter().map(|worker| counts(&worker.handshake_alerts)[place].get()).sum();
            if n == 0 {
                continue;
            }
            let name = NAMES.get(place).map_or(if place == OTHER { "other" } else { "protected" }, |(_, name)| *name);
            let labels = [("direction", direction), ("alert", name)];
            ConstCounter::new(n).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_record_of_what_is_sent_is_the_alert() {
        let failed = Error::General(String::new());
        assert_eq!(Alert::of(&failed, &[22, 3, 3, 0, 1, 2, 21, 3, 3, 0, 2, 2, 40]), Some(Alert::Sent(40)));
        assert_eq!(Alert::of(&failed, &[23, 3, 3, 0, 1, 9]), Some(Alert::SentProtected));
        assert_eq!(Alert::of(&Error::NoApplicationProtocol, &[23, 3, 3, 0, 1, 9]), Some(Alert::Sent(120)));
        assert_eq!(Alert::of(&failed, &[22, 3, 3, 0, 1, 2]), None);
        assert_eq!(Alert::of(&failed, &[21, 3, 3, 0, 2, 2]), None, "a record that is cut");
        assert_eq!(Alert::of(&failed, &[]), None);
        let received = Error::AlertReceived(AlertDescription::UnknownCA);
        assert_eq!(Alert::of(&received, &[]), Some(Alert::Received(48)));
    }

    #[test]
    fn what_has_no_name_is_other() {
        assert_eq!((place(48), place(200)), (11, OTHER));
        let alerts = Alerts::default();
        alerts.add(Alert::Received(200));
        alerts.add(Alert::SentProtected);
        assert_eq!((alerts.received[OTHER].get(), alerts.sent[PROTECTED].get()), (1, 1));
    }
}
