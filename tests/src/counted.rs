//! Connections whose bytes on the wire are known to the byte, at both of their ends: what the kernel's counts have to equal.
//!
//!   Load: threads of TLS clients over sockets that count ─▶ tlsplice ─▶ servers that count

use crate::certificate::NAME;
use crate::pattern::Random;
use crate::run::Context;
use anyhow::{Context as _, Result, bail, ensure};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// How a connection goes. The first 24 bytes of its payload say so to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Both ways, and a clean end.
    Clean,
    /// The client resets once it has everything.
    ClientResets,
    /// The server resets once it has everything and has sent everything.
    ServerResets,
}

/// One side's truth.
#[derive(Debug, Default)]
pub struct Side {
    pub opened: AtomicU64,
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
}

impl Side {
    pub fn figures(&self) -> [u64; 3] {
        [&self.opened, &self.bytes_in, &self.bytes_out].map(|f| f.load(Relaxed))
    }
}

/// What went over the sockets, as tlsplice has to count it.
#[derive(Debug, Default)]
pub struct Truth {
    pub client: Side,
    pub upstream: Side,
}

const HEAD_BYTES: usize = 24;
/// Nothing of a test takes longer between two bytes.
const PATIENCE: Duration = Duration::from_secs(60);
/// A delayed ACK is out by then (40 ms, include/net/tcp.h), also under emulation.
const DELAYED_ACK: Duration = Duration::from_millis(150);

/// A server that answers as the head says, and counts.
#[derive(Debug)]
pub struct Server {
    pub address: SocketAddr,
    pub trouble: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub fn start(truth: Arc<Truth>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, trouble) = (listener.local_addr()?, Arc::new(Mutex::new(Vec::new())));
        let told = trouble.clone();
        thread::Builder::new().name("server".into()).spawn(move || {
            for stream in listener.incoming() {
                let (Ok(stream), truth, told) = (stream, truth.clone(), told.clone()) else { break };
                let _ = thread::Builder::new().stack_size(256 << 10).spawn(move || {
                    truth.upstream.opened.fetch_add(1, Relaxed);
                    if let Err(e) = answer(stream, &truth.upstream) {
                        told.lock().expect("no holder panics").push(format!("server: {e:#}"));
                    }
                });
            }
        })?;
        Ok(Self { address, trouble })
    }

    pub fn check(&self) -> Result<()> {
        let trouble = self.trouble.lock().expect("no holder panics");
        ensure!(trouble.is_empty(), "{} troubles, the first: {}", trouble.len(), trouble[0]);
        Ok(())
    }
}

/// `side` is tlsplice's view: what we receive it has sent.
fn answer(mut stream: TcpStream, side: &Side) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let mut head = [0; HEAD_BYTES];
    let mut got = 0;
    while got < HEAD_BYTES {
        match stream.read(&mut head[got..]).context("read the head")? {
            // A client that left before it said anything.
            0 => return Ok(()),
            n => got += n,
        }
    }
    side.bytes_out.fetch_add(HEAD_BYTES as u64, Relaxed);
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    let (kind, up, down) = (word(0), word(8), word(16));
    read_exactly(&mut stream, up, &side.bytes_out).context("read the upload")?;
    let chunk = [b'd'; 16 << 10];
    let mut left = down;
    while left > 0 {
        let n = stream.write(&chunk[..left.min(chunk.len() as u64) as usize]).context("send the download")?;
        side.bytes_in.fetch_add(n as u64, Relaxed);
        left -= n as u64;
    }
    match kind {
        2 => {
            // What lies unsent at a reset is lost: the client says when it has everything.
            read_exactly(&mut stream, 1, &side.bytes_out).context("wait for the word to reset")?;
            drained(&stream)?;
            reset(&stream)
        }
        1 => {
            // It ends by the reset of the other side.
            match stream.read(&mut [0; 1]) {
                Ok(0) | Err(_) => Ok(()),
                Ok(_) => bail!("more than the upload came"),
            }
        }
        _ => {
            let more = stream.read(&mut [0; 1]).context("wait for the end")?;
            ensure!(more == 0, "more than the upload came");
            Ok(())
        }
    }
}

fn read_exactly(stream: &mut impl Read, mut left: u64, count: &AtomicU64) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        let wanted = left.min(buffer.len() as u64) as usize;
        let n = stream.read(&mut buffer[..wanted])?;
        ensure!(n > 0, "the stream ended {left} bytes early");
        count.fetch_add(n as u64, Relaxed);
        left -= n as u64;
    }
    Ok(())
}

