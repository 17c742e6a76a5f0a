//! The facts of a live host, by many short connections.
//!
//!   each version ─▶ suites, one less each time ─▶ groups, one at a time ─▶ chains ─▶ SCSV, RFC 5746, compression ─▶ HSTS
//!
//! The handshakes of `hello.rs` go no further than the server's first flight. Only for the chain of a host with TLS 1.3
//! alone and for HSTS is a handshake completed, by rustls. Attacks on a library (Heartbleed, ROBOT, a renegotiation
//! without RFC 5746) are not tried: they are no matter of configuration.

use super::configuration::Trust;
use super::hello::{Answer, Exchange, Offer, all_groups};
use super::probe::{SUITES, TLS13_SUITES, cipher_bits, suite_name};
use super::{Certificate, Facts, Hsts, Protocol, Suite};
use crate::tls::x509::Seen;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(5);
/// Of all of it.
const DEADLINE: Duration = Duration::from_secs(120);
/// A first flight with a long chain and its staple.
const ANSWER_BYTES: usize = 128 << 10;
/// The head of an HTTP answer.
const HEAD_BYTES: usize = 16 << 10;

/// A host to grade.
pub struct Host {
    address: SocketAddr,
    name: String,
    deadline: Instant,
}

impl Host {
    /// `to`: `HOST:PORT`. `sni`: the name to ask for, if it is another.
    ///
    /// # Errors
    /// The name cannot be resolved, or nothing listens.
    pub fn find(to: &str, sni: Option<&str>) -> Result<Self, String> {
        let (host, port) = to.rsplit_once(':').unwrap_or((to, "443"));
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port: u16 = port.parse().map_err(|_| format!("{to}: HOST:PORT is expected"))?;
        let mut addresses = (host, port).to_socket_addrs().map_err(|e| format!("{to}: {e}"))?;
        let mut last = format!("{to}: no address");
        let address = addresses.find(|address| match TcpStream::connect_timeout(address, TIMEOUT) {
            Ok(_) => true,
            Err(e) => {
                last = format!("{address}: {e}");
                false
            }
        });
        let name = sni.unwrap_or(host).to_owned();
        Ok(Self { address: address.ok_or(last)?, name, deadline: Instant::now() + DEADLINE })
    }

    /// Asks for everything that the grade takes.
    ///
    /// # Errors
    /// The host stopped to answer.
    pub fn facts(&self, roots: &[CertificateDer<'static>]) -> Result<Facts, String> {
        let mut suites = Vec::new();
        let mut chains: Vec<Vec<CertificateDer<'static>>> = Vec::new();
        let mut exchanges: Vec<(String, u32)> = Vec::new();
        let mut secure_renegotiation = true;
        for version in [Protocol::Ssl3, Protocol::Tls10, Protocol::Tls11, Protocol::Tls12, Protocol::Tls13] {
            for (suite, answer) in self.suites(version)? {
                suites.push(suite);
                secure_renegotiation &=
                    version == Protocol::Tls13 || answer.hello.as_ref().is_some_and(|hello| hello.secure_renegotiation);
                if !answer.chain.is_empty() && !chains.contains(&answer.chain) {
                    chains.push(answer.chain);
                }
                if let Some(exchange @ Exchange::DiffieHellman { .. }) = answer.exchange {
                    add(&mut exchanges, exchange);
                }
            }
        }
        let mut protocols: Vec<Protocol> = suites.iter().map(|suite: &Suite| suite.protocol).collect();
        if self.ask(&Offer { version: Protocol::Ssl2, ..self.offer(&[], &[]) })?.hello.is_some() {
            protocols.push(Protocol::Ssl2);
        }
        protocols.sort_unstable();
        protocols.dedup();
        for group in self.groups(&suites)? {
            add(&mut exchanges, Exchange::Group(group));
        }
        let best = protocols.last().copied();
        let visit = self.visit();
        if chains.is_empty() && !visit.chain.is_empty() {
            chains.push(visit.chain);
        }
        let (fallback_scsv, compression) = (self.refuses_fallback(best)?, self.compresses()?);
        let trust = Trust::new(roots);
        Ok(Facts {
            certificates: chains.iter().filter_map(|chain| self.judge(&trust, chain)).collect(),
            hsts: visit.hsts,
            fallback_scsv,
            secure_renegotiation,
            insecure_renegotiation: false,
            compression,
            protocols,
            suites,
            exchanges,
        })
    }

    fn judge(&self, trust: &Trust, chain: &[CertificateDer<'static>]) -> Option<Certificate> {
        let seen: Vec<Seen> = chain.iter().filter_map(|der| Seen::read(der).ok()).collect();
        (seen.len() == chain.len()).then(|| trust.judge(&seen, chain, Some(&self.name)))
    }

    fn offer<'a>(&'a self, suites: &'a [u16], groups: &'a [u16]) -> Offer<'a> {
        // SNI has no addresses.
        let name = (self.name.parse::<IpAddr>().is_err()).then_some(self.name.as_str());
        Offer { version: Protocol::Tls12, suites, groups, name, compression: false, fallback: false }
    }

