//! A TLS session in userspace: rustls' unbuffered connection, fed one record at a time.
//!
//!   ciphertext ─▶ feed ─▶ plaintext, and what rustls wants sent      plaintext ─▶ seal ─▶ ciphertext
//!
//! One record at a time, because the door to the kernel must know what each record was: a record consumed without
//! plaintext is a KeyUpdate, and rustls neither tells that a reply is owed nor that the client's keys changed.
//! This module reads and writes no socket.

use rustls::kernel::KernelConnection;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncryptError, UnbufferedStatus};
use rustls::{Error, ExtractedSecrets, ProtocolVersion, ServerConfig, SupportedCipherSuite};
use std::sync::Arc;

/// Bytes of a record's header (RFC 8446 section 5.1).
pub const RECORD_HEADER_BYTES: usize = 5;
/// Plaintext bytes that a full record carries.
pub const RECORD_PLAIN_BYTES: usize = 16384;
/// The longest record that may be on the wire: RFC 5246 section 6.2.3 allows 2048 bytes of expansion.
pub const RECORD_WIRE_BYTES: usize = RECORD_HEADER_BYTES + RECORD_PLAIN_BYTES + 2048;
/// Room that `seal` wants beyond the plaintext, for each record: header, explicit nonce, inner type and tag.
const SEAL_OVERHEAD_BYTES: usize = 5 + 8 + 1 + 16;
/// And once: a KeyUpdate that goes first.
const SEAL_SLACK_BYTES: usize = 64;

/// The size of a buffer that takes `plain` bytes sealed.
pub const fn sealed_bytes(plain: usize) -> usize {
    plain + plain.div_ceil(RECORD_PLAIN_BYTES) * SEAL_OVERHEAD_BYTES + SEAL_SLACK_BYTES
}

/// A handshake under way, or a session whose records userspace protects.
pub struct Session {
    tls: Box<UnbufferedServerConnection>,
    established: bool,
    /// rustls may owe a KeyUpdate, which goes out with the next data: until then the door stays shut.
    pub owes_reply: bool,
    /// The client has changed its keys since the handshake.
    pub rekeyed: bool,
    sealed_records: u64,
    records_per_key: u64,
}

/// What became of the bytes given to `feed`.
#[derive(Default)]
pub struct Fed {
    /// Bytes at the front that are done with; the rest must be given again, with more behind it.
    pub consumed: usize,
    /// The client sent close_notify.
    pub closed: bool,
    /// TLS 1.2: the client wants to renegotiate. The refusal is among what is to be sent.
    pub renegotiation: bool,
    /// The session is over; the alert is among what is to be sent.
    pub error: Option<Error>,
}

/// Why nothing can be sealed any more.
#[derive(Debug)]
pub enum SealError {
    /// The key has protected all the records it may, and cannot be renewed. A close_notify may still go out.
    KeyExhausted,
    Room(usize),
}

impl Session {
    pub fn new(config: Arc<ServerConfig>, records_per_key: u64) -> Result<Self, Error> {
        let tls = Box::new(UnbufferedServerConnection::new(config)?);
        Ok(Self { tls, established: false, owes_reply: false, rekeyed: false, sealed_records: 0, records_per_key })
    }

    /// The handshake is complete, both Finished are in.
    pub fn is_established(&self) -> bool {
        self.established
    }

    pub fn is_tls12(&self) -> bool {
        self.tls.protocol_version() == Some(ProtocolVersion::TLSv1_2)
    }

    pub fn suite(&self) -> Option<SupportedCipherSuite> {
        self.tls.negotiated_cipher_suite()
    }

    pub fn details(&self) -> Details {
        Details {
            version: self.tls.protocol_version(),
            suite: self.tls.negotiated_cipher_suite().map(|s| s.suite()),
            group: self.tls.negotiated_key_exchange_group().map(|g| g.name()),
        }
    }

