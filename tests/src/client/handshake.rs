//! A TLS handshake by rustls, stopped with the client's last flight still in hand, then taken apart into keys.

use super::Client;
use super::record::{Seen, record_len};
use crate::certificate::NAME;
use crate::run::Context;
use anyhow::{Context as _, Result, bail, ensure};
use rustls::client::{ClientConnectionData, Resumption, UnbufferedClientConnection};
use rustls::crypto::aws_lc_rs as provider;
use rustls::pki_types::ServerName;
use rustls::unbuffered::{ConnectionState, UnbufferedStatus};
use rustls::{CipherSuite, ClientConfig, NamedGroup};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

/// A cipher suite of the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suite {
    pub name: &'static str,
    pub tls13: bool,
    pub rsa: bool,
    pub iana: CipherSuite,
    /// For `openssl -cipher` or `-ciphersuites`.
    pub openssl: &'static str,
    /// A GnuTLS priority string that leaves this suite alone.
    pub gnutls: &'static str,
}

const fn suite(
    name: &'static str,
    tls13: bool,
    rsa: bool,
    iana: CipherSuite,
    openssl: &'static str,
    gnutls: &'static str,
) -> Suite {
    Suite { name, tls13, rsa, iana, openssl, gnutls }
}

pub const TLS13_AES_128: Suite = suite(
    "tls13_aes_128",
    true,
    false,
    CipherSuite::TLS13_AES_128_GCM_SHA256,
    "TLS_AES_128_GCM_SHA256",
    "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+AES-128-GCM",
);
pub const TLS13_AES_256: Suite = suite(
    "tls13_aes_256",
    true,
    false,
    CipherSuite::TLS13_AES_256_GCM_SHA384,
    "TLS_AES_256_GCM_SHA384",
    "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+AES-256-GCM",
);
pub const TLS13_CHACHA: Suite = suite(
    "tls13_chacha20",
    true,
    false,
    CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
    "TLS_CHACHA20_POLY1305_SHA256",
    "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+CHACHA20-POLY1305",
);
pub const TLS12_AES_128: Suite = suite(
    "tls12_aes_128",
    false,
    false,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "NORMAL:-VERS-ALL:+VERS-TLS1.2:-CIPHER-ALL:+AES-128-GCM:-KX-ALL:+ECDHE-ECDSA",
);
pub const TLS12_AES_256: Suite = suite(
    "tls12_aes_256",
    false,
    false,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "NORMAL:-VERS-ALL:+VERS-TLS1.2:-CIPHER-ALL:+AES-256-GCM:-KX-ALL:+ECDHE-ECDSA",
);
pub const TLS12_CHACHA: Suite = suite(
    "tls12_chacha20",
    false,
    false,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "NORMAL:-VERS-ALL:+VERS-TLS1.2:-CIPHER-ALL:+CHACHA20-POLY1305:-KX-ALL:+ECDHE-ECDSA",
);
pub const TLS12_RSA_AES_128: Suite = suite(
    "tls12_rsa_aes_128",
    false,
    true,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    "ECDHE-RSA-AES128-GCM-SHA256",
    "NORMAL:-VERS-ALL:+VERS-TLS1.2:-CIPHER-ALL:+AES-128-GCM:-KX-ALL:+ECDHE-RSA",
);
pub const TLS12_RSA_AES_256: Suite = suite(
    "tls12_rsa_aes_256",
    false,
    true,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    "ECDHE-RSA-AES256-GCM-SHA384",
    "NORMAL:-VERS-ALL:+VERS-TLS1.2:-CIPHER-ALL:+AES-256-GCM:-KX-ALL:+ECDHE-RSA",
);
pub const TLS12_RSA_CHACHA: Suite = suite(
    "tls12_rsa_chacha20",
    false,
    true,
    CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    "ECDHE-RSA-CHACHA20-POLY1305",
    "NORMAL:-VERS-ALL:+VERS-TLS1.2:-CIPHER-ALL:+CHACHA20-POLY1305:-KX-ALL:+ECDHE-RSA",
);