    /// One connection: a ClientHello, and what comes back.
    fn ask(&self, offer: &Offer<'_>) -> Result<Answer, String> {
        if Instant::now() > self.deadline {
            return Err(format!("{}: not done within {} s", self.address, DEADLINE.as_secs()));
        }
        let said = |e: io::Error| format!("{}: {e}", self.address);
        let mut stream = connect(self.address).map_err(said)?;
        let mut random = [0; 32];
        aws_lc_rs::rand::fill(&mut random).map_err(|_| "the random source failed".to_owned())?;
        // A host that closes at once has answered.
        if stream.write_all(&offer.to_bytes(random)).is_err() {
            return Ok(Answer::default());
        }
        let (mut wire, mut chunk) = (Vec::new(), [0; 8192]);
        while wire.len() < ANSWER_BYTES {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => break,
                Ok(n) => wire.extend_from_slice(&chunk[..n]),
            }
            let answer = Answer::read(&wire);
            if answer.complete {
                return Ok(answer);
            }
        }
        Ok(Answer::read(&wire))
    }

    /// Every suite of a version in the server's order.
    fn suites(&self, version: Protocol) -> Result<Vec<(Suite, Answer)>, String> {
        let table = if version == Protocol::Tls13 { TLS13_SUITES } else { SUITES };
        let mut left: Vec<u16> = table.iter().map(|(id, _)| *id).collect();
        let groups = all_groups();
        let mut found = Vec::new();
        while !left.is_empty() {
            let answer = self.ask(&Offer { version, ..self.offer(&left, &groups) })?;
            let Some(hello) = answer.hello.clone().filter(|hello| is_version(hello.version, version)) else { break };
            // A suite that was not offered ends it, or it would never end.
            let Some(place) = left.iter().position(|id| *id == hello.suite) else { break };
            left.remove(place);
            let name = suite_name(hello.suite).unwrap_or("unknown");
            let tls13 = version == Protocol::Tls13;
            let has = |part: &str| name.contains(part);
            let suite = Suite {
                name: name.to_owned(),
                protocol: version,
                bits: cipher_bits(name),
                forward_secrecy: tls13 || has("_DHE_") || has("_ECDHE_"),
                aead: tls13 || has("_GCM_") || has("_CCM") || has("POLY1305"),
                authenticated: !has("_anon_"),
            };
            found.push((suite, answer));
        }
        Ok(found)
    }

    /// Groups, each offered alone.
    fn groups(&self, suites: &[Suite]) -> Result<Vec<u16>, String> {
        let mut found = Vec::new();
        let tls13 = suites.iter().any(|suite| suite.protocol == Protocol::Tls13);
        let older = suites.iter().filter(|s| s.protocol < Protocol::Tls13 && s.name.contains("_ECDHE_"));
        let older = older.map(|suite| suite.protocol).max();
        let (new, old): (Vec<u16>, Vec<u16>) = (ids(TLS13_SUITES, ""), ids(SUITES, "_ECDHE_"));
        for group in all_groups() {
            let alone = [group];
            let mut takes = |version: Protocol, suites: &[u16]| -> Result<(), String> {
                let answer = self.ask(&Offer { version, ..self.offer(suites, &alone) })?;
                let chosen = match answer.exchange {
                    Some(Exchange::Group(chosen)) => Some(chosen),
                    Some(Exchange::DiffieHellman { .. }) => None,
                    None => answer.hello.and_then(|hello| hello.group),
                };
                if chosen == Some(group) && !found.contains(&group) {
                    found.push(group);
                }
                Ok(())
            };
            if tls13 {
                takes(Protocol::Tls13, &new)?;
            }
            if let Some(version) = older {
                takes(version, &old)?;
            }
        }
        Ok(found)
    }

    /// A client that stops below the best that is offered is told so.
    fn refuses_fallback(&self, best: Option<Protocol>) -> Result<bool, String> {
        let version = match best {
            Some(Protocol::Tls13) => Protocol::Tls12,
            Some(Protocol::Tls12) => Protocol::Tls11,
            Some(Protocol::Tls11) => Protocol::Tls10,
            Some(Protocol::Tls10) => Protocol::Ssl3,
            Some(Protocol::Ssl3 | Protocol::Ssl2) | None => return Ok(true),
        };
        let (suites, groups) = (ids(SUITES, ""), all_groups());
        let answer = self.ask(&Offer { version, fallback: true, ..self.offer(&suites, &groups) })?;
        Ok(answer.hello.is_none())
    }

    fn compresses(&self) -> Result<bool, String> {
        let (suites, groups) = (ids(SUITES, ""), all_groups());
        let answer = self.ask(&Offer { compression: true, ..self.offer(&suites, &groups) })?;
        Ok(answer.hello.is_some_and(|hello| hello.compressed))
    }

    /// A whole handshake and one request.
    fn visit(&self) -> Visit {
        let mut visit = Visit { chain: Vec::new(), hsts: Hsts::Unknown };
        // Whatever fails leaves it unknown, which is what it is.
        let _ = self.try_visit(&mut visit);
        visit
    }

    fn try_visit(&self, visit: &mut Visit) -> io::Result<()> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate))
            .with_no_client_auth();
        let name = ServerName::try_from(self.name.clone()).map_err(io::Error::other)?;
        let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(connection, connect(self.address)?);
        stream.conn.complete_io(&mut stream.sock)?;
        visit.chain = stream.conn.peer_certificates().map(<[_]>::to_vec).unwrap_or_default();
        let host = &self.name;
        write!(stream, "GET / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: tlsplice-grade\r\nConnection: close\r\n\r\n")?;
        let (mut head, mut chunk) = (Vec::new(), [0; 4096]);
        while head.len() < HEAD_BYTES && !head.windows(4).any(|four| four == b"\r\n\r\n") {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => break,
                Ok(n) => head.extend_from_slice(&chunk[..n]),
            }
        }
        visit.hsts = hsts(&String::from_utf8_lossy(&head));
        Ok(())
    }
}

