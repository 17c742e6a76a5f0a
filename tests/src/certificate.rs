//! The certificates of a run: one ECDSA, one RSA, made on the spot.

use anyhow::{Context as _, Result};
use rcgen::{CertificateParams, KeyPair, SignatureAlgorithm};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

pub const NAME: &str = "test.example";

/// A chain and its key, in two PEM files.
#[derive(Debug, Clone)]
pub struct Certificate {
    pub chain: PathBuf,
    pub key: PathBuf,
    pub der: CertificateDer<'static>,
}

#[derive(Debug)]
pub struct Certificates {
    pub ecdsa: Certificate,
    pub rsa: Certificate,
}

impl Certificates {
    pub fn make(folder: &Path) -> Result<Self> {
        Ok(Self {
            ecdsa: Certificate::make(folder, "ecdsa", &rcgen::PKCS_ECDSA_P256_SHA256)?,
            rsa: Certificate::make(folder, "rsa", &rcgen::PKCS_RSA_SHA256)?,
        })
    }

    /// What a client of ours trusts.
    pub fn roots(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        for certificate in [&self.ecdsa, &self.rsa] {
            roots.add(certificate.der.clone()).context("trust the test certificate")?;
        }
        Ok(roots)
    }
}

impl Certificate {
    /// Signed by itself and no CA: its own root, for a client that was given it.
    fn make(folder: &Path, name: &str, algorithm: &'static SignatureAlgorithm) -> Result<Self> {
        let key_pair = KeyPair::generate_for(algorithm).with_context(|| format!("generate the {name} key"))?;
        let certificate = CertificateParams::new(vec![NAME.to_owned(), "localhost".into(), "127.0.0.1".into()])?
            .self_signed(&key_pair)
            .with_context(|| format!("sign the {name} certificate"))?;
        let (chain, key) = (folder.join(format!("{name}.crt")), folder.join(format!("{name}.key")));
        fs::write(&chain, certificate.pem())?;
        fs::write(&key, key_pair.serialize_pem())?;
        // tlsplice refuses a key that others can read.
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        Ok(Self { chain, key, der: certificate.der().clone() })
    }
}
