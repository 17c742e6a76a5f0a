//! Finds the certificates and keys of the configuration and pairs them by public key, whatever the files are called.
//!
//!   Source (all files' bytes) ─▶ chains and keys ─▶ judge ─▶ pairs ─▶ resolver by name
//!
//! Everything that is wrong is reported together, each fault with its file and what mends it. What is odd and yet
//! served is a warning.

use super::judge::{Measure, Severity, judge};
use super::pem::{self, Key};
use super::resolver::Resolver;
use super::source::Source;
use super::x509::Seen;
use crate::config::Tls;
use rustls::SignatureAlgorithm;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SigningKey};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Every certificate that can be served. Never empty.
#[derive(Debug, Clone)]
pub struct Certificates {
    served: Vec<Served>,
    resolver: Arc<Resolver>,
    warnings: Vec<Fault>,
}

/// One certificate with its key.
#[derive(Debug, Clone)]
pub struct Served {
    /// DNS names in lower case, as SNI asks for them; the first one is the certificate's main name.
    pub names: Vec<String>,
    /// `ECDSA`, `RSA`, or another algorithm by rustls' name.
    pub key_kind: String,
    /// The leaf first.
    pub chain: Vec<Seen>,
    /// For people, UTC.
    pub not_after: String,
    /// The same in seconds since 1970.
    pub not_after_seconds: i64,
    /// Empty for a certificate that came from no file.
    pub certificate_file: PathBuf,
    pub key_file: PathBuf,
    pub certified: Arc<CertifiedKey>,
}

/// All that is wrong with the certificates of a configuration.
#[derive(Debug, thiserror::Error)]
pub struct Faults(Vec<Fault>);

/// One file and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub file: PathBuf,
    pub message: String,
}

impl Faults {
    pub fn list(&self) -> &[Fault] {
        &self.0
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Fault { file, message }) in self.0.iter().enumerate() {
            let newline = if index == 0 { "" } else { "\n" };
            write!(f, "{newline}{}: {message}", file.display())?;
        }
        Ok(())
    }
}

impl Certificates {
    /// Reads and judges every file that the configuration names, folders one level deep.
    ///
    /// # Errors
    /// Every fault that was found.
    pub fn load(tls: &Tls) -> Result<Self, Faults> {
        Self::of_source(&Source::read(&tls.certificates), tls)
    }

    /// Judges what was read.
    ///
    /// # Errors
    /// Every fault that was found.
    pub fn of_source(source: &Source, tls: &Tls) -> Result<Self, Faults> {
        let mut found = Found { faults: source.faults.clone(), ..Found::default() };
        for file in &source.files {
            found.read_file(&file.path, pem::parse(&file.path, &file.text, file.mode), file.named);
        }
        let served = found.pair(Measure { policy: tls.policy, ocsp: tls.ocsp });
        if served.is_empty() && found.faults.is_empty() {
            for path in &source.paths {
                found.fault(path, "holds no certificate with its private key (PEM)");
            }
        }
        match Self::of(served, found.warnings) {
            Some(certificates) if found.faults.is_empty() => Ok(certificates),
            Some(_) | None => Err(Faults(found.faults)),
        }
    }

    /// One certificate that was made, not read.
    ///
    /// # Errors
    /// The two do not belong together, or are none.
    pub fn from_der(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, String> {
        let key = signing_key(&Key::new(key))?;
        let chain = Chain::read(PathBuf::new(), chain)?;
        if !chain.belongs_to(&*key) {
            return Err("the key is not the certificate's".to_owned());
        }
        let served = Served::new(&chain, PathBuf::new(), key);
        Self::of(vec![served], Vec::new()).ok_or_else(|| "no certificate".to_owned())
    }

    fn of(served: Vec<Served>, warnings: Vec<Fault>) -> Option<Self> {
        let resolver = Resolver::new(served.iter().map(|one| (one.names.as_slice(), Arc::clone(&one.certified))))?;
        Some(Self { served, resolver: Arc::new(resolver), warnings })
    }

    /// The same certificates with these staples, one for each or none.
    pub fn with_staples(mut self, staples: &[Option<Vec<u8>>]) -> Self {
        for (served, staple) in self.served.iter_mut().zip(staples) {
            let mut certified = CertifiedKey::clone(&served.certified);
            certified.ocsp.clone_from(staple);
            served.certified = Arc::new(certified);
        }
        match Self::of(std::mem::take(&mut self.served), std::mem::take(&mut self.warnings)) {
            Some(stapled) => stapled,
            None => self,
        }
    }

    /// What is odd and yet served.
    pub fn warnings(&self) -> &[Fault] {
        &self.warnings
    }

    /// Every DNS name that is served.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.served.iter().flat_map(|one| &one.names).map(String::as_str)
    }

