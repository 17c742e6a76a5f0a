//! The facts of a configuration, without a socket: what its policy offers, and the chains as they lie in the files.

use super::{Certificate, Facts, Hsts, Protocol, Report, Suite, grade as graded};
use crate::config::{Config, Mode};
use crate::tls::certificates::{Certificates, Served};
use crate::tls::judge::{Shape, host_roots};
use crate::tls::policy;
use crate::tls::x509::{Hash, Seen};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{NamedGroup, RootCertStore, SupportedCipherSuite};
use std::sync::{Arc, OnceLock};

/// Grades what would be served. `roots`: trusted beside the host's own.
pub fn grade(config: &Config, certificates: &Certificates, roots: &[CertificateDer<'static>]) -> Report {
    let tls = &config.tls;
    let kinds: Vec<&str> = certificates.served().iter().map(|one| one.key_kind.as_str()).collect();
    let usable = |suite: &SupportedCipherSuite| {
        let name = policy::suite_name(suite.suite());
        let needs = |kind: &str| name.contains(&format!("_{kind}_")) && !kinds.contains(&kind);
        !needs("ECDSA") && !needs("RSA")
    };
    let suites: Vec<Suite> = policy::suites_of(tls).iter().filter(|suite| usable(suite)).map(suite).collect();
    let mut protocols: Vec<Protocol> = suites.iter().map(|suite| suite.protocol).collect();
    protocols.sort_unstable();
    protocols.dedup();
    let trust = Trust::new(roots);
    graded(&Facts {
        protocols,
        suites,
        exchanges: policy::groups_of(tls).iter().map(|group| exchange(group.name())).collect(),
        certificates: certificates.served().iter().map(|served| trust.certificate(served)).collect(),
        hsts: hsts(config),
        fallback_scsv: true,
        secure_renegotiation: true,
        insecure_renegotiation: false,
        compression: false,
    })
}

/// Mode http sends our own. One listener of mode tcp, and it depends on what is behind that.
fn hsts(config: &Config) -> Hsts {
    let passes_on = config.listeners.iter().any(|listener| matches!(listener.mode, Mode::Tcp(_)));
    if passes_on { Hsts::Upstream } else { Hsts::of_value(&config.http.hsts) }
}

fn suite(suite: &SupportedCipherSuite) -> Suite {
    let name = policy::suite_name(suite.suite()).to_owned();
    Suite {
        protocol: if suite.tls13().is_some() { Protocol::Tls13 } else { Protocol::Tls12 },
        bits: if name.contains("_AES_128_") { 128 } else { 256 },
        name,
        forward_secrecy: true,
        aead: true,
        authenticated: true,
    }
}

fn exchange(group: NamedGroup) -> (String, u32) {
    let bits = if group == NamedGroup::secp384r1 { 7680 } else { 3072 };
    (policy::group_name(group).to_owned(), bits)
}

/// The roots that chains are held against.
pub struct Trust(Option<Arc<WebPkiServerVerifier>>);

impl Trust {
    /// The host's roots and more. Those of the host are read once in a process: there are some hundred.
    pub fn new(more: &[CertificateDer<'static>]) -> Self {
        static HOST: OnceLock<Option<Arc<WebPkiServerVerifier>>> = OnceLock::new();
        Self(if more.is_empty() { HOST.get_or_init(|| Self::verifier(&[])).clone() } else { Self::verifier(more) })
    }

    fn verifier(more: &[CertificateDer<'static>]) -> Option<Arc<WebPkiServerVerifier>> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(host_roots());
        roots.add_parsable_certificates(more.iter().cloned());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().ok()
    }

    fn certificate(&self, served: &Served) -> Certificate {
        // A wildcard is held against a name that it covers.
        let name = served.names.first().map(|name| name.replacen("*.", "a.", 1));
        self.judge(&served.chain, &served.certified.cert, name.as_deref())
    }

    /// What a client would say that asks for `name`.
    pub fn judge(&self, seen: &[Seen], chain: &[CertificateDer<'static>], name: Option<&str>) -> Certificate {
        let Some((leaf, (end, intermediates))) = seen.first().zip(chain.split_first()) else {
            return Certificate {
                name: "no certificate".to_owned(),
                key: crate::tls::x509::Key::Other,
                hash: Hash::Strong,
                untrusted: None,
                incomplete: None,
                other_name: None,
            };
        };
        let hashes = seen.iter().filter(|one| !one.is_self_issued()).map(|one| one.hash);
        let hash = hashes.fold(Hash::Strong, |worst, hash| if (hash as u8) < worst as u8 { hash } else { worst });
        let mut certificate = Certificate {
            name: leaf.name().to_owned(),
            key: leaf.key,
            hash,
            untrusted: None,
            incomplete: None,
            other_name: None,
        };
        if let Err(why) = leaf.in_force() {
            certificate.untrusted = Some(why);
            return certificate;
        }
        let named = name.and_then(|name| ServerName::try_from(name.to_owned()).ok());
        // What stands for a name that is not asked: any of the certificate's own, so that only the chain is judged.
        let asked = named.unwrap_or_else(|| ServerName::try_from("invalid.invalid").expect("a DNS name"));
        let Some(verifier) = &self.0 else {
            certificate.untrusted = Some("this host has no roots to trust (ca-certificates)".to_owned());
            return certificate;
        };
        use rustls::CertificateError as E;
        match verifier.verify_server_cert(end, intermediates, &asked, &[], UnixTime::now()) {
            Ok(_) => {}
            Err(rustls::Error::InvalidCertificate(E::NotValidForName | E::NotValidForNameContext { .. })) => {
                certificate.other_name = name.map(str::to_owned);
            }
            Err(rustls::Error::InvalidCertificate(E::UnknownIssuer)) => self.unknown_issuer(&mut certificate, seen),
            Err(rustls::Error::InvalidCertificate(E::Other(_))) if leaf.is_self_issued() => {
                self.unknown_issuer(&mut certificate, seen);
            }
            // What it is signed with has been said in its own words.
            Err(_) if hash != Hash::Strong => {}
            Err(error) => certificate.untrusted = Some(error.to_string()),
        }
        certificate
    }

    /// Either an intermediate is missing, or the root is none that is trusted.
    fn unknown_issuer(&self, certificate: &mut Certificate, seen: &[Seen]) {
        let shape = Shape::of(seen);
        let Some(last) = shape.path.last().map(|place| &seen[*place]) else { return };
        let is_self_signed = last.is_self_issued();
        certificate.untrusted = Some(if is_self_signed {
            format!("its root is none that this host trusts ({})", last.subject_text)
        } else {
            format!("no root that this host trusts has issued it; the chain ends with what {} issued", last.issuer_text)
        });
        if !is_self_signed {
            certificate.incomplete = Some("the chain ends before a root that this host knows".to_owned());
        }
    }
}