    /// Opens the complete records at the front of `wire`: data is appended to `plain`, what rustls wants sent to
    /// `out`. Stops early when the handshake completes, so that what follows stays where it is.
    pub fn feed(&mut self, wire: &mut [u8], plain: &mut Vec<u8>, out: &mut Vec<u8>) -> Fed {
        let mut fed = Fed::default();
        let mut upto = 0;
        while let Some(len) = record_bytes(&wire[upto..]) {
            // Something that is no record goes in whole: rustls finds the words for it.
            let len = if len > RECORD_WIRE_BYTES { wire.len() - upto } else { len };
            if wire.len() - upto < len {
                break;
            }
            let header = [wire[upto], wire[upto + 3], wire[upto + 4]];
            upto += len;
            let before = plain.len();
            let was_established = self.established;
            self.one_record(&mut wire[..upto], &mut fed, plain, out);
            if was_established {
                self.judge(header, plain.len() > before, &mut fed);
            }
            let finished_now = !was_established && self.established;
            if fed.error.is_some() || fed.closed || fed.renegotiation || finished_now {
                break;
            }
        }
        fed
    }

    /// Draws conclusions from a record after the handshake that gave data or gave none.
    fn judge(&mut self, [content_type, high, low]: [u8; 3], gave_data: bool, fed: &mut Fed) {
        /// A TLS 1.3 record that protects its content type alone: empty data, no KeyUpdate.
        const EMPTY_RECORD_BYTES: u16 = 17;
        if self.is_tls12() {
            fed.renegotiation = content_type == 22 && fed.error.is_none();
        } else if !gave_data && !fed.closed && content_type == 23 {
            let silent = u16::from_be_bytes([high, low]) != EMPTY_RECORD_BYTES;
            self.owes_reply |= silent;
            self.rekeyed |= silent;
        }
    }

    fn one_record(&mut self, wire: &mut [u8], fed: &mut Fed, plain: &mut Vec<u8>, out: &mut Vec<u8>) {
        loop {
            let UnbufferedStatus { mut discard, state } = self.tls.process_tls_records(&mut wire[fed.consumed..]);
            let mut again = true;
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        match record {
                            Ok(record) => {
                                discard += record.discard;
                                plain.extend_from_slice(record.payload);
                            }
                            Err(error) => fed.error = Some(error),
                        }
                    }
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, out),
                Ok(ConnectionState::TransmitTlsData(sent)) => sent.done(),
                Ok(ConnectionState::PeerClosed) => fed.closed = true,
                Ok(ConnectionState::WriteTraffic(_)) => {
                    self.established = true;
                    again = false;
                }
                Ok(ConnectionState::BlockedHandshake | ConnectionState::Closed) => again = false,
                // The configuration allows no early data (RFC 8446 section 4.2.10), so there is none to read.
                Ok(_) => fed.error = Some(Error::General("early data without an offer of it".into())),
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