    pub fn served(&self) -> &[Served] {
        &self.served
    }

    pub fn resolver(&self) -> Arc<Resolver> {
        Arc::clone(&self.resolver)
    }
}

impl Served {
    fn new(chain: &Chain, key_file: PathBuf, key: Arc<dyn SigningKey>) -> Self {
        Self {
            names: chain.leaf().names.clone(),
            key_kind: kind(&*key),
            not_after: chain.leaf().not_after.to_string(),
            not_after_seconds: chain.leaf().not_after.timestamp(),
            chain: chain.seen.clone(),
            certificate_file: chain.file.clone(),
            key_file,
            certified: Arc::new(CertifiedKey::new(chain.der.clone(), key)),
        }
    }
}

fn kind(key: &dyn SigningKey) -> String {
    match key.algorithm() {
        SignatureAlgorithm::ECDSA => "ECDSA".to_owned(),
        SignatureAlgorithm::RSA => "RSA".to_owned(),
        // The enum is not ours.
        other => format!("{other:?}"),
    }
}

/// What the files held, before it is paired.
#[derive(Default)]
struct Found {
    chains: Vec<Chain>,
    keys: Vec<(PathBuf, Arc<dyn SigningKey>)>,
    faults: Vec<Fault>,
    warnings: Vec<Fault>,
}

struct Chain {
    file: PathBuf,
    /// Never empty, as is `der`.
    seen: Vec<Seen>,
    der: Vec<CertificateDer<'static>>,
}

impl Chain {
    fn read(file: PathBuf, der: Vec<CertificateDer<'static>>) -> Result<Self, String> {
        if der.is_empty() {
            return Err("no certificate".to_owned());
        }
        let read = |(index, der): (usize, &_)| {
            Seen::read(der).map_err(|e| format!("its certificate number {} cannot be read: {e}", index + 1))
        };
        let seen = der.iter().enumerate().map(read).collect::<Result<_, _>>()?;
        Ok(Self { file, seen, der })
    }

    fn leaf(&self) -> &Seen {
        &self.seen[0]
    }

    fn belongs_to(&self, key: &dyn SigningKey) -> bool {
        key.public_key().is_some_and(|info| info.as_ref() == self.leaf().key_info)
    }
}

impl Found {
    fn fault(&mut self, file: &Path, message: impl Into<String>) {
        self.faults.push(Fault { file: file.to_path_buf(), message: message.into() });
    }

    /// `named`: the configuration names this very file, so it has to hold something.
    fn read_file(&mut self, path: &Path, parsed: Result<pem::PemFile, String>, named: bool) {
        let file = match parsed {
            Ok(file) => file,
            Err(message) => return self.fault(path, message),
        };
        if named && file.certificates.is_empty() && file.keys.is_empty() {
            self.fault(path, "holds neither a certificate nor a private key (PEM)");
        }
        for key in &file.keys {
            match signing_key(key) {
                Ok(key) => self.add_key(path, key),
                Err(message) => self.fault(path, message),
            }
        }
        if file.certificates.is_empty() {
            return;
        }
        match Chain::read(path.to_path_buf(), file.certificates) {
            Ok(chain) => self.add_chain(chain),
            Err(message) => self.fault(path, message),
        }
    }

    /// A key that lies in two files is one key.
    fn add_key(&mut self, path: &Path, key: Arc<dyn SigningKey>) {
        if !self.keys.iter().any(|(_, other)| other.public_key() == key.public_key()) {
            self.keys.push((path.to_path_buf(), key));
        }
    }

    /// A certificate that lies in two files (`cert.pem`, `fullchain.pem`) is taken with the longer chain.
    fn add_chain(&mut self, chain: Chain) {
        match self.chains.iter_mut().find(|other| other.der[0] == chain.der[0]) {
            Some(other) if other.der.len() < chain.der.len() => *other = chain,
            Some(_) => {}
            None => self.chains.push(chain),
        }
    }

