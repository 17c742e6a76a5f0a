//! A TLS client with the record layer in its own hands: after the handshake every byte on the wire is the test's choice.
//!
//!     Client ─▶ tx: Tx   seals and sends, rekeys
//!            └▶ rx: Rx   receives, opens, keeps a list of the records it saw, follows KeyUpdates
//!
//! Both halves share a socket and may be moved to threads of their own.

pub mod handshake;
pub mod record;

use crate::run::Context;
use anyhow::{Context as _, Result, bail, ensure};
use handshake::{Kernel, Offer};
use record::{ALERT, DATA, HANDSHAKE, HEADER_BYTES, Key, MAX_BODY_BYTES, MAX_PLAINTEXT_BYTES, Seen, record_len};
use rustls::ExtractedSecrets;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub const CLOSE_NOTIFY: u8 = 0;
pub const UNEXPECTED_MESSAGE: u8 = 10;
pub const BAD_RECORD_MAC: u8 = 20;
pub const RECORD_OVERFLOW: u8 = 22;
pub const NO_RENEGOTIATION: u8 = 100;

const WARNING: u8 = 1;
const KEY_UPDATE: u8 = 24;
const NEW_SESSION_TICKET: u8 = 4;

#[derive(Debug)]
pub struct Client {
    pub tx: Tx,
    pub rx: Rx,
}

struct Shared {
    socket: TcpStream,
    tls13: bool,
    kernel: Mutex<Kernel>,
    /// KeyUpdates that the server asked for and has not been sent yet.
    replies_owed: AtomicU64,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.socket)
    }
}

impl Client {
    /// A whole handshake.
    pub fn connect(ctx: &Context, address: SocketAddr, offer: &Offer) -> Result<Self> {
        handshake::prepare(ctx, address, offer)?.complete()
    }

    /// A whole handshake on a socket that was given its options before.
    pub fn connect_on(ctx: &Context, socket: TcpStream, offer: &Offer) -> Result<Self> {
        handshake::prepare_on(ctx, socket, offer)?.complete()
    }

    fn new(
        socket: TcpStream,
        tls13: bool,
        secrets: ExtractedSecrets,
        kernel: Kernel,
        received: Vec<u8>,
        seen: Vec<Seen>,
    ) -> Result<Self> {
        let shared = Shared { socket, tls13, kernel: Mutex::new(kernel), replies_owed: AtomicU64::new(0) };
        let shared = Arc::new(shared);
        let tx = Tx { shared: shared.clone(), key: Key::new(tls13, secrets.tx)?, key_updates: 0 };
        let key = Key::new(tls13, secrets.rx)?;
        let rx = Rx {
            shared,
            key,
            end: received.len(),
            buffer: received,
            start: 0,
            seen,
            key_updates: 0,
            tickets: 0,
            closed: false,
            read_bytes: READ_BYTES,
            rest: Duration::ZERO,
        };
        Ok(Self { tx, rx })
    }

    pub fn socket(&self) -> &TcpStream {
        &self.tx.shared.socket
    }

    /// Ends the connection by a reset, with whatever is under way.
    pub fn reset(self) -> Result<()> {
        socket2::SockRef::from(self.socket()).set_linger(Some(Duration::ZERO))?;
        Ok(())
    }

    /// Sends data and close_notify in both senses, reads to the end: what a polite program does.
    pub fn finish(mut self) -> Result<Ended> {
        self.tx.close_notify()?;
        self.rx.drain(None)
    }
}

/// The sending half.
#[derive(Debug)]
pub struct Tx {
    shared: Arc<Shared>,
    key: Key,
    pub key_updates: u64,
}

impl Tx {
    pub fn is_tls13(&self) -> bool {
        self.shared.tls13
    }

