//! Servers behind tlsplice: plain TCP or unix sockets, in threads of this process, doing what a test scripts.

use crate::environment::Environment;
use crate::pattern::{MAX_SLICE_BYTES, Pattern};
use crate::process::free_port;
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use socket2::{Domain, SockRef, Socket, Type};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Small, because a test has hundreds of them.
pub const THREAD_STACK_BYTES: usize = 256 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    V4,
    V6,
    Unix,
}

/// One accepted connection.
#[derive(Debug)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Read for &Stream {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Stream::Tcp(s) => (&*s).read(buf),
            Stream::Unix(s) => (&*s).read(buf),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        match self {
            Stream::Tcp(s) => (&*s).write(buf),
            Stream::Unix(s) => (&*s).write(buf),
        }
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// How the other side of a plain stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerEnd {
    Fin,
    Reset,
}

impl Stream {
    fn socket(&self) -> SockRef<'_> {
        match self {
            Self::Tcp(s) => SockRef::from(s),
            Self::Unix(s) => SockRef::from(s),
        }
    }

    fn patient(self, patience: Duration) -> Result<Self> {
        self.socket().set_nonblocking(false)?;
        self.socket().set_read_timeout(Some(patience))?;
        self.socket().set_write_timeout(Some(patience))?;
        Ok(self)
    }

    pub fn fin(&self) -> Result<()> {
        self.socket().shutdown(Shutdown::Write).context("upstream: shut down the sending half")
    }

    /// A reset instead of a FIN, when this is dropped: now.
    pub fn reset(self) -> Result<()> {
        self.socket().set_linger(Some(Duration::ZERO))?;
        Ok(())
    }

    /// Small buffers, so that what is in flight is small.
    pub fn set_receive_buffer(&self, bytes: usize) -> Result<()> {
        Ok(self.socket().set_recv_buffer_size(bytes)?)
    }

    pub fn read_exactly(&self, buf: &mut [u8]) -> Result<()> {
        let mut this = self;
        this.read_exact(buf).with_context(|| format!("upstream: read {} bytes", buf.len()))
    }

    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        let mut this = self;
        this.write_all(bytes).with_context(|| format!("upstream: send {} bytes", bytes.len()))
    }

    /// Sends all of a small piece, or nothing when there is no room for it within this time.
    pub fn send_soon(&self, piece: &[u8], time: Duration) -> Result<bool> {
        let deadline = Instant::now() + time;
        self.socket().set_nonblocking(true)?;
        let sent = loop {
            match (&*self).write(piece) {
                Ok(n) if n == piece.len() => break Ok(true),
                Ok(n) => break Err(anyhow!("upstream: {n} of {} bytes were taken", piece.len())),
                Err(e) if e.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => break Ok(false),
                Err(e) => break Err(e).context("upstream: send"),
            }
        };
        self.socket().set_nonblocking(false)?;
        sent
    }

    /// Reads and compares to the end: how many bytes, and which end.
    pub fn drain(&self, pattern: Pattern, mut offset: u64) -> Result<(u64, PeerEnd)> {
        let mut buf = vec![0; MAX_SLICE_BYTES];
        loop {
            match self.read_some(&mut buf)? {
                Ok(0) => return Ok((offset, PeerEnd::Fin)),
                Ok(n) => {
                    pattern.check(offset, &buf[..n]).context("upstream")?;
                    offset += n as u64;
                }
                Err(end) => return Ok((offset, end)),
            }
        }
    }

    /// A reset is an answer here, not a failure.
    pub fn read_some(&self, buf: &mut [u8]) -> Result<Result<usize, PeerEnd>> {
        let mut this = self;
        loop {
            match this.read(buf) {
                Ok(n) => return Ok(Ok(n)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                    return Ok(Err(PeerEnd::Reset));
                }
                Err(e) => return Err(e).context("upstream: receive"),
            }
        }
    }
}

/// What a handler found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// Payload bytes that came from the client, all of them right.
    pub up: u64,
    /// Payload bytes that were sent.
    pub down: u64,
    pub end: PeerEnd,
}

type Handler = dyn Fn(Stream) -> Result<Served> + Send + Sync;

/// A listening server. Its accept thread ends when it is dropped.
pub struct Upstream {
    pub kind: Kind,
    address: String,
    served: Mutex<Receiver<Result<Served>>>,
    accepted: Mutex<Receiver<Stream>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    patience: Duration,
}

enum Mode {
    Handle(Arc<Handler>),
    HandOver,
}

impl Upstream {
    /// Each connection is served by `handler` in a thread of its own.
    pub fn serve(
        env: &Environment,
        kind: Kind,
        handler: impl Fn(Stream) -> Result<Served> + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::start(env, kind, Mode::Handle(Arc::new(handler)))
    }

