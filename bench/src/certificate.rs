//! The certificate of a run: ECDSA P-256, made on the spot, in every form that a peer reads.

use anyhow::{Context, Result};
use rcgen::{CertificateParams, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What the certificate is for.
pub const NAME: &str = "bench.example";

/// A certificate, its own root.
#[derive(Clone, Debug)]
pub struct Certificate {
    pub chain: PathBuf,
    pub key: PathBuf,
    /// Chain and key in one file, as HAProxy and hitch read them.
    pub both: PathBuf,
    der: CertificateDer<'static>,
}

impl Certificate {
    /// Makes one in that folder.
    pub fn make(folder: &Path) -> Result<Self> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).context("make a key")?;
        let params = CertificateParams::new(vec![NAME.to_owned()]).context("name the certificate")?;
        let made = params.self_signed(&key).context("sign the certificate")?;
        let file = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).context("keep a key to ourselves")?;
            anyhow::Ok(path)
        };
        let (chain, key) = (made.pem(), key.serialize_pem());
        Ok(Self {
            chain: file("chain.pem", &chain)?,
            key: file("key.pem", &key)?,
            both: file("both.pem", &format!("{chain}{key}"))?,
            der: made.der().clone(),
        })
    }

    /// What a client trusts.
    pub fn roots(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).context("trust the certificate")?;
        Ok(roots)
    }
}