    pub fn seal(&mut self, kind: u8, payload: &[u8], padding: usize) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(payload.len() + padding + 64);
        self.key.seal(&mut out, kind, payload, padding)?;
        Ok(out)
    }

    /// Appends a data record; before it, what the server asked for.
    pub fn seal_data(&mut self, out: &mut Vec<u8>, payload: &[u8], padding: usize) -> Result<()> {
        self.answer_key_updates(out)?;
        self.key.seal(out, DATA, payload, padding)
    }

    /// Data in full records, sent.
    pub fn data(&mut self, payload: &[u8]) -> Result<()> {
        let mut out = Vec::with_capacity(payload.len() + payload.len() / 100 + 64);
        for part in payload.chunks(MAX_PLAINTEXT_BYTES) {
            self.seal_data(&mut out, part, 0)?;
        }
        self.write(&out)
    }

    fn answer_key_updates(&mut self, out: &mut Vec<u8>) -> Result<()> {
        if self.shared.replies_owed.swap(0, Ordering::Relaxed) > 0 {
            self.seal_key_update(out, false)?;
        }
        Ok(())
    }

    /// Appends a KeyUpdate under the key as it is; what follows is sealed under the next one (RFC 8446 section 4.6.3).
    pub fn seal_key_update(&mut self, out: &mut Vec<u8>, requested: bool) -> Result<()> {
        self.key.seal(out, HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, u8::from(requested)], 0)?;
        self.ratchet()
    }

    /// The next key, without a word to the peer.
    pub fn ratchet(&mut self) -> Result<()> {
        let next =
            self.shared.kernel.lock().expect("no holder panics").update_tx_secret().context("next sending key")?;
        self.key = Key::new(true, next)?;
        self.key_updates += 1;
        Ok(())
    }

    pub fn key_update(&mut self, requested: bool) -> Result<()> {
        let mut out = Vec::new();
        self.seal_key_update(&mut out, requested)?;
        self.write(&out)
    }

    pub fn close_notify(&mut self) -> Result<()> {
        let record = self.seal(ALERT, &[WARNING, CLOSE_NOTIFY], 0)?;
        self.write(&record)
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        (&self.shared.socket).write_all(bytes).context("send")
    }

    /// Sends `bytes` cut at these places, each piece in a segment of its own, with a pause in which it is read.
    pub fn write_cut(&mut self, bytes: &[u8], cuts: &[usize], pause: Duration) -> Result<()> {
        let mut start = 0;
        for cut in cuts.iter().copied().chain([bytes.len()]) {
            if cut > start {
                self.write(&bytes[start..cut])?;
                start = cut;
                std::thread::sleep(pause);
            }
        }
        Ok(())
    }

    /// The end of TCP, whatever TLS thinks of it.
    pub fn fin(&self) -> Result<()> {
        self.shared.socket.shutdown(Shutdown::Write).context("shut down the sending half")
    }

    pub fn socket(&self) -> &TcpStream {
        &self.shared.socket
    }
}

/// The receiving half.
pub struct Rx {
    shared: Arc<Shared>,
    key: Key,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Every record since the ServerHello, in order.
    pub seen: Vec<Seen>,
    pub key_updates: u64,
    pub tickets: u64,
    closed: bool,
    /// The most that one receive asks for, and the rest before it: slow readers set both.
    pub read_bytes: usize,
    pub rest: Duration,
}

impl std::fmt::Debug for Rx {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rx({} records)", self.seen.len())
    }
}

/// One thing that the server sent. KeyUpdates and tickets are dealt with inside.
#[derive(Debug)]
pub enum Received<'a> {
    Data(&'a [u8]),
    Alert {
        fatal: bool,
        description: u8,
    },
    Handshake(u8),
    /// The end of TCP. Inside a record: `partial`.
    Fin {
        partial: bool,
    },
    Reset,
}

/// How a stream ended, after how many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    pub bytes: u64,
    pub how: How,
    /// A FIN followed, and no reset.
    pub fin: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    CloseNotify,
    /// An alert other than close_notify.
    Alert(u8),
    /// FIN without close_notify.
    Truncated,
    Reset,
}

const READ_BYTES: usize = 1 << 17;