/// Those that an ECDSA certificate serves: one for each record protection of each version.
pub const SUITES: [Suite; 6] = [TLS13_AES_128, TLS13_AES_256, TLS13_CHACHA, TLS12_AES_128, TLS12_AES_256, TLS12_CHACHA];
pub const RSA_SUITES: [Suite; 3] = [TLS12_RSA_AES_128, TLS12_RSA_AES_256, TLS12_RSA_CHACHA];

/// What the client offers: one suite, and whatever else narrows the choice.
#[derive(Debug, Clone)]
pub struct Offer {
    config: Arc<ClientConfig>,
    /// The ClientHello goes out in records of so many bytes.
    hello_record_bytes: usize,
}

impl Offer {
    pub fn new(ctx: &Context, suite: Suite) -> Result<Self> {
        Self::with_groups(ctx, suite, &[])
    }

    pub fn with_groups(ctx: &Context, suite: Suite, groups: &[NamedGroup]) -> Result<Self> {
        let mut crypto = provider::default_provider();
        crypto.cipher_suites.retain(|s| s.suite() == suite.iana);
        // X25519 costs least, and most tests are not about the key exchange; OpenSSL serves an ECDSA certificate over TLS 1.2
        // only to those who name its curve.
        let wanted: &[NamedGroup] =
            if groups.is_empty() { &[NamedGroup::X25519, NamedGroup::secp256r1] } else { groups };
        crypto.kx_groups.retain(|g| wanted.contains(&g.name()));
        crypto.kx_groups.sort_by_key(|g| wanted.iter().position(|w| *w == g.name()));
        let version = if suite.tls13 { &rustls::version::TLS13 } else { &rustls::version::TLS12 };
        let mut config = ClientConfig::builder_with_provider(crypto.into())
            .with_protocol_versions(&[version])
            .context("choose the version")?
            .with_root_certificates(ctx.certificates.roots()?)
            .with_no_client_auth();
        config.enable_secret_extraction = true;
        config.resumption = Resumption::disabled();
        Ok(Self { config: config.into(), hello_record_bytes: usize::MAX })
    }

    fn change(mut self, change: impl FnOnce(&mut ClientConfig)) -> Self {
        change(Arc::make_mut(&mut self.config));
        self
    }

    /// Later connections with this offer resume what earlier ones left.
    pub fn resuming(self) -> Self {
        self.change(|config| config.resumption = Resumption::in_memory_sessions(8))
    }

    pub fn hello_in_records_of(self, bytes: usize) -> Self {
        Self { hello_record_bytes: bytes, ..self }
    }

    pub fn alpn(self, protocols: &[&str]) -> Self {
        self.change(|config| config.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect())
    }
}

/// A client that has finished its side of the handshake, and the flight that says so: not sent yet.
#[derive(Debug)]
pub struct Prepared {
    pub client: Client,
    /// TLS 1.3, and TLS 1.2 when it resumes: up to Finished. Else empty.
    pub last_flight: Vec<u8>,
    pub facts: Facts,
}

/// What was negotiated.
#[derive(Debug, Clone)]
pub struct Facts {
    pub resumed: bool,
    pub alpn: Option<String>,
    pub group: Option<NamedGroup>,
}

impl Prepared {
    /// Sends the last flight.
    pub fn complete(mut self) -> Result<Client> {
        let flight = std::mem::take(&mut self.last_flight);
        self.client.tx.write(&flight)?;
        Ok(self.client)
    }
}

struct Shaking {
    socket: TcpStream,
    hello_record_bytes: usize,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// Every byte received so far.
    wire: Vec<u8>,
}

impl Shaking {
    fn flush(&mut self) -> Result<()> {
        if self.hello_record_bytes < self.outgoing.len() && self.wire.is_empty() {
            self.outgoing = fragmented(&self.outgoing, self.hello_record_bytes);
        }
        self.socket.write_all(&self.outgoing).context("send a flight")?;
        self.outgoing.clear();
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        let mut chunk = [0; 16_384];
        let n = self.socket.read(&mut chunk).context("receive a flight")?;
        ensure!(n > 0, "the connection ended in the handshake");
        self.incoming.extend_from_slice(&chunk[..n]);
        self.wire.extend_from_slice(&chunk[..n]);
        Ok(())
    }

