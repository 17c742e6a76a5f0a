//! One TLS client connection of the generator: handshake, small requests, and the two ways of moving bulk that keep the
//! generator's own cryptography out of the way.
//!
//!   bulk down: records are counted, not decrypted      bulk up: records are sealed before the clock runs
//!
//! Whether a peer passes bytes on unchanged is checked once, by `check`, with everything decrypted.

mod answer;
mod counted;
mod kept;
mod target;

use crate::upstream;
use anyhow::{Context, Result, bail, ensure};
use rustls::{ClientConfig, ClientConnection, HandshakeKind};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

pub use answer::{Answer, Whole};
pub use counted::Counted;
pub use kept::Kept;
pub use target::{Protection, Sessions, Target, Trust};

/// A socket that does nothing for so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(15);
const RECORD_HEADER_BYTES: usize = 5;
/// The longest record there is: 2^14 + 256, and its header.
const RECORD_LIMIT_BYTES: usize = (16 << 10) + 256 + RECORD_HEADER_BYTES;

/// The server has ended the connection, and nothing of an answer had come: it may have done so before it was asked.
#[derive(Debug, thiserror::Error)]
#[error("the server closed the connection and gave no answer")]
pub struct Closed;

/// An open connection.
#[derive(Debug)]
pub struct Session {
    socket: TcpStream,
    tls: Option<Box<ClientConnection>>,
    inbox: Inbox,
    /// The server has said that no other answer follows.
    is_over: bool,
}

impl Session {
    /// Connects and shakes hands.
    pub fn open(target: &Target, config: Option<&Arc<ClientConfig>>) -> Result<Self> {
        let socket = TcpStream::connect_timeout(&target.address, PATIENCE).map_err(|error| refused(target, error))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let tls = match config {
            Some(config) => Some(Box::new(ClientConnection::new(config.clone(), target.name.clone())?)),
            None => None,
        };
        let mut session = Self { socket, tls, inbox: Inbox::default(), is_over: false };
        session.shake_hands().context("handshake")?;
        Ok(session)
    }

    fn shake_hands(&mut self) -> Result<()> {
        while let Some(tls) = &mut self.tls {
            while tls.wants_write() {
                tls.write_tls(&mut self.socket)?;
            }
            if !tls.is_handshaking() {
                break;
            }
            if !self.take_record()? {
                bail!("the server closed the connection");
            }
        }
        Ok(())
    }