    /// Each connection is closed at once: for tests of what comes before.
    pub fn closing(env: &Environment) -> Result<Self> {
        Self::serve(env, Kind::V4, |_| Ok(Served { up: 0, down: 0, end: PeerEnd::Fin }))
    }

    /// Each connection is handed to the test, by `accept`.
    pub fn manual(env: &Environment, kind: Kind) -> Result<Self> {
        Self::start(env, kind, Mode::HandOver)
    }

    fn start(env: &Environment, kind: Kind, mode: Mode) -> Result<Self> {
        let (listener, address) = listen(env, kind)?;
        // Accept gives up now and then to see whether it is still wanted.
        listener.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (served_tx, served) = channel();
        let (accepted_tx, accepted) = channel();
        let (patience, stopped) = (env.patience(), stop.clone());
        let accepting = move || {
            while !stopped.load(Ordering::Relaxed) {
                let Ok((socket, _)) = listener.accept() else { continue };
                let stream = if kind == Kind::Unix { Stream::Unix(socket.into()) } else { Stream::Tcp(socket.into()) };
                let Ok(stream) = stream.patient(patience) else { continue };
                match &mode {
                    Mode::HandOver => drop(accepted_tx.send(stream)),
                    Mode::Handle(handler) => {
                        let (handler, results) = (handler.clone(), served_tx.clone());
                        let serve = move || drop(results.send(handler(stream)));
                        let _ = thread::Builder::new().stack_size(THREAD_STACK_BYTES).spawn(serve);
                    }
                }
            }
        };
        let thread = thread::Builder::new().name("upstream".into()).spawn(accepting)?;
        Ok(Self {
            kind,
            address,
            served: served.into(),
            accepted: accepted.into(),
            stop,
            thread: Some(thread),
            patience,
        })
    }

    /// As `servers` has it.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The next connection that has come to its end.
    pub fn served(&self) -> Result<Served> {
        match self.served.lock().expect("no holder panics").recv_timeout(self.patience * 2) {
            Ok(served) => served,
            Err(RecvTimeoutError::Timeout) => bail!("no connection at the upstream has ended"),
            Err(RecvTimeoutError::Disconnected) => bail!("the upstream is gone"),
        }
    }

    /// The next connection of a manual upstream.
    pub fn accept(&self) -> Result<Stream> {
        let next = self.accepted.lock().expect("no holder panics").recv_timeout(self.patience);
        next.ok().context("no connection has come to the upstream")
    }

    pub fn accept_now(&self) -> Option<Stream> {
        self.accepted.lock().expect("no holder panics").try_recv().ok()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It panicked or it ended: either way it is over.
            let _ = thread.join();
        }
    }
}

const BACKLOG: i32 = 4_096;

fn listen(env: &Environment, kind: Kind) -> Result<(Socket, String)> {
    let port = free_port()?;
    let (domain, address, text) = match kind {
        Kind::V4 => {
            let address = crate::proxy::loopback(port);
            (Domain::IPV4, address.into(), address.to_string())
        }
        Kind::V6 => {
            let address = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
            (Domain::IPV6, address.into(), address.to_string())
        }
        Kind::Unix => {
            let path: PathBuf = env.tmp.join(format!("{port}.sock"));
            (Domain::UNIX, socket2::SockAddr::unix(&path)?, format!("unix:{}", path.display()))
        }
    };
    let socket = Socket::new(domain, Type::STREAM, None)?;
    if kind != Kind::Unix {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address).with_context(|| format!("upstream: bind {text}"))?;
    socket.listen(BACKLOG)?;
    Ok((socket, text))
}

/// What the client asks of an exchanging upstream, in the first bytes that it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub up: u64,
    pub down: u64,
    /// The download starts when the upload is complete.
    pub in_turn: bool,
    /// The upload is digits.
    pub digits: bool,
    /// The upstream keeps its half open until the client has ended its own.
    pub hold: bool,
    /// The upstream reads little at a time and rests in between.
    pub slow: bool,
    /// The upstream ends its half when both bodies are complete: a program that leaves at the server's end has sent all.
    pub together: bool,
}

pub const REQUEST_BYTES: usize = 32;
const MAGIC: &[u8; 7] = b"0123456";

impl Request {
    pub fn new(up: u64, down: u64) -> Self {
        Self { up, down, in_turn: false, digits: false, hold: false, slow: false, together: false }
    }