    /// Drives rustls until it may write traffic. What it has to send last stays in `outgoing`.
    fn drive(&mut self, connection: &mut UnbufferedClientConnection) -> Result<()> {
        loop {
            let mut blocked = false;
            let UnbufferedStatus { discard, state, .. } = connection.process_tls_records(&mut self.incoming);
            match state.context("handshake")? {
                ConnectionState::EncodeTlsData(mut encode) => {
                    let start = self.outgoing.len();
                    self.outgoing.resize(start + 8_192, 0);
                    let n = encode.encode(&mut self.outgoing[start..]).context("encode a flight")?;
                    self.outgoing.truncate(start + n);
                }
                ConnectionState::TransmitTlsData(transmit) => transmit.done(),
                ConnectionState::BlockedHandshake => blocked = true,
                ConnectionState::WriteTraffic(_) => {
                    self.incoming.drain(..discard);
                    return Ok(());
                }
                ConnectionState::ReadTraffic(_) => bail!("data before the handshake was complete"),
                ConnectionState::PeerClosed | ConnectionState::Closed => bail!("closed in the handshake"),
                other => bail!("unexpected in a handshake: {other:?}"),
            }
            self.incoming.drain(..discard);
            if blocked {
                self.flush()?;
                self.receive()?;
            }
        }
    }
}

/// Shakes hands on a connected socket.
pub fn prepare_on(ctx: &Context, socket: TcpStream, offer: &Offer) -> Result<Prepared> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(ctx.environment.patience()))?;
    socket.set_write_timeout(Some(ctx.environment.patience()))?;
    let name = ServerName::try_from(NAME).expect("a valid name");
    let mut connection = UnbufferedClientConnection::new(offer.config.clone(), name)?;
    let hello_record_bytes = offer.hello_record_bytes;
    let mut shaking =
        Shaking { socket, hello_record_bytes, incoming: Vec::new(), outgoing: Vec::new(), wire: Vec::new() };
    shaking.drive(&mut connection)?;
    let facts = facts(&connection);
    let (secrets, kernel) = connection.dangerous_into_kernel_connection().context("take the secrets")?;
    let Shaking { socket, incoming, outgoing, wire, .. } = shaking;
    let tls13 = kernel.protocol_version() == rustls::ProtocolVersion::TLSv1_3;
    // What is left in `incoming` is counted when the client reads it.
    let seen = records(&wire[..wire.len() - incoming.len()]);
    let client = Client::new(socket, tls13, secrets, kernel, incoming, seen)?;
    Ok(Prepared { client, last_flight: outgoing, facts })
}

fn facts(connection: &rustls::client::UnbufferedClientConnection) -> Facts {
    Facts {
        resumed: connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed),
        alpn: connection.alpn_protocol().map(|p| String::from_utf8_lossy(p).into_owned()),
        group: connection.negotiated_key_exchange_group().map(|g| g.name()),
    }
}

pub fn prepare(ctx: &Context, address: SocketAddr, offer: &Offer) -> Result<Prepared> {
    prepare_on(ctx, TcpStream::connect(address).with_context(|| format!("connect to {address}"))?, offer)
}

/// The same handshake message in smaller records (RFC 8446 section 5.1).
fn fragmented(record: &[u8], bytes: usize) -> Vec<u8> {
    let (header, message) = record.split_at(super::record::HEADER_BYTES);
    let part = |part: &[u8]| [&header[..3], &(part.len() as u16).to_be_bytes(), part].concat();
    message.chunks(bytes).flat_map(part).collect()
}

/// The records that these bytes hold, each whole.
fn records(mut wire: &[u8]) -> Vec<Seen> {
    let mut seen = Vec::new();
    while let Some(len) = record_len(wire)
        && wire.len() >= len
    {
        seen.push(Seen::of(&wire[..len]));
        wire = &wire[len..];
    }
    seen
}

pub type Kernel = rustls::kernel::KernelConnection<ClientConnectionData>;
