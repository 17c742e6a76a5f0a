//! The key schedule's HKDF (RFC 5869) with HMAC keys prepared once, and its hash, on the stack.
//!
//!   a secret ─▶ two blocks hashed ─▶ label, label, label: two more blocks for each
//!
//! aws-lc's HKDF hashes the key anew for each label, and TLS 1.3 derives two to five from most of its secrets: by the
//! schedule of RFC 8446 section 7.1 a handshake hashes about 96 blocks for its labels that way, and 74 this way. Its HMAC and
//! its digests allocate a context for each of about forty calls besides, so both are RustCrypto's here: 3 % less CPU for a
//! handshake. They erase their state when dropped. A FIPS build keeps aws-lc's own, which is the module's validated service.

use hmac::{KeyInit, Mac};
use rustls::crypto::CipherSuiteCommon;
use rustls::crypto::hash::{Context, Hash, HashAlgorithm, Output};
use rustls::crypto::hmac::{Hmac, Key, Tag};
use rustls::crypto::tls13::{Hkdf, HkdfUsingHmac};
use rustls::{CipherSuite, SupportedCipherSuite, Tls13CipherSuite};
use sha2::{Digest, Sha256, Sha384};
use std::marker::PhantomData;
use std::sync::LazyLock;

/// A function of SHA-2, as hash and in HMAC.
struct Over<D, M>(HashAlgorithm, PhantomData<fn() -> (D, M)>);
struct Prepared<M>(M);
struct Transcript<D>(D);

impl<D: Digest, M: Mac + KeyInit + Clone + Send + Sync + 'static> Hmac for Over<D, M> {
    fn with_key(&self, key: &[u8]) -> Box<dyn Key> {
        Box::new(Prepared(<M as KeyInit>::new_from_slice(key).expect("a key of HMAC has any length")))
    }

    fn hash_output_len(&self) -> usize {
        <D as Digest>::output_size()
    }
}

impl<M: Mac + Clone + Send + Sync> Key for Prepared<M> {
    fn sign_concat(&self, first: &[u8], middle: &[&[u8]], last: &[u8]) -> Tag {
        let mut mac = self.0.clone();
        mac.update(first);
        middle.iter().for_each(|part| mac.update(part));
        mac.update(last);
        Tag::new(&mac.finalize().into_bytes())
    }

    fn tag_len(&self) -> usize {
        M::output_size()
    }
}

impl<D: Digest + Clone + Send + Sync + 'static, M> Hash for Over<D, M> {
    fn start(&self) -> Box<dyn Context> {
        Box::new(Transcript(D::new()))
    }

    fn hash(&self, data: &[u8]) -> Output {
        Output::new(&D::digest(data))
    }

    fn output_len(&self) -> usize {
        <D as Digest>::output_size()
    }

    fn algorithm(&self) -> HashAlgorithm {
        self.0
    }
}

impl<D: Digest + Clone + Send + Sync + 'static> Context for Transcript<D> {
    fn fork_finish(&self) -> Output {
        Output::new(&self.0.clone().finalize())
    }

    fn fork(&self) -> Box<dyn Context> {
        Box::new(Self(self.0.clone()))
    }

    fn finish(self: Box<Self>) -> Output {
        Output::new(&self.0.finalize())
    }

    fn update(&mut self, data: &[u8]) {
        Digest::update(&mut self.0, data);
    }
}

static SHA256: Over<Sha256, hmac::Hmac<Sha256>> = Over(HashAlgorithm::SHA256, PhantomData);
static SHA384: Over<Sha384, hmac::Hmac<Sha384>> = Over(HashAlgorithm::SHA384, PhantomData);
static HKDF_SHA256: HkdfUsingHmac<'_> = HkdfUsingHmac(&SHA256);
static HKDF_SHA384: HkdfUsingHmac<'_> = HkdfUsingHmac(&SHA384);

/// The suites of TLS 1.3 with this hash and HKDF.
static SUITES: LazyLock<Vec<Tls13CipherSuite>> = LazyLock::new(|| {
    let all = rustls::crypto::aws_lc_rs::ALL_CIPHER_SUITES.iter().filter_map(SupportedCipherSuite::tls13);
    let ours = all.map(|suite| {
        let (hash_provider, hkdf_provider): (&dyn Hash, &dyn Hkdf) = match suite.common.suite {
            CipherSuite::TLS13_AES_256_GCM_SHA384 => (&SHA384, &HKDF_SHA384),
            _ => (&SHA256, &HKDF_SHA256),
        };
        let common = CipherSuiteCommon { hash_provider, ..suite.common };
        Tls13CipherSuite { common, hkdf_provider, aead_alg: suite.aead_alg, quic: None }
    });
    ours.collect()
});

/// The same suite; what one of TLS 1.3 hashes and derives is hashed and derived here.
pub fn prepared(suite: SupportedCipherSuite) -> SupportedCipherSuite {
    if cfg!(feature = "fips") {
        return suite;
    }
    SUITES.iter().find(|ours| ours.common.suite == suite.suite()).map_or(suite, SupportedCipherSuite::Tls13)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::crypto::tls13::OkmBlock;

    #[test]
    fn derives_what_the_provider_derives() {
        for theirs in rustls::crypto::aws_lc_rs::ALL_CIPHER_SUITES.iter().filter_map(SupportedCipherSuite::tls13) {
            let ours = prepared(SupportedCipherSuite::Tls13(theirs));
            let ours = ours.tls13().expect("as before");
            let secret = OkmBlock::new(&[0x17; 48][..theirs.common.hash_provider.output_len()]);
            let all = |suite: &Tls13CipherSuite| {
                let hkdf = suite.hkdf_provider;
                let expanders = [
                    hkdf.extract_from_zero_ikm(None),
                    hkdf.extract_from_zero_ikm(Some(&[3; 48])),
                    hkdf.extract_from_secret(Some(&[4; 20]), &[5; 64]),
                    hkdf.extract_from_secret(None, &[6; 32]),
                    hkdf.expander_for_okm(&secret),
                ];
                let mut transcript = suite.common.hash_provider.start();
                transcript.update(&[7; 200]);
                let mut fork = transcript.fork();
                fork.update(b"more");
                let mut out = vec![
                    hkdf.hmac_sign(&secret, b"finished").as_ref().to_vec(),
                    suite.common.hash_provider.hash(b"").as_ref().to_vec(),
                    transcript.fork_finish().as_ref().to_vec(),
                    fork.finish().as_ref().to_vec(),
                    transcript.finish().as_ref().to_vec(),
                ];
                for expander in expanders {
                    out.push(expander.expand_block(&[b"a", b"label"]).as_ref().to_vec());
                    let mut long = vec![0; 100];
                    expander.expand_slice(&[b"b", b"", b"c"], &mut long).expect("not too long");
                    out.push(long);
                }
                out
            };
            assert_eq!(all(ours), all(theirs), "{:?}", theirs.common.suite);
        }
    }
}
