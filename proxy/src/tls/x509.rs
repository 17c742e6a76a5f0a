//! One certificate, read for what serving and grading ask of it.

use super::der::{Reader, SEQUENCE, Signed};
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{ASN1Time, FromDer, GeneralName, ParsedExtension, X509Certificate};
use x509_parser::public_key::PublicKey;

/// TLS feature (RFC 7633), and within it `status_request`: `SEQUENCE { INTEGER 5 }`.
const TLS_FEATURE: &str = "1.3.6.1.5.5.7.1.24";
const STATUS_REQUEST: [u8; 3] = [2, 1, 5];

/// A public key's kind and bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    Rsa(u32),
    Ec(u32),
    Ed25519,
    Other,
}

impl Key {
    /// The bits of an RSA key that is as strong, by the rating guide (NIST SP 800-57).
    pub fn as_rsa_bits(self) -> u32 {
        match self {
            Self::Rsa(bits) => bits,
            Self::Ec(bits) => ec_as_rsa_bits(bits),
            Self::Ed25519 => 3072,
            Self::Other => 0,
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rsa(bits) => write!(f, "RSA {bits}"),
            Self::Ec(bits) => write!(f, "ECDSA P-{bits}"),
            Self::Ed25519 => f.write_str("Ed25519"),
            Self::Other => f.write_str("of an unknown kind"),
        }
    }
}

pub fn ec_as_rsa_bits(bits: u32) -> u32 {
    match bits {
        0..160 => 512,
        160..224 => 1024,
        224..250 => 2048,
        250..384 => 3072,
        384..512 => 7680,
        512.. => 15360,
    }
}

/// The hash of a certificate's signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    Md5,
    Sha1,
    Strong,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Seen {
    /// DNS names in lower case, as SNI asks for them.
    pub names: Vec<String>,
    pub has_addresses: bool,
    pub key_info: Vec<u8>,
    pub key: Key,
    pub hash: Hash,
    pub is_authority: bool,
    pub not_before: ASN1Time,
    pub not_after: ASN1Time,
    pub subject: Vec<u8>,
    pub issuer: Vec<u8>,
    pub issuer_text: String,
    pub subject_text: String,
    pub serial: Vec<u8>,
    pub must_staple: bool,
    pub ocsp_responder: Option<String>,
    /// No extended key usage, or one that has serverAuth.
    pub may_serve: bool,
    pub signs_ocsp: bool,
    der: Vec<u8>,
}

impl Seen {
    /// # Errors
    /// It is no certificate.
    pub fn read(der: &CertificateDer<'_>) -> Result<Self, String> {
        let (behind, certificate) = X509Certificate::from_der(der).map_err(|e| e.to_string())?;
        // It would be sent as it is, and clients end the handshake on it.
        if !behind.is_empty() {
            return Err(format!("{} bytes follow the certificate", behind.len()));
        }
        // RFC 5280 section 4.1.1.2; the one outside is not signed, and clients hold it against the one inside.
        if certificate.signature_algorithm != certificate.tbs_certificate.signature {
            return Err("it names two different algorithms for its one signature".to_owned());
        }
        // Names and keys are compared and hashed by their bytes, and of one that is not well formed the parser gives a part.
        let is_whole = |part: &[u8]| Reader(part).next(SEQUENCE).is_some_and(|value| value.whole == part);
        if !is_whole(certificate.subject().as_raw()) || !is_whole(certificate.issuer().as_raw()) {
            return Err("its subject or its issuer is no sound name".to_owned());
        }
        if !is_whole(certificate.public_key().raw) {
            return Err("its public key is not well formed".to_owned());
        }
        let validity = certificate.validity();
        let (names, has_addresses) = names(&certificate);
        let usage = certificate.extended_key_usage().ok().flatten().map(|usage| usage.value);
        Ok(Self {
            names,
            has_addresses,
            key_info: certificate.public_key().raw.to_vec(),
            key: key(&certificate),
            hash: hash(&certificate.signature_algorithm.algorithm.to_id_string()),
            is_authority: certificate.is_ca(),
            not_before: validity.not_before,
            not_after: validity.not_after,
            subject: certificate.subject().as_raw().to_vec(),
            issuer: certificate.issuer().as_raw().to_vec(),
            issuer_text: certificate.issuer().to_string(),
            subject_text: certificate.subject().to_string(),
            serial: certificate.tbs_certificate.raw_serial().to_vec(),
            must_staple: certificate.extensions().iter().any(|extension| {
                extension.oid.to_id_string() == TLS_FEATURE && extension.value.windows(3).any(|w| w == STATUS_REQUEST)
            }),
            ocsp_responder: responder(&certificate),
            may_serve: usage.is_none_or(|usage| usage.server_auth || usage.any),
            signs_ocsp: usage.is_some_and(|usage| usage.ocsp_signing),
            der: der.to_vec(),
        })
    }

    pub fn is_self_issued(&self) -> bool {
        self.subject == self.issuer
    }

    /// By name, and by signature where it is of a kind that is verified at all: enough for the order of a chain, whose
    /// strength is judged beside it, and never for trust.
    pub fn is_issued_by(&self, other: &Self) -> bool {
        self.issuer == other.subject && (self.hash != Hash::Strong || self.is_signed_by(other))
    }