struct Visit {
    chain: Vec<CertificateDer<'static>>,
    hsts: Hsts,
}

fn add(exchanges: &mut Vec<(String, u32)>, exchange: Exchange) {
    let one = (exchange.name(), exchange.as_rsa_bits());
    if !exchanges.contains(&one) {
        exchanges.push(one);
    }
}

fn ids(table: &[(u16, &str)], with: &str) -> Vec<u16> {
    table.iter().filter(|(_, name)| name.contains(with)).map(|(id, _)| *id).collect()
}

fn is_version(wire: u16, version: Protocol) -> bool {
    let wanted = match version {
        Protocol::Ssl2 => 0x0002,
        Protocol::Ssl3 => 0x0300,
        Protocol::Tls10 => 0x0301,
        Protocol::Tls11 => 0x0302,
        Protocol::Tls12 => 0x0303,
        Protocol::Tls13 => 0x0304,
    };
    wire == wanted
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

/// The first Strict-Transport-Security of an HTTP head (RFC 6797 section 8.1 takes the first).
fn hsts(head: &str) -> Hsts {
    if !head.starts_with("HTTP/") {
        return Hsts::Unknown;
    }
    let lines = head.lines().take_while(|line| !line.is_empty()).filter_map(|line| line.split_once(':'));
    let Some((_, value)) = lines.clone().find(|(name, _)| name.eq_ignore_ascii_case("strict-transport-security"))
    else {
        return Hsts::Absent;
    };
    Hsts::of_value(value)
}

/// What is judged is judged elsewhere: this client sends one request without a secret.
#[derive(Debug)]
struct AnyCertificate;

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hsts_is_read_as_clients_read_it() {
        let head = |line: &str| format!("HTTP/1.1 200 OK\r\nServer: x\r\n{line}\r\n\r\nbody");
        assert_eq!(
            hsts(&head("strict-transport-security: includeSubDomains; Max-Age=\"63072000\"")),
            Hsts::Sent(63_072_000)
        );
        assert_eq!(hsts(&head("X: y")), Hsts::Absent);
        assert_eq!(hsts(&head("Strict-Transport-Security: nonsense")), Hsts::Sent(0));
        assert_eq!(hsts("HTTP/1.1 200 OK\r\n\r\nStrict-Transport-Security: max-age=1"), Hsts::Absent);
        assert_eq!(hsts("220 mail\r\n"), Hsts::Unknown);
    }
}
