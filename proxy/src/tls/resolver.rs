//! Chooses the certificate of a handshake: by the name that the client asks for, then by what it can verify.

use crate::observe::sockets::ServerName;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{SignatureAlgorithm, SignatureScheme};
use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

/// Exact names before wildcards before the default. Immutable; a reload makes a new one.
pub struct Resolver {
    exact: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// By what follows the `*.`.
    wildcard: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// For clients that name nothing, or nothing that is known. Never empty.
    default: Vec<Arc<CertifiedKey>>,
}

impl Resolver {
    /// `certificates`: DNS names and the key, in the operator's order. The first is the default, with all others of
    /// its name. `None` if there is none.
    pub(super) fn new<'a>(certificates: impl Iterator<Item = (&'a [String], Arc<CertifiedKey>)>) -> Option<Self> {
        let mut resolver = Self { exact: HashMap::new(), wildcard: HashMap::new(), default: Vec::new() };
        let mut default_name = None;
        for (names, key) in certificates {
            if resolver.default.is_empty() {
                resolver.default.push(Arc::clone(&key));
                default_name = names.first().cloned();
            }
            for name in names {
                let (map, name) = match name.strip_prefix("*.") {
                    Some(suffix) => (&mut resolver.wildcard, suffix),
                    None => (&mut resolver.exact, name.as_str()),
                };
                map.entry(name.to_owned()).or_default().push(Arc::clone(&key));
            }
        }
        for keys in resolver.exact.values_mut().chain(resolver.wildcard.values_mut()) {
            // Stable: among keys of one kind the operator's order stays.
            keys.sort_by_key(|key| rank(key));
        }
        let of_that_name = default_name.and_then(|name| {
            name.strip_prefix("*.").map_or_else(|| resolver.exact.get(&name), |suffix| resolver.wildcard.get(suffix))
        });
        if let Some(keys) = of_that_name {
            resolver.default = keys.clone();
        }
        (!resolver.default.is_empty()).then_some(resolver)
    }

    /// A certificate has this name.
    pub fn knows(&self, name: &str) -> bool {
        self.meant(name).is_some()
    }

    /// What a certificate's name stands for has one here too: itself, or a wildcard that has it.
    pub fn covers(&self, name: &str) -> bool {
        name.strip_prefix("*.").map_or_else(|| self.knows(name), |suffix| self.wildcard.contains_key(suffix))
    }

    /// The name of a certificate that this name means, if there is one.
    fn meant(&self, name: &str) -> Option<String> {
        let name = name.to_ascii_lowercase();
        let name = name.strip_suffix('.').unwrap_or(&name);
        if self.exact.contains_key(name) {
            return Some(name.to_owned());
        }
        let (_, suffix) = name.split_once('.')?;
        self.wildcard.contains_key(suffix).then(|| format!("*.{suffix}"))
    }

    fn candidates(&self, name: Option<&str>) -> &[Arc<CertifiedKey>] {
        let Some(name) = name.map(str::to_ascii_lowercase) else { return &self.default };
        let name = name.strip_suffix('.').unwrap_or(&name);
        let by_wildcard = || name.split_once('.').and_then(|(_, suffix)| self.wildcard.get(suffix));
        self.exact.get(name).or_else(by_wildcard).unwrap_or(&self.default)
    }

    fn choose(&self, name: Option<&str>, schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let candidates = self.candidates(name);
        let verifiable = candidates.iter().find(|key| key.key.choose_scheme(schemes).is_some());
        // Where nothing fits, rustls says so with the right alert if it is given any.
        verifiable.or(candidates.first()).cloned()
    }
}

/// ECDSA signs 20 times as fast as RSA and makes smaller handshakes, so clients that can verify it get it.
fn rank(key: &CertifiedKey) -> u8 {
    match key.key.algorithm() {
        SignatureAlgorithm::ECDSA => 0,
        // The enum is not ours; Ed25519 is what few clients verify.
        SignatureAlgorithm::RSA => 1,
        _ => 2,
    }
}

thread_local! {
    /// What the handshake that this thread has just gone on with asked for: rustls' unbuffered connection does not tell.
    static ASKED: Cell<Option<ServerName>> = const { Cell::new(None) };
}

/// The name that the last call into rustls on this thread has resolved, once.
pub fn take_asked() -> Option<ServerName> {
    ASKED.take()
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        ASKED.set(hello.server_name().map(|name| ServerName::of(self.meant(name).as_deref())));
        self.choose(hello.server_name(), hello.signature_schemes())
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("names", &self.exact.len()).field("wildcards", &self.wildcard.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::certificates::testing;

    fn resolver(certificates: &[(&[&str], &'static rcgen::SignatureAlgorithm)]) -> (Resolver, Vec<Arc<CertifiedKey>>) {
        let made: Vec<_> = certificates.iter().map(|(names, kind)| testing::certified(names, kind)).collect();
        let named: Vec<_> = made.iter().map(|(names, key)| (names.as_slice(), Arc::clone(key))).collect();
        let resolver = Resolver::new(named.into_iter()).expect("not empty");
        (resolver, made.iter().map(|(_, key)| Arc::clone(key)).collect())
    }

    const ANY: &[SignatureScheme] = &[SignatureScheme::RSA_PSS_SHA256, SignatureScheme::ECDSA_NISTP256_SHA256];
    const RSA: &[SignatureScheme] = &[SignatureScheme::RSA_PSS_SHA256];

    #[test]
    fn names_go_exact_then_wildcard_then_default() {
        let ecdsa = &rcgen::PKCS_ECDSA_P256_SHA256;
        let (resolver, keys) = resolver(&[(&["a.test"], ecdsa), (&["*.b.test"], ecdsa), (&["x.b.test"], ecdsa)]);
        let chosen = |name| resolver.choose(name, ANY).expect("some");
        assert!(Arc::ptr_eq(&chosen(Some("A.test")), &keys[0]));
        assert!(Arc::ptr_eq(&chosen(Some("y.b.test")), &keys[1]));
        assert!(Arc::ptr_eq(&chosen(Some("x.b.test")), &keys[2]));
        assert!(Arc::ptr_eq(&chosen(Some("z.y.b.test")), &keys[0]), "a wildcard stands for one label");
        assert!(Arc::ptr_eq(&chosen(Some("b.test")), &keys[0]));
        assert!(Arc::ptr_eq(&chosen(None), &keys[0]));
    }

    #[test]
    fn ecdsa_and_rsa_of_one_name_are_chosen_by_what_the_client_verifies() {
        let (resolver, keys) =
            resolver(&[(&["a.test"], &rcgen::PKCS_RSA_SHA256), (&["a.test"], &rcgen::PKCS_ECDSA_P256_SHA256)]);
        assert!(Arc::ptr_eq(&resolver.choose(Some("a.test"), ANY).expect("some"), &keys[1]));
        assert!(Arc::ptr_eq(&resolver.choose(Some("a.test"), RSA).expect("some"), &keys[0]));
        assert!(Arc::ptr_eq(&resolver.choose(None, RSA).expect("some"), &keys[0]));
        assert!(Arc::ptr_eq(&resolver.choose(None, ANY).expect("some"), &keys[1]));
    }

    #[test]
    fn without_a_certificate_there_is_no_resolver() {
        assert!(Resolver::new(std::iter::empty()).is_none());
        assert!(testing::load(&[]).is_err());
    }
}
