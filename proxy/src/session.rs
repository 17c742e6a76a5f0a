//! A handshake under way: rustls' unbuffered connection, fed one record at a time.
//!
//!   records ─▶ feed ─▶ what rustls wants sent ─▶ … ─▶ established ─▶ the keys
//!
//! One record at a time, so that what lies behind the client's Finished stays where it is. When the handshake is
//! complete, rustls' connection gives its keys and is gone: from there on records are protected by `protect` or by the
//! kernel, and rustls derives the next keys. This module reads and writes no socket.

use crate::observe::sockets::{Facts, ServerName};
use crate::protect::{WIRE_BYTES, record_bytes};
use crate::tls::hello::{Gate, Judgement, Refusal};
use crate::tls::policy::Negotiation;
use crate::tls::resolver;
use crate::tls::traffic::{self, Traffic};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{Error, ExtractedSecrets, HandshakeKind, ProtocolVersion, SupportedCipherSuite};

/// See the module.
pub struct Session {
    tls: Box<UnbufferedServerConnection>,
    established: bool,
    /// Bytes at the front of the next `wire` that rustls has seen already: a handshake message in pieces.
    presented: usize,
    /// Until the ClientHello has been looked at.
    gate: Option<Gate>,
    /// The certificate's name that the client has asked for.
    name: ServerName,
    /// Of TLS 1.3.
    traffic: Option<Box<Traffic>>,
}

/// What is left of a session whose handshake is complete.
pub struct SessionKeys {
    pub suite: SupportedCipherSuite,
    /// Both directions' keys, with the sequence numbers that the handshake has used up.
    pub keys: ExtractedSecrets,
    /// TLS 1.3: what the next ones are derived from.
    pub traffic: Option<Box<Traffic>>,
}

/// What became of the bytes given to `feed`.
#[derive(Default)]
pub struct Fed {
    /// Bytes at the front that are done with; the rest must be given again, with more behind it.
    pub consumed: usize,
    /// The handshake has failed; the alert is among what is to be sent.
    pub error: Option<Error>,
}

impl Session {
    pub fn new(by: Negotiation) -> Result<Self, Error> {
        let Negotiation { config, strict, .. } = by;
        let tls = Box::new(UnbufferedServerConnection::new(config)?);
        let gate = Some(Gate::new(strict));
        Ok(Self { tls, established: false, presented: 0, gate, name: ServerName::NONE, traffic: None })
    }

    /// The handshake is complete, both Finished are in.
    pub fn is_established(&self) -> bool {
        self.established
    }

    /// It is complete, and what is left to send is nothing that the client waits for: NewSessionTicket (RFC 8446 section
    /// 4.6.1). In TLS 1.2 our Finished comes last.
    pub fn sends_only_tickets(&self) -> bool {
        self.established && self.tls.protocol_version() == Some(ProtocolVersion::TLSv1_3)
    }

    /// What came of the handshake, for those who count.
    pub fn facts(&self) -> Option<Facts> {
        Some(Facts {
            name: self.name,
            version: self.tls.protocol_version()?,
            suite: self.tls.negotiated_cipher_suite()?.suite(),
            group: self.group(),
            resumed: self.tls.handshake_kind() == Some(HandshakeKind::Resumed),
        })
    }

    /// The group of the key exchange, for the log.
    pub fn group(&self) -> Option<rustls::NamedGroup> {
        self.tls.negotiated_key_exchange_group().map(|g| g.name())
    }

    /// Processes the complete records at the front of `wire`, up to the end of the handshake; what rustls wants sent
    /// is appended to `out`.
    pub fn feed(&mut self, wire: &mut [u8], out: &mut Vec<u8>) -> Fed {
        let mut fed = Fed::default();
        let mut upto = self.presented;
        while let Some(len) = record_bytes(&wire[upto..]) {
            // Something that is no record goes in whole, and at once: rustls finds the words for it.
            let len = if len > WIRE_BYTES || !is_tls(&wire[upto..]) { wire.len() - upto } else { len };
            if wire.len() - upto < len {
                break;
            }
            upto += len;
            if let Some((why, alert)) = self.refused_at_the_gate(&wire[upto - len..upto]) {
                out.extend_from_slice(&alert);
                fed.error = Some(Error::General(why.to_string()));
                break;
            }
            self.process(&mut wire[..upto], &mut fed, out);
            if fed.error.is_some() || self.established {
                break;
            }
        }
        self.presented = upto - fed.consumed.min(upto);
        fed
    }

    /// rustls does not know the fallback signal and lacks two alerts, so the ClientHello is read before.
    fn refused_at_the_gate(&mut self, record: &[u8]) -> Option<(Refusal, [u8; 7])> {
        match self.gate.as_mut()?.judge(record) {
            Judgement::Incomplete => None,
            Judgement::Passes => {
                self.gate = None;
                None
            }
            Judgement::Refused { why, alert } => Some((why, alert)),
        }
    }

    fn process(&mut self, wire: &mut [u8], fed: &mut Fed, out: &mut Vec<u8>) {
        loop {
            let UnbufferedStatus { discard, state } = self.tls.process_tls_records(&mut wire[fed.consumed..]);
            if let Some(name) = resolver::take_asked() {
                self.name = name;
            }
            if let Some(traffic) = traffic::caught() {
                self.traffic = Some(traffic);
            }
            let mut again = true;
            match state {
                Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, out),
                Ok(ConnectionState::TransmitTlsData(sent)) => sent.done(),
                Ok(ConnectionState::WriteTraffic(_)) => {
                    self.established = true;
                    again = false;
                }
                Ok(ConnectionState::BlockedHandshake) => again = false,
                // No data and no close_notify can come before the handshake is complete: the configuration allows no
                // early data (RFC 8446 section 4.2.10).
                Ok(_) => fed.error = Some(Error::General("data within the handshake".into())),
                Err(error) => fed.error = Some(error),
            }
            fed.consumed += discard;
            if fed.error.is_some() {
                return self.take_alerts(out);
            }
            if !again {
                return;
            }
        }
    }

    /// Appends the alert that rustls still has to send.
    fn take_alerts(&mut self, out: &mut Vec<u8>) {
        loop {
            match self.tls.process_tls_records(&mut []).state {
                Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, out),
                Ok(ConnectionState::TransmitTlsData(sent)) => sent.done(),
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// Gives up rustls' connection for its keys.
    pub fn into_keys(self) -> Result<SessionKeys, Error> {
        let (keys, connection) = self.tls.dangerous_into_kernel_connection()?;
        Ok(SessionKeys { suite: connection.negotiated_cipher_suite(), keys, traffic: self.traffic })
    }
}

/// A header begins with a content type of the handshake and the major version 3.
fn is_tls(wire: &[u8]) -> bool {
    matches!(wire, [20..=23, 3, ..])
}

fn encode(data: &mut EncodeTlsData<'_, ServerConnectionData>, out: &mut Vec<u8>) {
    let at = out.len();
    let wanted = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(size)) => size.required_size,
        Ok(_) | Err(EncodeError::AlreadyEncoded) => return,
    };
    out.resize(at + wanted, 0);
    if data.encode(&mut out[at..]).is_err() {
        out.truncate(at);
    }
}
