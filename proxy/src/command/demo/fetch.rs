//! Fetches the demo's own page as a client would, and says what came of it.

use crate::observe::counters::{Counters, Decline, Label};
use crate::tls::policy;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Each read and write of a page that is served by this very process.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The worker counts in its own time.
const COUNTED_WITHIN: Duration = Duration::from_secs(2);

/// Blocks. The report is for people; an error says at which step it failed.
pub(super) fn fetch(
    address: SocketAddr,
    certificate: CertificateDer<'static>,
    page: &str,
    counters: &[Arc<Counters>],
) -> Result<String, String> {
    let mut stream = connect(address, certificate)?;
    let request = format!("GET / HTTP/1.1\r\nHost: localhost:{}\r\nConnection: close\r\n\r\n", address.port());
    stream.write_all(request.as_bytes()).map_err(|e| format!("send the request: {e}"))?;
    let mut answer = Vec::new();
    // rustls reports an end without a close_notify as an error.
    stream.read_to_end(&mut answer).map_err(|e| format!("read the page: {e}"))?;
    let answer = String::from_utf8(answer).map_err(|e| format!("read the page: {e}"))?;
    if !answer.starts_with("HTTP/1.1 200 ") || !answer.ends_with(page) {
        return Err("what came back is not the page".to_owned());
    }
    let version = stream.conn.protocol_version().map_or("none".to_owned(), |version| format!("{version:?}"));
    let suite = stream.conn.negotiated_cipher_suite().map_or("none", |suite| policy::suite_name(suite.suite()));
    let group = stream.conn.negotiated_key_exchange_group().map_or("none", |group| policy::group_name(group.name()));
    let offload = offload(counters)?;
    Ok(format!(
        "version  {version}\nsuite    {suite}\ngroup    {group}\noffload  {offload}\npage     {} bytes, whole, ended by close_notify\n",
        page.len()
    ))
}

fn connect(
    address: SocketAddr,
    certificate: CertificateDer<'static>,
) -> Result<StreamOwned<ClientConnection, TcpStream>, String> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate).map_err(|e| format!("trust the certificate: {e}"))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| format!("make a client: {e}"))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = ServerName::try_from("localhost").map_err(|e| format!("make a client: {e}"))?;
    let connection = ClientConnection::new(Arc::new(config), name).map_err(|e| format!("make a client: {e}"))?;
    let socket = TcpStream::connect_timeout(&address, TIMEOUT).map_err(|e| format!("connect to {address}: {e}"))?;
    socket
        .set_read_timeout(Some(TIMEOUT))
        .and_then(|()| socket.set_write_timeout(Some(TIMEOUT)))
        .map_err(|e| format!("set timeouts: {e}"))?;
    Ok(StreamOwned::new(connection, socket))
}

/// What the counters say of the one connection.
fn offload(counters: &[Arc<Counters>]) -> Result<String, String> {
    let deadline = Instant::now() + COUNTED_WITHIN;
    loop {
        let offloaded: u64 = counters.iter().map(|c| c.offloaded.get()).sum();
        if offloaded > 0 {
            return Ok("yes: the kernel did the record layer".to_owned());
        }
        let counted = |why: &&Decline| counters.iter().any(|c| c.declined[why.index()].get() > 0);
        if let Some(why) = Decline::ALL.iter().find(counted) {
            return Ok(format!("no: {} ({})", reason(*why), why.name()));
        }
        if Instant::now() > deadline {
            return Err("no counter says whether the connection was offloaded".to_owned());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn reason(why: Decline) -> &'static str {
    match why {
        Decline::Off => "it is switched off",
        Decline::Policy => "the policy wants a kernel in FIPS mode",
        Decline::NoUlp => "this kernel has no TLS; `tlsplice doctor` says what mends it",
        Decline::Cipher => "this kernel lacks the suite",
        Decline::Rekeyed => "the client had rekeyed, which this kernel cannot take over",
        Decline::Socket => "the kernel refused this socket",
    }
}
