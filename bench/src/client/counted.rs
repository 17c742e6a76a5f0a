//! Counts the payload of a TLS stream without decrypting it: a record's header says how long it is.

use super::{Answer, RECORD_HEADER_BYTES};
use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

const APPLICATION_DATA: u8 = 23;

/// A connection whose incoming payload is counted, not read.
#[derive(Debug)]
pub struct Counted {
    socket: TcpStream,
    records: Option<Records>,
    payload: u64,
    length: Option<u64>,
}

impl Counted {
    /// Goes on with an answer whose head is in, and of which some bytes were read already. Without an overhead per record
    /// there are no records.
    pub(super) fn new(socket: TcpStream, overhead: Option<u64>, answer: &Answer, already: &[u8]) -> Self {
        let payload = answer.head().map_or(0, |(_, taken)| taken);
        let mut counted = Self { socket, records: overhead.map(Records::new), payload, length: answer.length() };
        counted.take(already);
        counted
    }

    /// Receives at most `scratch` bytes; gives the payload in what came, 0 only if there was none in it, `None` at the end.
    pub fn receive(&mut self, scratch: &mut [u8]) -> Result<Option<u64>> {
        let count = self.socket.read(scratch).context("receive")?;
        if count == 0 {
            return Ok(None);
        }
        let before = self.payload;
        self.take(&scratch[..count]);
        Ok(Some(self.payload - before))
    }

    /// What has come of the answer's body.
    pub fn payload(&self) -> u64 {
        self.payload
    }

    /// Whether the body has come whole, and no other record in part.
    pub fn is_whole(&self) -> bool {
        self.length.is_some_and(|length| self.payload >= length)
            && self.records.as_ref().is_none_or(|records| records.have == 0 && records.body_left == 0)
    }

    /// Sends what was sealed as a goodbye, and the FIN.
    pub fn end(&mut self, goodbye: &[u8]) -> Result<()> {
        self.socket.write_all(goodbye).context("send close_notify")?;
        self.socket.shutdown(Shutdown::Write).context("send FIN")
    }

    fn take(&mut self, bytes: &[u8]) {
        self.payload += match &mut self.records {
            None => bytes.len() as u64,
            Some(records) => records.take(bytes),
        };
    }
}

/// Finds the borders of records in a stream.
#[derive(Debug)]
struct Records {
    overhead: u64,
    header: [u8; RECORD_HEADER_BYTES],
    have: usize,
    body_left: usize,
}

impl Records {
    fn new(overhead: u64) -> Self {
        Self { overhead, header: [0; RECORD_HEADER_BYTES], have: 0, body_left: 0 }
    }

    /// The payload of records whose header ends in these bytes.
    fn take(&mut self, mut bytes: &[u8]) -> u64 {
        let mut payload = 0;
        while !bytes.is_empty() {
            if self.body_left > 0 {
                let skipped = bytes.len().min(self.body_left);
                self.body_left -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            let count = bytes.len().min(RECORD_HEADER_BYTES - self.have);
            self.header[self.have..self.have + count].copy_from_slice(&bytes[..count]);
            self.have += count;
            bytes = &bytes[count..];
            if self.have == RECORD_HEADER_BYTES {
                self.have = 0;
                self.body_left = usize::from(u16::from_be_bytes([self.header[3], self.header[4]]));
                if self.header[0] == APPLICATION_DATA {
                    payload += (self.body_left as u64).saturating_sub(self.overhead);
                }
            }
        }
        payload
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_is_counted_across_any_border() {
        let mut stream = vec![22, 3, 3, 0, 4, 1, 2, 3, 4];
        stream.extend([APPLICATION_DATA, 3, 3, 0, 20]);
        stream.extend([0; 20]);
        stream.extend([APPLICATION_DATA, 3, 3, 1, 17]);
        stream.extend([0; 273]);
        for step in 1..stream.len() {
            let mut records = Records::new(17);
            let payload: u64 = stream.chunks(step).map(|piece| records.take(piece)).sum();
            assert_eq!(payload, 3 + 256, "in pieces of {step}");
        }
    }
}
