//! The key schedule's HKDF (RFC 5869), as aws-lc's HMAC with the key prepared once.
//!
//!   a secret ─▶ two blocks hashed ─▶ label, label, label: two more blocks for each
//!
//! aws-lc's own HKDF hashes the key anew for each label, and TLS 1.3 derives two to five from most of its secrets: by the
//! schedule of RFC 8446 section 7.1 a handshake hashes about 96 blocks for its labels that way, and 74 this way. A FIPS build keeps
//! aws-lc's own, which is the module's validated service.

use aws_lc_rs::hmac;
use rustls::crypto::hmac::{Hmac, Key, Tag};
use rustls::crypto::tls13::HkdfUsingHmac;
use rustls::{CipherSuite, SupportedCipherSuite, Tls13CipherSuite};
use std::sync::LazyLock;

struct Prf(&'static hmac::Algorithm);
struct Prepared(hmac::Key);

impl Hmac for Prf {
    fn with_key(&self, key: &[u8]) -> Box<dyn Key> {
        Box::new(Prepared(hmac::Key::new(*self.0, key)))
    }

    fn hash_output_len(&self) -> usize {
        self.0.digest_algorithm().output_len()
    }
}

impl Key for Prepared {
    fn sign_concat(&self, first: &[u8], middle: &[&[u8]], last: &[u8]) -> Tag {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(first);
        middle.iter().for_each(|part| context.update(part));
        context.update(last);
        Tag::new(context.sign().as_ref())
    }

    fn tag_len(&self) -> usize {
        self.0.algorithm().digest_algorithm().output_len()
    }
}

static SHA256: HkdfUsingHmac<'_> = HkdfUsingHmac(&Prf(&hmac::HMAC_SHA256));
static SHA384: HkdfUsingHmac<'_> = HkdfUsingHmac(&Prf(&hmac::HMAC_SHA384));

/// The suites of TLS 1.3 with this HKDF.
static SUITES: LazyLock<Vec<Tls13CipherSuite>> = LazyLock::new(|| {
    let all = rustls::crypto::aws_lc_rs::ALL_CIPHER_SUITES.iter().filter_map(SupportedCipherSuite::tls13);
    let ours = all.map(|suite| Tls13CipherSuite {
        common: rustls::crypto::CipherSuiteCommon { ..suite.common },
        hkdf_provider: match suite.common.suite {
            CipherSuite::TLS13_AES_256_GCM_SHA384 => &SHA384,
            _ => &SHA256,
        },
        aead_alg: suite.aead_alg,
        quic: None,
    });
    ours.collect()
});

/// The same suite, whose secrets are derived here if it is one of TLS 1.3.
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
                let mut out = vec![hkdf.hmac_sign(&secret, b"finished").as_ref().to_vec()];
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
