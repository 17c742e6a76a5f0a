//! Records other than data on a TLS socket: what the client's mean, and ours.

use crate::observe::counters::End;
use crate::sys::ktls::{self, Received, content_type};
use crate::sys::socket;
use std::io;
use std::os::fd::BorrowedFd;

/// Alert descriptions of RFC 8446 section 6.
pub mod alert {
    pub const CLOSE_NOTIFY: [u8; 2] = [1, 0];
    pub const UNEXPECTED_MESSAGE: [u8; 2] = [2, 10];
    pub const BAD_RECORD_MAC: [u8; 2] = [2, 20];
    pub const RECORD_OVERFLOW: [u8; 2] = [2, 22];
    pub const DECODE_ERROR: [u8; 2] = [2, 50];
    pub const INTERNAL_ERROR: [u8; 2] = [2, 80];
    /// A warning, TLS 1.2 only.
    pub const NO_RENEGOTIATION: [u8; 2] = [1, 100];
}

/// KeyUpdate messages in a row, without data between them, after which a client is ended, as rustls and BoringSSL do.
pub const KEY_UPDATES_IN_A_ROW: u32 = 32;

/// Records of ours that may still be on their way when a client answers each of them with a KeyUpdate: what fits into
/// the largest send and receive buffers. A JDK (jdk.tls.keyLimits) does so from its limit until our reply reaches it.
const CREDIT_RECORDS: u32 = 1024;

/// Tells a client that rekeys from one that only does that.
#[derive(Debug, Default)]
pub struct Storm {
    in_a_row: u32,
    credit: u32,
}

impl Storm {
    /// Data came from the client.
    pub fn received_data(&mut self) {
        self.in_a_row = 0;
    }

    /// Data went to the client, which may answer each of its records.
    pub fn sent_data(&mut self, bytes: usize) {
        let records = u32::try_from(bytes.div_ceil(crate::protect::PLAIN_BYTES)).unwrap_or(CREDIT_RECORDS);
        self.credit = self.credit.saturating_add(records).min(CREDIT_RECORDS);
    }

    /// A KeyUpdate came: true if it is one too many.
    pub fn received_key_update(&mut self) -> bool {
        self.in_a_row += 1;
        self.in_a_row > KEY_UPDATES_IN_A_ROW + self.credit
    }
}

/// Our KeyUpdate, asking for none in return (RFC 8446 section 4.6.3).
pub const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// What was at the head of the client's stream when splice would not take it.
#[derive(Debug, PartialEq, Eq)]
pub enum Head {
    /// Bytes of data, in the buffer. 0: an empty record.
    Data(usize),
    CloseNotify,
    /// A warning that changes nothing.
    Ignored,
    KeyUpdate {
        reply: bool,
    },
    /// TLS 1.2: the client wants to renegotiate.
    Renegotiation,
    /// The end of TCP's stream, without a close_notify.
    Eof,
    /// Nothing is there.
    Nothing,
    Fatal(Fatal),
}

/// An end that the client caused, with the alert that tells it so.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub struct Fatal {
    pub how: End,
    pub alert: Option<[u8; 2]>,
}

/// Reads one record, or some data, from a TLS socket.
pub fn read_head(client: BorrowedFd<'_>, buffer: &mut [u8], tls12: bool) -> Head {
    // Mostly it is data, which a plain recv takes, and for less than recvmsg. Any other record it leaves alone and says EIO.
    match socket::recv(client, buffer) {
        Ok(n) if n > 0 => return Head::Data(n),
        Err(e) if socket::is_again(&e) => return Head::Nothing,
        Err(e) if e.raw_os_error() != Some(libc::EIO) => return Head::Fatal(read_error(&e)),
        Ok(_) | Err(_) => {}
    }
    match ktls::receive(client, buffer) {
        Ok(Received::Eof) => Head::Eof,
        Ok(Received::Record { content_type: content_type::APPLICATION_DATA, len }) => Head::Data(len),
        Ok(Received::Record { content_type: content_type::ALERT, len }) => read_alert(&buffer[..len], tls12),
        Ok(Received::Record { content_type: content_type::HANDSHAKE, len }) => read_handshake(&buffer[..len], tls12),
        Ok(Received::Record { .. }) => unexpected(),
        Err(e) if socket::is_again(&e) => Head::Nothing,
        Err(e) => Head::Fatal(read_error(&e)),
    }
}