    /// By signature, which is of a kind that is trusted.
    pub fn is_signed_by(&self, other: &Self) -> bool {
        Signed::read(&self.der).is_some_and(|signed| signed.is_signed_by(&other.key_info))
    }

    /// # Errors
    /// It has expired, or its time has not come.
    pub fn in_force(&self) -> Result<(), String> {
        let now = ASN1Time::now();
        if now > self.not_after {
            return Err(format!("this certificate expired on {}", self.not_after));
        }
        if now < self.not_before {
            return Err(format!("this certificate is not valid before {}; is the clock right?", self.not_before));
        }
        Ok(())
    }

    /// The first name, or what there is.
    pub fn name(&self) -> &str {
        self.names.first().map_or(&self.subject_text, String::as_str)
    }
}

fn names(certificate: &X509Certificate<'_>) -> (Vec<String>, bool) {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else { return (Vec::new(), false) };
    let mut addresses = false;
    let mut names = Vec::new();
    for name in &extension.value.general_names {
        match name {
            GeneralName::DNSName(name) => names.push(name.to_ascii_lowercase()),
            GeneralName::IPAddress(_) => addresses = true,
            // SNI carries DNS names only (RFC 6066 section 3). The enum is not ours.
            _ => {}
        }
    }
    (names, addresses)
}

fn key(certificate: &X509Certificate<'_>) -> Key {
    let bits = |bits: usize| u32::try_from(bits).unwrap_or(0);
    let info = certificate.public_key();
    match info.parsed() {
        // The modulus without its sign byte.
        Ok(PublicKey::RSA(key)) => Key::Rsa(bits(key.key_size())),
        Ok(PublicKey::EC(point)) => Key::Ec(bits(point.key_size())),
        _ if info.algorithm.algorithm.to_id_string() == "1.3.101.112" => Key::Ed25519,
        Ok(_) | Err(_) => Key::Other,
    }
}

fn hash(algorithm: &str) -> Hash {
    match algorithm {
        "1.2.840.113549.1.1.2" | "1.2.840.113549.1.1.3" | "1.2.840.113549.1.1.4" => Hash::Md5,
        "1.2.840.113549.1.1.5" | "1.3.14.3.2.29" | "1.2.840.10045.4.1" | "1.2.840.10040.4.3" => Hash::Sha1,
        _ => Hash::Strong,
    }
}

/// The http address of the certificate's OCSP responder.
fn responder(certificate: &X509Certificate<'_>) -> Option<String> {
    certificate.extensions().iter().find_map(|extension| {
        let ParsedExtension::AuthorityInfoAccess(access) = extension.parsed_extension() else { return None };
        access.accessdescs.iter().find_map(|description| {
            let is_ocsp = description.access_method.to_id_string() == "1.3.6.1.5.5.7.48.1";
            match &description.access_location {
                GeneralName::URI(uri) if is_ocsp && uri.starts_with("http://") => Some((*uri).to_owned()),
                _ => None,
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::certificates::testing;

    #[test]
    fn a_certificate_ends_where_it_ends() {
        let (certificate, _) = testing::made(&["a.test"], &rcgen::PKCS_ECDSA_P256_SHA256);
        let mut der = certificate.der().to_vec();
        assert!(Seen::read(&CertificateDer::from(der.as_slice())).is_ok());
        der.push(0);
        let said = Seen::read(&CertificateDer::from(der)).err();
        assert_eq!(said.as_deref(), Some("1 bytes follow the certificate"));
    }

    #[test]
    fn a_certificate_is_signed_by_the_algorithm_that_it_names_within() {
        const ECDSA_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
        let (certificate, _) = testing::made(&["a.test"], &rcgen::PKCS_ECDSA_P256_SHA256);
        let mut der = certificate.der().to_vec();
        let outside = der.windows(ECDSA_SHA256.len()).rposition(|w| w == ECDSA_SHA256).expect("its algorithm");
        der[outside + ECDSA_SHA256.len() - 1] = 3;
        let said = Seen::read(&CertificateDer::from(der)).err();
        assert_eq!(said.as_deref(), Some("it names two different algorithms for its one signature"));
    }

    #[test]
    fn a_name_or_a_key_that_is_cut_short_within_is_none() {
        // Each behind the length that is made smaller: of what holds type and value, and of the bits of the point.
        const COMMON_NAME: &[u8] = &[6, 3, 0x55, 4, 3];
        const POINT: &[u8] = &[0, 4];
        let (certificate, _) = testing::made(&["a.test"], &rcgen::PKCS_ECDSA_P256_SHA256);
        for (bytes, why) in
            [(COMMON_NAME, "its subject or its issuer is no sound name"), (POINT, "its public key is not well formed")]
        {
            let mut der = certificate.der().to_vec();
            // 0x42 bytes: the encoding of a point on P-256.
            let has_length = |at: &usize| bytes != POINT || der[at - 2..*at] == [3, 0x42];
            let mut all = (2..der.len() - bytes.len()).filter(|at| der[*at..].starts_with(bytes));
            let within = all.find(has_length).expect("it has one");
            der[within - 1] -= 1;
            let said = Seen::read(&CertificateDer::from(der)).err();
            assert_eq!(said.as_deref(), Some(why));
        }
    }
}