    /// Whether this session goes on with an earlier one's secrets.
    pub fn resumed(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.handshake_kind() == Some(HandshakeKind::Resumed))
    }

    /// Whether the last answer was announced as the last one.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// The socket, for waiting and for its end.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Gives one record to the TLS library; false at the end of the stream.
    fn take_record(&mut self) -> Result<bool> {
        let Some(tls) = &mut self.tls else { bail!("no TLS here") };
        let Some(mut record) = self.inbox.record(&mut self.socket)? else { return Ok(false) };
        while !record.is_empty() {
            tls.read_tls(&mut record)?;
        }
        tls.process_new_packets()?;
        Ok(true)
    }

    /// Sends bytes.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.tls {
            None => self.socket.write_all(bytes).context("send"),
            Some(tls) => {
                let mut rest = bytes;
                while !rest.is_empty() {
                    let count = tls.writer().write(rest)?;
                    rest = &rest[count..];
                    while tls.wants_write() {
                        tls.write_tls(&mut self.socket).context("send")?;
                    }
                }
                Ok(())
            }
        }
    }

    /// Receives what there is, at most so much; 0 at the end.
    pub fn receive(&mut self, into: &mut [u8]) -> Result<usize> {
        if self.tls.is_none() {
            return self.inbox.read(&mut self.socket, into);
        }
        loop {
            if let Some(tls) = &mut self.tls {
                match tls.reader().read(into) {
                    Ok(count) => return Ok(count),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error).context("receive"),
                }
            }
            if !self.take_record()? {
                return Ok(0);
            }
        }
    }

    /// Sends a request and takes the whole answer, which must not be a refusal.
    pub fn exchange(&mut self, request: &[u8]) -> Result<()> {
        self.send(request).map_err(|error| if is_end(&error) { Closed.into() } else { error })?;
        self.accepted()
    }

    /// Takes one answer, which must not be a refusal.
    pub fn accepted(&mut self) -> Result<()> {
        is_no_refusal(self.answer(|_, _| ())?.status)
    }

    /// Takes one answer; its body goes to `on_body`, with the position.
    pub fn answer(&mut self, mut on_body: impl FnMut(u64, &[u8])) -> Result<Whole> {
        let (mut answer, mut buffer) = (Answer::default(), [0; RECORD_LIMIT_BYTES]);
        loop {
            if let Some(whole) = self.more_of(&mut answer, &mut buffer, &mut on_body)? {
                return Ok(whole);
            }
        }
    }

    /// Takes the next bytes of an answer.
    fn more_of(
        &mut self,
        answer: &mut Answer,
        buffer: &mut [u8],
        on_body: impl FnMut(u64, &[u8]),
    ) -> Result<Option<Whole>> {
        let count = match self.receive(buffer) {
            Ok(0) if !answer.has_begun() => return Err(Closed.into()),
            Err(error) if is_end(&error) && !answer.has_begun() => return Err(Closed.into()),
            result => result?,
        };
        let whole = answer.take(&buffer[..count], on_body)?;
        self.is_over = whole.is_some_and(|whole| whole.is_last);
        Ok(whole)
    }

    /// Takes what there is of an answer, without waiting for more; true when it is whole. It must not be a refusal, and the
    /// socket one that does not block.
    pub fn accepted_so_far(&mut self, answer: &mut Answer) -> Result<bool> {
        let mut buffer = [0; RECORD_LIMIT_BYTES];
        loop {
            match self.more_of(answer, &mut buffer, |_, _| ()) {
                Err(error) if is_again(&error) => return Ok(false),
                Err(error) => return Err(error),
                Ok(None) => {}
                Ok(Some(whole)) => return is_no_refusal(whole.status).map(|()| true),
            }
        }
    }

    /// Takes the next piece of an answer that must not be a refusal; gives how much of its body that was, and whether it is
    /// whole now.
    pub fn piece_of(&mut self, answer: &mut Answer, buffer: &mut [u8]) -> Result<(u64, bool)> {
        let mut bytes = 0;
        let whole = self.more_of(answer, buffer, |_, part| bytes += part.len() as u64)?;
        if let Some((status, _)) = answer.head() {
            is_no_refusal(status)?;
        }
        Ok((bytes, whole.is_some()))
    }

    /// Whether the server has neither ended the connection nor said anything. From here on the socket does not block.
    pub fn is_idle(&mut self) -> Result<()> {
        self.socket.set_nonblocking(true)?;
        match self.receive(&mut [0; 1]) {
            Ok(0) => bail!("the server ended an idle connection"),
            Ok(_) => bail!("an answer came that nobody asked for"),
            Err(error) if is_again(&error) => Ok(()),
            Err(error) => Err(error.context("an idle connection")),
        }
    }

    /// Records with these bytes, for later.
    pub fn seal(&mut self, bytes: &[u8], into: &mut Vec<u8>) -> Result<()> {
        let Some(tls) = &mut self.tls else {
            into.extend_from_slice(bytes);
            return Ok(());
        };
        let mut rest = bytes;
        while !rest.is_empty() {
            let count = tls.writer().write(rest)?;
            rest = &rest[count..];
            while tls.wants_write() {
                tls.write_tls(into)?;
            }
        }
        Ok(())
    }

    /// Sends what was sealed.
    pub fn send_sealed(&mut self, records: &[u8]) -> Result<()> {
        self.socket.write_all(records).context("send")
    }

    /// Waits for the head of an answer, which must not be a refusal; from there on records are only counted. The goodbye has to
    /// be sealed before, as there is nobody left to seal it.
    pub fn count_only(mut self) -> Result<Counted> {
        let (mut answer, mut buffer) = (Answer::default(), [0; RECORD_LIMIT_BYTES]);
        while answer.head().is_none() {
            self.piece_of(&mut answer, &mut buffer)?;
        }
        let overhead = match &self.tls {
            None => None,
            // TLS 1.3 AES-GCM: a tag and the type. TLS 1.2: the explicit nonce and a tag.
            Some(tls) if tls.protocol_version() == Some(rustls::ProtocolVersion::TLSv1_3) => Some(17),
            Some(_) => Some(24),
        };
        let already = &self.inbox.bytes[self.inbox.start..self.inbox.end];
        Ok(Counted::new(self.socket, overhead, &answer, already))
    }

    /// The goodbye as a record, for later.
    pub fn sealed_goodbye(&mut self) -> Result<Vec<u8>> {
        let mut record = Vec::new();
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            while tls.wants_write() {
                tls.write_tls(&mut record)?;
            }
        }
        Ok(record)
    }

    /// Says goodbye; whether the server's own end is waited for is up to the caller.
    pub fn finish(&mut self) -> Result<()> {
        let goodbye = self.sealed_goodbye()?;
        self.send_sealed(&goodbye).context("send close_notify")
    }

    /// Reads until the server's end.
    pub fn wait_for_end(&mut self) -> Result<()> {
        self.socket.shutdown(std::net::Shutdown::Write).context("send FIN")?;
        let mut scratch = [0; 4096];
        loop {
            match self.socket.read(&mut scratch) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(error).context("wait for the server's end"),
            }
        }
    }
}