/// Everything that we sent is acknowledged, and everything that we have received too.
fn drained(stream: &TcpStream) -> Result<()> {
    let _ = rustix::net::sockopt::set_tcp_quickack(stream, true);
    // Nothing tells when the other side has acknowledged; on loopback a delayed ACK is the longest wait.
    thread::sleep(DELAYED_ACK);
    Ok(())
}

fn reset(stream: &TcpStream) -> Result<()> {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).context("SO_LINGER")
}

/// A socket that counts what passes it. At either end: what is read there tlsplice has sent.
pub struct Counting<'a, S> {
    pub stream: S,
    pub side: &'a Side,
}

impl<S: Read> Read for Counting<'_, S> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.stream.read(into)?;
        self.side.bytes_out.fetch_add(n as u64, Relaxed);
        Ok(n)
    }
}

impl<S: Write> Write for Counting<'_, S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.stream.write(bytes)?;
        self.side.bytes_in.fetch_add(n as u64, Relaxed);
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// What clients verify the server by.
pub fn client_config(ctx: &Context) -> Result<Arc<ClientConfig>> {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let config = ClientConfig::builder_with_provider(provider.into()).with_safe_default_protocol_versions()?;
    let mut config = config.with_root_certificates(ctx.certificates.roots()?).with_no_client_auth();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// Verifies nothing: for clients that ask for names that no certificate has.
#[derive(Debug)]
pub struct Anyone(rustls::crypto::CryptoProvider);

impl Anyone {
    pub fn new() -> Arc<Self> {
        Arc::new(Self(rustls::crypto::aws_lc_rs::default_provider()))
    }
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// One connection from its beginning to its end.
pub fn connect(
    config: &Arc<ClientConfig>,
    to: SocketAddr,
    truth: &Truth,
    kind: Kind,
    (up, down): (u64, u64),
) -> Result<()> {
    connect_as(config, NAME, to, truth, kind, (up, down))
}

/// The same, asking for a name.
pub fn connect_as(
    config: &Arc<ClientConfig>,
    name: &str,
    to: SocketAddr,
    truth: &Truth,
    kind: Kind,
    (up, down): (u64, u64),
) -> Result<()> {
    let stream = TcpStream::connect(to).context("connect")?;
    truth.client.opened.fetch_add(1, Relaxed);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let mut session = ClientConnection::new(config.clone(), ServerName::try_from(name.to_owned())?)?;
    let mut socket = Counting { stream, side: &truth.client };
    let mut head = Vec::new();
    for word in [kind as u64, up, down] {
        head.extend_from_slice(&word.to_le_bytes());
    }
    let ignored = AtomicU64::new(0);
    {
        let mut tls = rustls::Stream::new(&mut session, &mut socket);
        tls.write_all(&head).context("send the head")?;
        let chunk = [b'u'; 16 << 10];
        let mut left = up;
        while left > 0 {
            let n = left.min(chunk.len() as u64) as usize;
            tls.write_all(&chunk[..n]).context("send the upload")?;
            left -= n as u64;
        }
        tls.flush()?;
        read_exactly(&mut tls, down, &ignored).context("read the download")?;
        if kind == Kind::ServerResets {
            tls.write_all(b"!").context("send the word to reset")?;
        }
    }
    match kind {
        Kind::ClientResets => {
            drained(&socket.stream)?;
            // Tickets may lie behind what was read.
            socket.stream.set_nonblocking(true)?;
            let mut rest = [0; 4096];
            while matches!(socket.read(&mut rest), Ok(1..)) {}
            reset(&socket.stream)
        }
        Kind::ServerResets => {
            // A reset comes, perhaps behind an alert.
            let mut rest = [0; 4096];
            while !matches!(socket.read(&mut rest), Ok(0) | Err(_)) {}
            Ok(())
        }
        Kind::Clean => {
            session.send_close_notify();
            while session.wants_write() {
                session.write_tls(&mut socket).context("send close_notify")?;
            }
            // The server's close_notify, then its FIN.
            let mut rest = [0; 4096];
            while socket.read(&mut rest).context("wait for the end")? > 0 {}
            Ok(())
        }
    }
}

/// Many connections at once: `one` is called with each number and draws its own sizes.
pub fn storm(threads: usize, count: u64, one: impl Fn(u64, &mut Random) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicU64::new(0);
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|_| {
                let (next, one) = (&next, &one);
                scope.spawn(move || -> Result<()> {
                    loop {
                        let n = next.fetch_add(1, Relaxed);
                        if n >= count {
                            return Ok(());
                        }
                        one(n, &mut Random::new(n + 1)).with_context(|| format!("connection {n}"))?;
                    }
                })
            })
            .collect();
        for thread in running {
            thread.join().ok().context("a client panicked")??;
        }
        Ok(())
    })
}
