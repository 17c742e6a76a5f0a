//! One TLS client connection of the generator: handshake, small requests, and the two ways of moving bulk that keep the
//! generator's own cryptography out of the way.
//!
//!   bulk down: records are counted, not decrypted      bulk up: records are sealed before the clock runs
//!
//! Whether a peer passes bytes on unchanged is checked once, by `check`, with everything decrypted.

mod answer;
mod counted;

use crate::upstream;
use anyhow::{Context, Result, bail, ensure};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, HandshakeKind, RootCertStore, SignatureScheme};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

pub use answer::Answer;
pub use counted::Counted;

/// A socket that does nothing for so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(15);
const RECORD_HEADER_BYTES: usize = 5;
/// The longest record there is: 2^14 + 256, and its header.
const RECORD_LIMIT_BYTES: usize = (16 << 10) + 256 + RECORD_HEADER_BYTES;
/// Tickets that are kept for one thread.
const SESSIONS: usize = 64;

/// Where connections go, and how they are protected.
#[derive(Clone, Debug)]
pub struct Target {
    pub address: SocketAddr,
    pub name: ServerName<'static>,
    /// `None`: no TLS at all.
    pub tls: Option<Protection>,
}

/// What a client offers and trusts.
#[derive(Clone, Debug)]
pub struct Protection {
    pub trust: Trust,
    /// Everything that the library has, not only the suite and group of the comparison.
    pub any_parameters: bool,
}

/// Whose certificates are taken.
#[derive(Clone, Debug)]
pub enum Trust {
    Roots(Arc<RootCertStore>),
    Anybody,
}

/// Whether sessions are resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sessions {
    Fresh,
    Resumed,
}

impl Target {
    /// A configuration for one thread; `None` for plain TCP.
    pub fn config(&self, sessions: Sessions) -> Result<Option<Arc<ClientConfig>>> {
        let Some(protection) = &self.tls else { return Ok(None) };
        let mut provider = aws_lc_rs::default_provider();
        if !protection.any_parameters {
            provider.cipher_suites = vec![aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384];
            provider.kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768];
        }
        let provider = Arc::new(provider);
        let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let mut config = match &protection.trust {
            Trust::Roots(roots) => builder.with_root_certificates(roots.clone()).with_no_client_auth(),
            Trust::Anybody => {
                let verifier = Arc::new(Credulous(provider));
                builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()
            }
        };
        config.resumption = match sessions {
            Sessions::Fresh => Resumption::disabled(),
            Sessions::Resumed => Resumption::in_memory_sessions(SESSIONS),
        };
        Ok(Some(Arc::new(config)))
    }
}

/// Takes any certificate: for a load test of a host whose name is not ours to have.
#[derive(Debug)]
struct Credulous(Arc<CryptoProvider>);

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let schemes = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, schemes)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let schemes = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, schemes)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// An open connection.
#[derive(Debug)]
pub struct Session {
    socket: TcpStream,
    tls: Option<Box<ClientConnection>>,
    inbox: Inbox,
}

impl Session {
    /// Connects and shakes hands.
    pub fn open(target: &Target, config: Option<&Arc<ClientConfig>>) -> Result<Self> {
        let socket = TcpStream::connect_timeout(&target.address, PATIENCE)
            .with_context(|| format!("connect to {}", target.address))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let tls = match config {
            Some(config) => Some(Box::new(ClientConnection::new(config.clone(), target.name.clone())?)),
            None => None,
        };
        let mut session = Self { socket, tls, inbox: Inbox::default() };
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
        self.send(request)?;
        self.accepted()
    }

    /// Takes one answer, which must not be a refusal.
    pub fn accepted(&mut self) -> Result<()> {
        let (status, _) = self.answer(|_, _| ())?;
        is_no_refusal(status)
    }

    /// Takes one answer; its body goes to `on_body`, with the position.
    pub fn answer(&mut self, mut on_body: impl FnMut(u64, &[u8])) -> Result<(u16, u64)> {
        let (mut answer, mut buffer) = (Answer::default(), [0; RECORD_LIMIT_BYTES]);
        loop {
            let count = self.receive(&mut buffer)?;
            if let Some(whole) = answer.take(&buffer[..count], &mut on_body)? {
                return Ok(whole);
            }
        }
    }

    /// Takes what there is of an answer, without waiting for more; true when it is whole. It must not be a refusal, and the
    /// socket one that does not block.
    pub fn accepted_so_far(&mut self, answer: &mut Answer) -> Result<bool> {
        let mut buffer = [0; RECORD_LIMIT_BYTES];
        loop {
            let count = match self.receive(&mut buffer) {
                Err(error) if is_again(&error) => return Ok(false),
                result => result?,
            };
            if let Some((status, _)) = answer.take(&buffer[..count], |_, _| ())? {
                return is_no_refusal(status).map(|()| true);
            }
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

    /// From here on records are only counted.
    pub fn count_only(self) -> Result<Counted> {
        let overhead = match &self.tls {
            None => None,
            // TLS 1.3 AES-GCM: a tag and the type. TLS 1.2: the explicit nonce and a tag.
            Some(tls) if tls.protocol_version() == Some(rustls::ProtocolVersion::TLSv1_3) => Some(17),
            Some(_) => Some(24),
        };
        let already = &self.inbox.bytes[self.inbox.start..self.inbox.end];
        Ok(Counted::new(self.socket, overhead, already))
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

fn is_again(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
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

/// A request for so many bytes.
pub fn get(bytes: u64) -> Vec<u8> {
    get_path(&format!("/bytes/{bytes}"))
}

/// A request for a path.
pub fn get_path(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", crate::certificate::NAME).into_bytes()
}

/// The head of a request with a body.
pub fn post(path: &str, length: u64) -> Vec<u8> {
    let name = crate::certificate::NAME;
    format!("POST {path} HTTP/1.1\r\nHost: {name}\r\nContent-Length: {length}\r\n\r\n").into_bytes()
}

/// Passes the pattern through a peer both ways and compares every byte.
pub fn check(target: &Target, bytes: u64) -> Result<()> {
    let mut session = Session::open(target, target.config(Sessions::Fresh)?.as_ref())?;
    session.send(&get(bytes))?;
    let mut wrong = None;
    let (status, length) = session.answer(|at, body| {
        if wrong.is_none() && body != upstream::pattern(at, body.len()) {
            wrong = Some(at);
        }
    })?;
    ensure!(status == 200 && length == bytes, "a download of {bytes} bytes gave status {status} and {length} bytes");
    if let Some(at) = wrong {
        bail!("a download is not what the upstream sent, near byte {at}");
    }
    let mut upload = post("/checked", bytes);
    upload.extend(upstream::pattern(0, usize::try_from(bytes)?));
    session.send(&upload)?;
    let (status, _) = session.answer(|_, _| ())?;
    ensure!(status == 200, "an upload of {bytes} bytes did not reach the upstream as it was sent: status {status}");
    session.finish()
}