    fn pair(&mut self, measure: Measure) -> Vec<Served> {
        let mut served = Vec::new();
        let mut unused: Vec<bool> = vec![true; self.keys.len()];
        let (mut faults, mut warnings) = (Vec::new(), Vec::new());
        let fault = |file: &Path, message: String| Fault { file: file.to_path_buf(), message };
        for chain in &self.chains {
            let Some(index) = self.keys.iter().position(|(_, key)| chain.belongs_to(&**key)) else {
                // A file of intermediates needs no key.
                if !chain.leaf().is_authority {
                    let name = chain.leaf().names.first().map_or("no name", String::as_str);
                    let message = format!("the private key of this certificate ({name}) is in none of the files");
                    faults.push(fault(&chain.file, message));
                }
                continue;
            };
            unused[index] = false;
            let elsewhere: Vec<&Seen> =
                self.chains.iter().filter(|other| other.der[0] != chain.der[0]).flat_map(|other| &other.seen).collect();
            let mut is_good = true;
            for judgement in judge(&chain.file, &chain.seen, &elsewhere, measure) {
                let said = fault(&chain.file, judgement.message);
                match judgement.severity {
                    Severity::Error => {
                        is_good = false;
                        faults.push(said);
                    }
                    Severity::Warning => warnings.push(said),
                }
            }
            if is_good {
                let (key_file, key) = &self.keys[index];
                served.push(Served::new(chain, key_file.clone(), Arc::clone(key)));
            }
        }
        for ((file, _), _) in self.keys.iter().zip(&unused).filter(|(_, unused)| **unused) {
            let message = "no certificate in any of the files has the public key of this private key";
            faults.push(fault(file, message.to_owned()));
        }
        self.faults.append(&mut faults);
        self.warnings.append(&mut warnings);
        served
    }
}