    /// Appends what rustls still has to send, an alert most likely.
    fn take_alerts(&mut self, out: &mut Vec<u8>) {
        loop {
            match self.tls.process_tls_records(&mut []).state {
                Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, out),
                Ok(ConnectionState::TransmitTlsData(sent)) => sent.done(),
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// Seals `plain` into records at the front of `out` and returns their length. `out` has `sealed_bytes` of room.
    pub fn seal(&mut self, plain: &[u8], out: &mut [u8]) -> Result<usize, SealError> {
        let records = plain.len().div_ceil(RECORD_PLAIN_BYTES) as u64;
        let mut at = 0;
        let limit = self.suite().map_or(0, |suite| record_limit(suite, self.records_per_key));
        if self.sealed_records + records > limit {
            if self.is_tls12() {
                return Err(SealError::KeyExhausted);
            }
            at = self.renew_key(out)?;
        }
        loop {
            let UnbufferedStatus { state, .. } = self.tls.process_tls_records(&mut []);
            match state {
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    let n = traffic.encrypt(plain, &mut out[at..]).map_err(seal_error)?;
                    self.sealed_records += records;
                    if !plain.is_empty() {
                        self.owes_reply = false;
                    }
                    return Ok(at + n);
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    at += data.encode(&mut out[at..]).map_err(|_| SealError::Room(at))?;
                }
                Ok(ConnectionState::TransmitTlsData(sent)) => sent.done(),
                // Seen once, at the close_notify that `feed` has reported.
                Ok(ConnectionState::PeerClosed) => {}
                Ok(_) | Err(_) => return Err(SealError::KeyExhausted),
            }
        }
    }

    fn renew_key(&mut self, out: &mut [u8]) -> Result<usize, SealError> {
        if let Ok(ConnectionState::WriteTraffic(traffic)) = self.tls.process_tls_records(&mut []).state {
            traffic.refresh_traffic_keys().map_err(|_| SealError::KeyExhausted)?;
        }
        self.sealed_records = 0;
        let mut message = Vec::new();
        self.take_alerts(&mut message);
        let room = out.get_mut(..message.len()).ok_or(SealError::Room(message.len()))?;
        room.copy_from_slice(&message);
        Ok(message.len())
    }

    /// Appends our close_notify to `out`.
    pub fn close(&mut self, out: &mut Vec<u8>) {
        self.take_alerts(out);
        let mut alert = [0u8; 64];
        if let Ok(ConnectionState::WriteTraffic(mut traffic)) = self.tls.process_tls_records(&mut []).state
            && let Ok(n) = traffic.queue_close_notify(&mut alert)
        {
            out.extend_from_slice(&alert[..n]);
        }
    }

    /// Gives up the session for its keys. One way: refused by rustls only while records wait to be sent.
    pub fn into_kernel(self) -> Result<(ExtractedSecrets, KernelConnection<ServerConnectionData>), Error> {
        self.tls.dangerous_into_kernel_connection()
    }
}

/// What was negotiated, for the log.
#[derive(Debug)]
pub struct Details {
    pub version: Option<ProtocolVersion>,
    pub suite: Option<rustls::CipherSuite>,
    pub group: Option<rustls::NamedGroup>,
}

fn encode(data: &mut rustls::unbuffered::EncodeTlsData<'_, ServerConnectionData>, out: &mut Vec<u8>) {
    use rustls::unbuffered::EncodeError;
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

fn seal_error(error: EncryptError) -> SealError {
    match error {
        EncryptError::InsufficientSize(size) => SealError::Room(size.required_size),
        EncryptError::EncryptExhausted => SealError::KeyExhausted,
    }
}

/// Records that one key of this suite may protect: the suite's own confidentiality limit, which the configuration may
/// only lower. ChaCha20-Poly1305 has none (RFC 8446 section 5.5).
pub fn record_limit(suite: SupportedCipherSuite, configured: u64) -> u64 {
    let own = match suite {
        SupportedCipherSuite::Tls12(s) => s.common.confidentiality_limit,
        SupportedCipherSuite::Tls13(s) => s.common.confidentiality_limit,
    };
    if own == u64::MAX { own } else { own.min(configured) }
}

/// The length of the record at the front, header included, once its header is there.
pub fn record_bytes(wire: &[u8]) -> Option<usize> {
    match wire {
        [_, _, _, high, low, ..] => Some(RECORD_HEADER_BYTES + usize::from(u16::from_be_bytes([*high, *low]))),
        _ => None,
    }
}

/// How many bytes are missing until the last record of `wire` is complete: first of its header, then of its body.
/// Behind a complete one, the header of the next.
pub fn missing_bytes(mut wire: &[u8]) -> usize {
    loop {
        match record_bytes(wire).map(|len| len.min(RECORD_WIRE_BYTES)) {
            None => return RECORD_HEADER_BYTES - wire.len(),
            Some(len) if len > wire.len() => return len - wire.len(),
            Some(len) => wire = &wire[len..],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::missing_bytes;

    #[test]
    fn exact_reads_ask_for_the_header_and_then_for_the_body() {
        assert_eq!(missing_bytes(&[]), 5);
        assert_eq!(missing_bytes(&[23, 3]), 3);
        assert_eq!(missing_bytes(&[23, 3, 3, 0, 7]), 7);
        assert_eq!(missing_bytes(&[23, 3, 3, 0, 2, 9]), 1);
        assert_eq!(missing_bytes(&[23, 3, 3, 0, 2, 9, 9]), 5);
        assert_eq!(missing_bytes(&[23, 3, 3, 0, 0, 23, 3]), 3);
    }
}
