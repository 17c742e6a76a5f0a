//! Where connections go: an address, the name to ask for, what is offered and trusted; and requests to it.

use anyhow::Result;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

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
    /// A request for so many bytes of our upstream's.
    pub fn get(&self, bytes: u64) -> Vec<u8> {
        self.get_path(&format!("/bytes/{bytes}"))
    }

    /// A request for a path.
    pub fn get_path(&self, path: &str) -> Vec<u8> {
        format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.host()).into_bytes()
    }

    /// The head of a request with a body.
    pub fn post(&self, path: &str, length: u64) -> Vec<u8> {
        format!("POST {path} HTTP/1.1\r\nHost: {}\r\nContent-Length: {length}\r\n\r\n", self.host()).into_bytes()
    }

    /// What a browser would call it: the name, and the port unless it is the scheme's own (RFC 9110 section 7.2).
    fn host(&self) -> String {
        let name = match &self.name {
            ServerName::IpAddress(address) => match IpAddr::from(*address) {
                IpAddr::V6(address) => format!("[{address}]"),
                address => address.to_string(),
            },
            name => name.to_str().into_owned(),
        };
        let (port, usual) = (self.address.port(), if self.tls.is_some() { 443 } else { 80 });
        if port == usual { name } else { format!("{name}:{port}") }
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, address: &str, tls: bool) -> String {
        let tls = tls.then_some(Protection { trust: Trust::Anybody, any_parameters: true });
        Target { address: address.parse().unwrap(), name: ServerName::try_from(name).unwrap().to_owned(), tls }.host()
    }

    #[test]
    fn the_host_is_what_a_browser_would_send() {
        assert_eq!(host("www.example.org", "192.0.2.1:443", true), "www.example.org");
        assert_eq!(host("www.example.org", "192.0.2.1:8443", true), "www.example.org:8443");
        assert_eq!(host("www.example.org", "192.0.2.1:80", false), "www.example.org");
        assert_eq!(host("192.0.2.1", "192.0.2.1:443", false), "192.0.2.1:443");
        assert_eq!(host("2001:db8::1", "[2001:db8::1]:8443", true), "[2001:db8::1]:8443");
    }
}