impl Rx {
    /// Waits for the next thing. After close_notify it is FIN, reset, or what must not come any more.
    pub fn receive(&mut self) -> Result<Received<'_>> {
        loop {
            let (range, kind) = match self.record()? {
                Wire::Record(range) => {
                    self.seen.push(Seen::of(&self.buffer[range.clone()]));
                    let (kind, plain) = self.key.open(&mut self.buffer[range.clone()])?;
                    (range.start + plain.start..range.start + plain.end, kind)
                }
                Wire::Fin => return Ok(Received::Fin { partial: self.end > self.start }),
                Wire::Reset => return Ok(Received::Reset),
            };
            match kind {
                DATA => {
                    ensure!(!self.closed, "data after close_notify");
                    return Ok(Received::Data(&self.buffer[range]));
                }
                ALERT => {
                    let alert: [u8; 2] = self.buffer[range].try_into().context("an alert that is not two bytes")?;
                    self.closed |= alert[1] == CLOSE_NOTIFY;
                    return Ok(Received::Alert { fatal: alert[0] != WARNING, description: alert[1] });
                }
                HANDSHAKE => {
                    if let Some(kind) = self.handshake(range)? {
                        return Ok(Received::Handshake(kind));
                    }
                }
                other => bail!("a record of type {other}"),
            }
        }
    }

    /// Takes in a KeyUpdate or tickets; anything else is for the test.
    fn handshake(&mut self, range: std::ops::Range<usize>) -> Result<Option<u8>> {
        let message = &self.buffer[range];
        let kind = *message.first().context("an empty handshake record")?;
        match (kind, self.shared.tls13) {
            (NEW_SESSION_TICKET, true) => {
                self.tickets += 1;
                let len = usize::from(message[2]) << 8 | usize::from(message[3]);
                let payload = message.get(4..4 + len).context("a ticket that is cut")?;
                let mut kernel = self.shared.kernel.lock().expect("no holder panics");
                kernel.handle_new_session_ticket(payload).context("a new ticket")?;
                Ok(None)
            }
            (KEY_UPDATE, true) => {
                ensure!(matches!(message, [KEY_UPDATE, 0, 0, 1, 0 | 1]), "a malformed KeyUpdate {message:02x?}");
                if message[4] == 1 {
                    self.shared.replies_owed.fetch_add(1, Ordering::Relaxed);
                }
                let next = self.shared.kernel.lock().expect("no holder panics").update_rx_secret();
                self.key = Key::new(true, next.context("next receiving key")?)?;
                self.key_updates += 1;
                Ok(None)
            }
            _ => Ok(Some(kind)),
        }
    }

    fn record(&mut self) -> Result<Wire> {
        loop {
            let waiting = &self.buffer[self.start..self.end];
            if let Some(len) = record_len(waiting) {
                ensure!(len <= HEADER_BYTES + MAX_BODY_BYTES, "a record of {len} bytes");
                if waiting.len() >= len {
                    let range = self.start..self.start + len;
                    self.start += len;
                    return Ok(Wire::Record(range));
                }
            }
            if let Some(end) = self.fill()? {
                return Ok(end);
            }
        }
    }

    fn fill(&mut self) -> Result<Option<Wire>> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let size = HEADER_BYTES + MAX_BODY_BYTES + self.read_bytes;
        if self.buffer.len() < size {
            self.buffer.resize(size, 0);
        }
        let room = self.end..self.end + self.read_bytes;
        if !self.rest.is_zero() {
            std::thread::sleep(self.rest);
        }
        loop {
            match (&self.shared.socket).read(&mut self.buffer[room.clone()]) {
                Ok(0) => return Ok(Some(Wire::Fin)),
                Ok(n) => {
                    self.end += n;
                    return Ok(None);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                    return Ok(Some(Wire::Reset));
                }
                Err(e) => return Err(e).context("receive"),
            }
        }
    }

    /// Hands each piece of data to `each` until `limit` bytes have come or the stream has ended.
    pub fn read(&mut self, limit: u64, mut each: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<Option<Ended>> {
        let mut bytes = 0;
        while bytes < limit {
            let how = match self.receive()? {
                Received::Data(data) => {
                    each(bytes, data)?;
                    bytes += data.len() as u64;
                    continue;
                }
                Received::Alert { description: CLOSE_NOTIFY, .. } => How::CloseNotify,
                Received::Alert { description, .. } => How::Alert(description),
                Received::Handshake(kind) => bail!("a handshake message of type {kind} after {bytes} bytes"),
                Received::Fin { .. } => How::Truncated,
                Received::Reset => How::Reset,
            };
            let fin = match how {
                How::CloseNotify | How::Alert(_) => self.ends_in_fin()?,
                How::Truncated => true,
                How::Reset => false,
            };
            return Ok(Some(Ended { bytes, how, fin }));
        }
        Ok(None)
    }

    /// Reads to the end, comparing with the pattern if there is one.
    pub fn drain(&mut self, pattern: Option<crate::pattern::Pattern>) -> Result<Ended> {
        let check = |offset, data: &[u8]| pattern.map_or(Ok(()), |p| p.check(offset, data));
        self.read(u64::MAX, check).map(|ended| ended.expect("without a limit it reads to the end"))
    }

    /// Exactly so many bytes of the pattern, and no end before them.
    pub fn expect(&mut self, pattern: crate::pattern::Pattern, len: u64) -> Result<()> {
        match self.read(len, |offset, data| pattern.check(offset, data))? {
            None => Ok(()),
            Some(ended) => bail!("{len} bytes were to come: {ended:?}"),
        }
    }

    fn ends_in_fin(&mut self) -> Result<bool> {
        loop {
            match self.receive() {
                Ok(Received::Fin { .. }) => return Ok(true),
                Ok(Received::Reset) => return Ok(false),
                // A fatal alert may follow a warning.
                Ok(Received::Alert { .. }) => {}
                Ok(other) => bail!("after the end there came {other:?}"),
                Err(e) => return Err(e.context("waiting for FIN after the end")),
            }
        }
    }

    pub fn socket(&self) -> &TcpStream {
        &self.shared.socket
    }
}

enum Wire {
    Record(std::ops::Range<usize>),
    Fin,
    Reset,
}