fn signing_key(key: &Key) -> Result<Arc<dyn SigningKey>, String> {
    any_supported_type(key.der()).map_err(|e| {
        format!(
            "its private key is of no kind that the policy has (ECDSA P-256 or P-384, RSA of 2048 bits or more): {e}"
        )
    })
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub(crate) fn made(
        names: &[&str],
        kind: &'static rcgen::SignatureAlgorithm,
    ) -> (rcgen::Certificate, rcgen::KeyPair) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = rcgen::KeyPair::generate_for(kind).expect("this provider makes every kind that the tests ask for");
        let certificate =
            rcgen::CertificateParams::new(names).expect("DNS names").self_signed(&key).expect("its own key");
        (certificate, key)
    }

    pub(crate) fn authority() -> (rcgen::Certificate, rcgen::KeyPair) {
        let key = rcgen::KeyPair::generate().expect("the default kind");
        let mut parameters = rcgen::CertificateParams::default();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        (parameters.self_signed(&key).expect("its own key"), key)
    }

    pub(crate) fn expired() -> (rcgen::Certificate, rcgen::KeyPair) {
        let key = rcgen::KeyPair::generate().expect("the default kind");
        let mut parameters = rcgen::CertificateParams::new(vec!["old.test".to_owned()]).expect("a DNS name");
        parameters.not_before = rcgen::date_time_ymd(2000, 1, 1);
        parameters.not_after = rcgen::date_time_ymd(2001, 1, 1);
        (parameters.self_signed(&key).expect("its own key"), key)
    }

    pub(crate) fn certified(
        names: &[&str],
        kind: &'static rcgen::SignatureAlgorithm,
    ) -> (Vec<String>, Arc<CertifiedKey>) {
        let (certificate, key) = made(names, kind);
        let der = PrivateKeyDer::try_from(key.serialize_der()).expect("PKCS#8");
        let made = Certificates::from_der(vec![certificate.der().clone()], der).expect("a pair");
        (made.served[0].names.clone(), Arc::clone(&made.served[0].certified))
    }

    pub(crate) fn load(paths: &[PathBuf]) -> Result<Certificates, Faults> {
        let mut tls = crate::tls::policy::tests::tls(crate::config::Policy::APlus, &[], &[]);
        tls.certificates = paths.to_vec();
        Certificates::load(&tls)
    }

    pub(crate) fn resolver(names: &[&str]) -> Arc<Resolver> {
        let (names, key) = certified(names, &rcgen::PKCS_ECDSA_P256_SHA256);
        Arc::new(Resolver::new(std::iter::once((names.as_slice(), key))).expect("not empty"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use tempfile::TempDir;

    const ECDSA: &rcgen::SignatureAlgorithm = &rcgen::PKCS_ECDSA_P256_SHA256;

    fn write(folder: &TempDir, name: &str, text: &str) -> PathBuf {
        let path = folder.path().join(name);
        fs::write(&path, text).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("owned");
        path
    }

    fn folder() -> TempDir {
        tempfile::tempdir().expect("a temporary folder")
    }

    fn said(paths: &[PathBuf]) -> String {
        testing::load(paths).expect_err("a fault").to_string()
    }

    #[test]
    fn pairs_are_found_by_key_whatever_the_files_are_called() {
        let folder = folder();
        let (one, one_key) = testing::made(&["one.test"], ECDSA);
        let (two, two_key) = testing::made(&["two.test", "*.two.test"], &rcgen::PKCS_RSA_SHA256);
        write(&folder, "a.txt", &one.pem());
        write(&folder, "b", &two_key.serialize_pem());
        write(&folder, "z.crt", &(two.pem() + &one_key.serialize_pem()));
        write(&folder, "README", "nothing of interest");
        write(&folder, ".hidden", "-----BEGIN CERTIFICATE-----\nbroken");
        fs::create_dir(folder.path().join("sub")).expect("made");
        let certificates = testing::load(&[folder.path().to_path_buf()]).expect("two pairs");
        let names: Vec<_> =
            certificates.served().iter().map(|one| (one.names.join(" "), one.key_kind.as_str())).collect();
        assert_eq!(names, [("one.test".to_owned(), "ECDSA"), ("two.test *.two.test".to_owned(), "RSA")]);
        assert!(certificates.served()[0].key_file.ends_with("z.crt"));
    }

    #[test]
    fn the_longer_chain_of_one_certificate_is_served() {
        let folder = folder();
        let (leaf, key) = testing::made(&["one.test"], ECDSA);
        let (authority, _) = testing::authority();
        write(&folder, "cert.pem", &leaf.pem());
        write(&folder, "chain.pem", &authority.pem());
        write(&folder, "fullchain.pem", &(leaf.pem() + &authority.pem()));
        write(&folder, "privkey.pem", &key.serialize_pem());
        let certificates = testing::load(&[folder.path().to_path_buf()]).expect("one pair");
        let lengths: Vec<_> = certificates.served().iter().map(|one| one.chain.len()).collect();
        assert_eq!(lengths, [2]);
    }

    #[test]
    fn a_key_that_others_may_read_is_refused_with_its_mend() {
        let folder = folder();
        let (certificate, key) = testing::made(&["one.test"], ECDSA);
        let both = write(&folder, "both.pem", &(certificate.pem() + &key.serialize_pem()));
        for mode in [0o640, 0o604, 0o620, 0o666] {
            fs::set_permissions(&both, fs::Permissions::from_mode(mode)).expect("owned");
            let said = said(std::slice::from_ref(&both));
            assert!(said.ends_with(&format!("chmod 600 {}", both.display())), "{mode:o}: {said}");
        }
        fs::set_permissions(&both, fs::Permissions::from_mode(0o400)).expect("owned");
        testing::load(&[both]).expect("its own");
    }

    #[test]
    fn halves_are_named_together() {
        let folder = folder();
        let (one, _) = testing::made(&["one.test"], ECDSA);
        let (_, other_key) = testing::made(&["two.test"], ECDSA);
        let (certificate, key) =
            (write(&folder, "one.pem", &one.pem()), write(&folder, "two.pem", &other_key.serialize_pem()));
        let said = said(&[certificate.clone(), key.clone()]);
        assert!(
            said.contains(&format!("{}: the private key of this certificate (one.test)", certificate.display())),
            "{said}"
        );
        assert!(said.contains(&format!("{}: no certificate", key.display())), "{said}");
    }

    #[test]
    fn what_cannot_be_served_says_why() {
        let folder = folder();
        let nothing = write(&folder, "nothing.pem", "hello");
        assert!(said(&[nothing]).contains("neither a certificate nor a private key"));
        assert!(said(&[folder.path().join("absent.pem")]).contains("No such file"));
        let broken = write(&folder, "broken.pem", "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n");
        assert!(said(&[broken]).contains("no sound PEM"));
        let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
        assert!(said(&[write(&folder, "locked.pem", encrypted)]).contains("openssl pkey"));
        let empty = tempfile::tempdir().expect("empty");
        assert!(said(&[empty.path().to_path_buf()]).contains("holds no certificate"));
    }

    #[test]
    fn an_expired_certificate_is_refused_with_its_date() {
        let folder = folder();
        let (certificate, key) = testing::expired();
        let both = write(&folder, "both.pem", &(certificate.pem() + &key.serialize_pem()));
        let said = said(&[both]);
        assert!(said.contains("expired on") && said.contains("2001"), "{said}");
    }
}