    /// Digits alone, so that it may be typed into any program.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let flag = |on: bool| if on { '1' } else { '0' };
        let flags = [self.in_turn, self.digits, self.hold, self.slow, self.together].map(flag);
        let flags: String = flags.iter().collect();
        let text = format!("0123456{flags}{:010}{:010}", self.up, self.down);
        text.as_bytes().try_into().expect("7 + 5 + 10 + 10 digits")
    }

    fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self> {
        ensure!(bytes.starts_with(MAGIC), "upstream: the request begins with {:02x?}", &bytes[..7]);
        let number = |range: std::ops::Range<usize>| -> Result<u64> {
            Ok(std::str::from_utf8(&bytes[range]).context("a request of digits")?.parse()?)
        };
        let flag = |at: usize| bytes[at] == b'1';
        Ok(Self {
            up: number(12..22)?,
            down: number(22..32)?,
            in_turn: flag(7),
            digits: flag(8),
            hold: flag(9),
            slow: flag(10),
            together: flag(11),
        })
    }
}

/// Does what the request says, both ways at once, compares every byte, and reports how the client's side ended.
pub fn exchange(stream: Stream) -> Result<Served> {
    let mut head = [0; REQUEST_BYTES];
    let mut got = 0;
    while got < REQUEST_BYTES {
        match stream.read_some(&mut head[got..])? {
            Ok(0) => return Ok(Served { up: got as u64, down: 0, end: PeerEnd::Fin }),
            Ok(n) => got += n,
            Err(end) => return Ok(Served { up: got as u64, down: 0, end }),
        }
    }
    let request = Request::decode(&head)?;
    if request.slow {
        // Less than the segments of loopback would make the sender wait for timers.
        stream.set_receive_buffer(100_000)?;
    }
    let uploaded = (Mutex::new(false), std::sync::Condvar::new());
    let wait_for_upload = || {
        let done = uploaded.1.wait_while(uploaded.0.lock().expect("no holder panics"), |done| !*done);
        drop(done.expect("no holder panics"));
    };
    let wait_for_upload = &wait_for_upload;
    thread::scope(|scope| {
        let send = || -> u64 {
            if request.in_turn {
                wait_for_upload();
            }
            let sent = send_pattern(&stream, request.down);
            if request.together {
                wait_for_upload();
            }
            if !request.hold && sent == request.down {
                // The client may have reset it by now: the reader sees that.
                let _ = stream.fin();
            }
            sent
        };
        let sender = thread::Builder::new().stack_size(THREAD_STACK_BYTES).spawn_scoped(scope, send)?;
        let read = receive(&stream, &request, || {
            *uploaded.0.lock().expect("no holder panics") = true;
            uploaded.1.notify_all();
        });
        let down = sender.join().ok().context("the upstream's sender panicked")?;
        if request.hold {
            // For a client that has gone there is nobody to tell.
            let _ = stream.fin();
        }
        let (up, end) = read?;
        ensure!(up <= request.up, "upstream: {up} bytes came, {} were announced", request.up);
        Ok(Served { up, down, end })
    })
}

fn send_pattern(stream: &Stream, len: u64) -> u64 {
    let mut sent = 0;
    let mut writer = stream;
    while sent < len {
        let piece = Pattern::down().at(sent, usize::try_from(len - sent).unwrap_or(usize::MAX));
        match writer.write(piece) {
            Ok(n) => sent += n as u64,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    sent
}

/// The upload to its end. `complete` is called when all announced bytes have come, or none will any more.
fn receive(stream: &Stream, request: &Request, complete: impl Fn()) -> Result<(u64, PeerEnd)> {
    let pattern = if request.digits { Pattern::digits() } else { Pattern::up() };
    let mut buf = vec![0; if request.slow { 5_000 } else { 1 << 17 }];
    let mut up = 0;
    let result = loop {
        if up >= request.up {
            complete();
        }
        match stream.read_some(&mut buf) {
            Ok(Ok(0)) => break Ok((up, PeerEnd::Fin)),
            Ok(Ok(n)) => {
                if let Err(e) = pattern.check(up, &buf[..n]) {
                    break Err(e.context("upstream"));
                }
                up += n as u64;
            }
            Ok(Err(end)) => break Ok((up, end)),
            Err(e) => break Err(e.context(format!("after {up} of {} bytes", request.up))),
        }
        if request.slow && up % 7 == 0 {
            thread::sleep(Duration::from_micros(500));
        }
    };
    complete();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_its_encoding() {
        let request = Request {
            up: 1 << 31,
            down: 16_385,
            in_turn: true,
            digits: false,
            hold: true,
            slow: false,
            together: true,
        };
        assert_eq!(Request::decode(&request.encode()).expect("it is one"), request);
    }
}