fn is_no_refusal(status: u16) -> Result<()> {
    ensure!(status < 400, "the answer's status is {status}");
    Ok(())
}

fn kind_of(error: &anyhow::Error) -> Option<ErrorKind> {
    error.downcast_ref::<std::io::Error>().map(std::io::Error::kind)
}

fn is_again(error: &anyhow::Error) -> bool {
    kind_of(error) == Some(ErrorKind::WouldBlock)
}

/// Whether the server has ended the connection, without a goodbye.
fn is_end(error: &anyhow::Error) -> bool {
    matches!(kind_of(error), Some(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof))
}

/// Why there is no connection, and what mends it where that is this side.
fn refused(target: &Target, error: std::io::Error) -> anyhow::Error {
    let mend = match error.kind() {
        ErrorKind::AddrNotAvailable => {
            ": every local port to it is in use or waits (TIME_WAIT): fewer connections in a second, more ports by \
             sysctl net.ipv4.ip_local_port_range=\"1024 65535\", or sysctl net.ipv4.tcp_tw_reuse=1"
        }
        _ => "",
    };
    anyhow::Error::new(error).context(format!("connect to {}{mend}", target.address))
}

/// What has come and was not looked at yet.
#[derive(Debug, Default)]
struct Inbox {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Inbox {
    /// The next whole record; `None` at the end of the stream. What lies behind it stays here.
    fn record(&mut self, socket: &mut TcpStream) -> Result<Option<&[u8]>> {
        loop {
            let have = &self.bytes[self.start..self.end];
            if have.len() >= RECORD_HEADER_BYTES {
                let whole = RECORD_HEADER_BYTES + usize::from(u16::from_be_bytes([have[3], have[4]]));
                ensure!(whole <= RECORD_LIMIT_BYTES, "a record of {whole} bytes: this is no TLS");
                if have.len() >= whole {
                    let from = self.start;
                    self.start += whole;
                    return Ok(Some(&self.bytes[from..from + whole]));
                }
            }
            if self.more(socket)? == 0 {
                ensure!(self.start == self.end, "the stream ended inside a record");
                return Ok(None);
            }
        }
    }

    fn more(&mut self, socket: &mut TcpStream) -> Result<usize> {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        self.bytes.resize(RECORD_LIMIT_BYTES, 0);
        let count = socket.read(&mut self.bytes[self.end..]).context("receive")?;
        self.end += count;
        Ok(count)
    }

    fn read(&mut self, socket: &mut TcpStream, into: &mut [u8]) -> Result<usize> {
        if self.start == self.end {
            return socket.read(into).context("receive");
        }
        let count = into.len().min(self.end - self.start);
        into[..count].copy_from_slice(&self.bytes[self.start..self.start + count]);
        self.start += count;
        Ok(count)
    }
}

/// Passes the pattern through a peer both ways and compares every byte.
pub fn check(target: &Target, bytes: u64) -> Result<()> {
    let mut session = Session::open(target, target.config(Sessions::Fresh)?.as_ref())?;
    session.send(&target.get(bytes))?;
    let mut wrong = None;
    let Whole { status, bytes: length, .. } = session.answer(|at, body| {
        if wrong.is_none() && body != upstream::pattern(at, body.len()) {
            wrong = Some(at);
        }
    })?;
    ensure!(status == 200 && length == bytes, "a download of {bytes} bytes gave status {status} and {length} bytes");
    if let Some(at) = wrong {
        bail!("a download is not what the upstream sent, near byte {at}");
    }
    let mut upload = target.post("/checked", bytes);
    upload.extend(upstream::pattern(0, usize::try_from(bytes)?));
    session.send(&upload)?;
    let status = session.answer(|_, _| ())?.status;
    ensure!(status == 200, "an upload of {bytes} bytes did not reach the upstream as it was sent: status {status}");
    session.finish()
}