/// A record that has no place here.
pub fn unexpected() -> Head {
    Head::Fatal(Fatal { how: End::UnexpectedMessage, alert: Some(alert::UNEXPECTED_MESSAGE) })
}

/// What an alert asks for.
pub fn read_alert(body: &[u8], tls12: bool) -> Head {
    const WARNING: u8 = 1;
    const USER_CANCELED: u8 = 90;
    match body {
        [_, 0] => Head::CloseNotify,
        [WARNING, _] if tls12 => Head::Ignored,
        [_, USER_CANCELED] => Head::Ignored,
        [_, description] => {
            tracing::info!(stage = "relay", description, "the client sent an alert");
            Head::Fatal(Fatal { how: End::ClientAlert, alert: None })
        }
        _ => Head::Fatal(Fatal { how: End::BadRecord, alert: Some(alert::DECODE_ERROR) }),
    }
}

/// What a handshake message after the handshake asks for.
pub fn read_handshake(body: &[u8], tls12: bool) -> Head {
    if tls12 {
        return Head::Renegotiation;
    }
    // A KeyUpdate must end its record, since the keys change behind it; so exactly this, and nothing else, is one.
    match body {
        [24, 0, 0, 1, request @ (0 | 1)] => Head::KeyUpdate { reply: *request == 1 },
        _ => unexpected(),
    }
}

/// What an error of a read on a TLS socket says of the client's records (net/tls/tls_sw.c).
pub fn read_error(error: &io::Error) -> Fatal {
    let (how, alert) = match error.raw_os_error() {
        Some(libc::EBADMSG) => (End::BadRecordMac, Some(alert::BAD_RECORD_MAC)),
        Some(libc::EMSGSIZE) => (End::BadRecord, Some(alert::RECORD_OVERFLOW)),
        Some(libc::EINVAL) => (End::BadRecord, Some(alert::DECODE_ERROR)),
        _ if super::is_gone(error) => (End::ClientReset, None),
        _ => (End::Internal, Some(alert::INTERNAL_ERROR)),
    };
    Fatal { how, alert }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_key_update_is_one() {
        assert_eq!(read_handshake(&[24, 0, 0, 1, 0], false), Head::KeyUpdate { reply: false });
        assert_eq!(read_handshake(&[24, 0, 0, 1, 1], false), Head::KeyUpdate { reply: true });
        for bad in [&[24, 0, 0, 1][..], &[24, 0, 0, 1, 2], &[24, 0, 0, 1, 0, 24, 0, 0, 1, 0], &[1, 0, 0, 0], &[]] {
            assert_eq!(read_handshake(bad, false), unexpected(), "{bad:?}");
        }
        assert_eq!(read_handshake(&[1, 0, 0, 0], true), Head::Renegotiation);
    }

    #[test]
    fn a_client_may_answer_each_record_with_a_key_update_and_no_more_than_that() {
        let mut storm = Storm::default();
        assert!((0..KEY_UPDATES_IN_A_ROW).all(|_| !storm.received_key_update()));
        assert!(storm.received_key_update());
        storm.received_data();
        storm.sent_data(10 * crate::protect::PLAIN_BYTES);
        storm.received_data();
        assert!((0..KEY_UPDATES_IN_A_ROW + 10).all(|_| !storm.received_key_update()));
        assert!(storm.received_key_update());
    }

    #[test]
    fn only_close_notify_is_a_clean_end() {
        assert_eq!(read_alert(&[1, 0], false), Head::CloseNotify);
        assert_eq!(read_alert(&[2, 0], false), Head::CloseNotify);
        assert!(matches!(read_alert(&[2, 40], false), Head::Fatal(f) if f.how == End::ClientAlert));
        assert!(matches!(read_alert(&[1], false), Head::Fatal(f) if f.how == End::BadRecord));
    }
}
