//! OCSP answers (RFC 6960): asked for, read, verified. What is not good, current and signed is no staple.
//!
//!   leaf + issuer ─▶ request ─▶ (responder, elsewhere) ─▶ DER ─▶ certificate id, status, times, signature ─▶ Staple
//!
//! This module knows no file and no socket; `control/staples.rs` does.

use super::der::{
    self, ENUMERATED, GENERALIZED_TIME, INTEGER, NULL, OCTET_STRING, OID, Reader, SEQUENCE, Signed, context,
};
use super::x509::Seen;
use aws_lc_rs::digest::{Algorithm, SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use rustls::pki_types::CertificateDer;

const SHA1_OID: &[u8] = &[0x2b, 0x0e, 0x03, 0x02, 0x1a];
const SHA256_OID: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01];
const BASIC_OID: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x30, 0x01, 0x01];
/// The body of certStatus is skipped; its tag says all.
const GOOD: u8 = 0x80;
const REVOKED: u8 = 0xa1;
/// An answer without nextUpdate is used for so long.
const WITHOUT_NEXT_UPDATE_SECONDS: u64 = 3600;
/// What a responder's clock may be ahead of ours.
const CLOCK_SECONDS: u64 = 300;
/// An answer is renewed at this age at the latest: half of what one of a public authority may last (Baseline
/// Requirements, section 4.9.10).
const RENEWAL_MAX_SECONDS: u64 = 5 * 86_400;

/// An answer that may be stapled, until it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staple {
    pub der: Vec<u8>,
    /// Both in seconds since 1970.
    pub this_update: u64,
    pub next_update: u64,
}

impl Staple {
    /// By which the newer of two is known: when they end, then when they were made.
    pub fn times(&self) -> (u64, u64) {
        (self.next_update, self.this_update)
    }

    /// It should be renewed from here on.
    pub fn half_life(&self) -> u64 {
        let latest = self.this_update.saturating_add(RENEWAL_MAX_SECONDS);
        u64::midpoint(self.this_update, self.next_update).min(latest)
    }
}

/// Why an answer is no staple.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoStaple {
    #[error("it is no OCSP answer")]
    Unreadable,
    #[error("the responder refuses (status {0})")]
    Status(u8),
    #[error("it is about another certificate")]
    OtherCertificate,
    #[error("the certificate is REVOKED: replace it now")]
    Revoked,
    #[error("the responder does not know the certificate")]
    Unknown,
    #[error("it is not signed by the certificate's issuer, or by one whom the issuer lets")]
    Signature,
    #[error("it has expired")]
    Expired,
    #[error("its time has not come; is the clock right?")]
    Early,
}

/// `CertID` by SHA-1, which every responder takes.
fn certificate_id(leaf: &Seen, issuer: &Seen) -> Option<Vec<u8>> {
    let hash = |of: &[u8]| der::write(OCTET_STRING, &[digest(&SHA1_FOR_LEGACY_USE_ONLY, of).as_ref()]);
    let (_, key) = der::key_parts(&issuer.key_info)?;
    let algorithm = der::write(SEQUENCE, &[&der::write(OID, &[SHA1_OID]), &[NULL, 0]]);
    let serial = der::write(INTEGER, &[&leaf.serial]);
    Some(der::write(SEQUENCE, &[&algorithm, &hash(&issuer.subject), &hash(key), &serial]))
}

/// The question for one certificate.
pub fn request(leaf: &Seen, issuer: &Seen) -> Option<Vec<u8>> {
    let id = certificate_id(leaf, issuer)?;
    Some([SEQUENCE; 4].iter().fold(id, |inner, tag| der::write(*tag, &[&inner])))
}

/// Reads and verifies an answer about `leaf`, at `now` (seconds since 1970).
///
/// # Errors
/// Why it is no staple.
pub fn verify(answer: &[u8], leaf: &Seen, issuer: &Seen, now: u64) -> Result<Staple, NoStaple> {
    let basic = basic(answer)?;
    let signed = Signed::read(basic).ok_or(NoStaple::Unreadable)?;
    let single = find(&signed, leaf, issuer)?;
    if !is_signed(&signed, issuer) {
        return Err(NoStaple::Signature);
    }
    match single.status {
        GOOD => {}
        REVOKED => return Err(NoStaple::Revoked),
        _ => return Err(NoStaple::Unknown),
    }
    if single.this_update > now + CLOCK_SECONDS {
        return Err(NoStaple::Early);
    }
    let next_update = single.next_update.unwrap_or(single.this_update.saturating_add(WITHOUT_NEXT_UPDATE_SECONDS));
    // What is said of a certificate is good for nothing once that has ended.
    let next_update = next_update.min(u64::try_from(leaf.not_after.timestamp()).unwrap_or(0));
    if now >= next_update {
        return Err(NoStaple::Expired);
    }
    Ok(Staple { der: answer.to_vec(), this_update: single.this_update, next_update })
}

/// The BasicOCSPResponse inside.
fn basic(answer: &[u8]) -> Result<&[u8], NoStaple> {
    let mut inside = Reader(answer).next(SEQUENCE).ok_or(NoStaple::Unreadable)?.inside();
    match inside.next(ENUMERATED).map(|status| status.body) {
        Some([0]) => {}
        Some([status]) => return Err(NoStaple::Status(*status)),
        Some(_) | None => return Err(NoStaple::Unreadable),
    }
    let bytes = || {
        let mut inside = inside.next(context(0))?.inside().next(SEQUENCE)?.inside();
        (inside.next(OID)?.body == BASIC_OID).then_some(())?;
        Some(inside.next(OCTET_STRING)?.body)
    };
    let mut bytes = bytes;
    bytes().ok_or(NoStaple::Unreadable)
}

struct Single {
    status: u8,
    this_update: u64,
    next_update: Option<u64>,
}

/// The answer about this certificate.
fn find(signed: &Signed<'_>, leaf: &Seen, issuer: &Seen) -> Result<Single, NoStaple> {
    let responses = || {
        let mut data = signed.message.inside();
        data.optional(context(0));
        // responderID: byName or byKey; the signature says who it was.
        data.any()?;
        data.next(GENERALIZED_TIME)?;
        Some(data.next(SEQUENCE)?.inside())
    };
    let mut responses = responses().ok_or(NoStaple::Unreadable)?;
    while !responses.is_empty() {
        let mut single = responses.next(SEQUENCE).ok_or(NoStaple::Unreadable)?.inside();
        let id = single.next(SEQUENCE).ok_or(NoStaple::Unreadable)?;
        if is_about(id.inside(), leaf, issuer).ok_or(NoStaple::Unreadable)? {
            return read_single(single).ok_or(NoStaple::Unreadable);
        }
    }
    Err(NoStaple::OtherCertificate)
}

fn is_about(mut id: Reader<'_>, leaf: &Seen, issuer: &Seen) -> Option<bool> {
    let algorithm = id.next(SEQUENCE)?.inside().next(OID)?.body;
    let algorithm: &'static Algorithm = match algorithm {
        SHA1_OID => &SHA1_FOR_LEGACY_USE_ONLY,
        SHA256_OID => &SHA256,
        _ => return Some(false),
    };
    let (name, key) = (id.next(OCTET_STRING)?.body, id.next(OCTET_STRING)?.body);
    let serial = id.next(INTEGER)?.body;
    let (_, issuer_key) = der::key_parts(&issuer.key_info)?;
    Some(
        digest(algorithm, &issuer.subject).as_ref() == name
            && digest(algorithm, issuer_key).as_ref() == key
            && serial == leaf.serial,
    )
}

fn read_single(mut single: Reader<'_>) -> Option<Single> {
    let status = single.any()?.tag;
    let this_update = time(single.next(GENERALIZED_TIME)?.body)?;
    let next_update = match single.optional(context(0)) {
        Some(next) => Some(time(next.inside().next(GENERALIZED_TIME)?.body)?),
        None => None,
    };
    Some(Single { status, this_update, next_update })
}

/// By the issuer itself, or by a certificate that it issued for this.
fn is_signed(signed: &Signed<'_>, issuer: &Seen) -> bool {
    if signed.is_signed_by(&issuer.key_info) {
        return true;
    }
    let mut rest = signed.rest;
    let list = rest.next(context(0)).and_then(|list| list.inside().next(SEQUENCE));
    let mut list = list.map_or(Reader(&[]), |list| list.inside());
    while let Some(certificate) = list.next(SEQUENCE) {
        let Ok(delegate) = Seen::read(&CertificateDer::from(certificate.whole)) else { continue };
        if delegate.signs_ocsp
            && delegate.in_force().is_ok()
            && delegate.issuer == issuer.subject
            && delegate.is_signed_by(issuer)
            && signed.is_signed_by(&delegate.key_info)
        {
            return true;
        }
    }
    false
}

/// `YYYYMMDDHHMMSSZ` (RFC 5280 section 4.1.2.5.2) as seconds since 1970.
fn time(text: &[u8]) -> Option<u64> {
    let (b'Z', digits) = text.split_last()? else { return None };
    if digits.len() != 14 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = |from: usize, to: usize| digits[from..to].iter().fold(0, |n, d| n * 10 + i64::from(d - b'0'));
    let (year, month, day) = (number(0, 4), number(4, 6), number(6, 8));
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Days since 1970 in the proleptic Gregorian calendar, years beginning in March.
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = year * 365 + year / 4 - year / 100 + year / 400 + day_of_year - 719_468;
    let seconds = days * 86_400 + number(8, 10) * 3600 + number(10, 12) * 60 + number(12, 14);
    u64::try_from(seconds).ok()
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::tls::der::BIT_STRING;
    use rcgen::{CertificateParams, Issuer, KeyPair, SigningKey as _};

    /// An authority, and one that it may let answer.
    pub(crate) struct Party {
        pub(crate) key: KeyPair,
        pub(crate) parameters: CertificateParams,
        pub(crate) certificate: rcgen::Certificate,
    }

    impl Party {
        /// Each has the name of every other.
        pub(crate) fn authority() -> Self {
            let mut parameters = CertificateParams::default();
            parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            let key = KeyPair::generate().expect("the default kind");
            Self { certificate: parameters.self_signed(&key).expect("its own key"), parameters, key }
        }

        pub(crate) fn issue(&self, mut parameters: CertificateParams) -> Self {
            parameters.distinguished_name.push(rcgen::DnType::CommonName, "a leaf");
            let key = KeyPair::generate().expect("the default kind");
            let issuer = Issuer::from_params(&self.parameters, &self.key);
            Self { certificate: parameters.signed_by(&key, &issuer).expect("a CA's key"), parameters, key }
        }

        pub(crate) fn delegate(&self) -> Self {
            let mut parameters = CertificateParams::default();
            parameters.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::OcspSigning];
            self.issue(parameters)
        }

        pub(crate) fn seen(&self) -> Seen {
            Seen::read(self.certificate.der()).expect("a certificate")
        }
    }

    fn written(time: u64) -> Vec<u8> {
        let time = rcgen::date_time_ymd(1970, 1, 1) + std::time::Duration::from_secs(time);
        let date = format!("{:04}{:02}{:02}", time.year(), u8::from(time.month()), time.day());
        let text = format!("{date}{:02}{:02}{:02}Z", time.hour(), time.minute(), time.second());
        der::write(GENERALIZED_TIME, &[text.as_bytes()])
    }

    /// That the leaf is good from the one time to the other, signed by this key (RFC 6960 section 4.2.1).
    pub(crate) fn good(leaf: &Seen, issuer: &Seen, times: [u64; 2], key: &KeyPair, delegate: Option<&[u8]>) -> Vec<u8> {
        const ECDSA_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
        let id = certificate_id(leaf, issuer).expect("a key");
        let next = der::write(context(0), &[&written(times[1])]);
        let single = der::write(SEQUENCE, &[&id, &[GOOD, 0], &written(times[0]), &next]);
        let responder = der::write(context(2), &[&der::write(OCTET_STRING, &[b"its key"])]);
        let data = der::write(SEQUENCE, &[&responder, &written(times[0]), &der::write(SEQUENCE, &[&single])]);
        let algorithm = der::write(SEQUENCE, &[&der::write(OID, &[ECDSA_SHA256])]);
        let signature = der::write(BIT_STRING, &[&[0], &key.sign(&data).expect("signed")]);
        let list = delegate.map(|one| der::write(context(0), &[&der::write(SEQUENCE, &[one])])).unwrap_or_default();
        let basic = der::write(SEQUENCE, &[&data, &algorithm, &signature, &list]);
        let bytes = der::write(SEQUENCE, &[&der::write(OID, &[BASIC_OID]), &der::write(OCTET_STRING, &[&basic])]);
        der::write(SEQUENCE, &[&der::write(ENUMERATED, &[&[0]]), &der::write(context(0), &[&bytes])])
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Party, good};
    use super::*;
    use rcgen::CertificateParams;

    const NOW: u64 = 1_800_000_000;

    /// The same certificate as if it were signed by SHA-1, which is not verified, and by nobody.
    fn unsigned(certificate: &[u8]) -> Vec<u8> {
        const RSA_SHA1: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x05];
        let algorithm = der::write(SEQUENCE, &[&der::write(OID, &[RSA_SHA1]), &[NULL, 0]]);
        let mut inside = Signed::read(certificate).expect("a certificate").message.inside();
        let [version, serial, _] = [(); 3].map(|()| inside.any().expect("it has one").whole);
        let message = der::write(SEQUENCE, &[version, serial, &algorithm, inside.0]);
        der::write(SEQUENCE, &[&message, &algorithm, &der::write(der::BIT_STRING, &[&[0; 257]])])
    }

    #[test]
    fn a_delegate_is_one_whose_certificate_the_issuer_has_signed() {
        let (authority, other) = (Party::authority(), Party::authority());
        let (leaf, issuer) = (authority.issue(CertificateParams::default()).seen(), authority.seen());
        let by = |delegate: &Party, certificate: &[u8]| {
            let answer = good(&leaf, &issuer, [NOW - 60, NOW + 60], &delegate.key, Some(certificate));
            verify(&answer, &leaf, &issuer, NOW).map(|staple| staple.next_update)
        };
        let (genuine, foreign) = (authority.delegate(), other.delegate());
        assert_eq!(by(&genuine, genuine.certificate.der()), Ok(NOW + 60));
        assert_eq!(by(&foreign, foreign.certificate.der()), Err(NoStaple::Signature));
        let forged = unsigned(foreign.certificate.der());
        let seen = Seen::read(&CertificateDer::from(forged.as_slice())).expect("a certificate");
        assert!(seen.signs_ocsp && seen.issuer == issuer.subject);
        assert_eq!(by(&foreign, &forged), Err(NoStaple::Signature));
        // One that is for something else.
        let leaf_too = authority.issue(CertificateParams::default());
        assert_eq!(by(&leaf_too, leaf_too.certificate.der()), Err(NoStaple::Signature));
    }

    #[test]
    fn an_answer_for_decades_is_renewed_within_days_and_ends_with_its_certificate() {
        const DECADES: u64 = 4_000_000_000;
        let authority = Party::authority();
        let mut parameters = CertificateParams::default();
        parameters.not_after = rcgen::date_time_ymd(2030, 1, 1);
        let (leaf, issuer) = (authority.issue(parameters).seen(), authority.seen());
        let answer = good(&leaf, &issuer, [NOW, DECADES], &authority.key, None);
        let staple = verify(&answer, &leaf, &issuer, NOW).expect("a good one");
        assert_eq!(staple.half_life(), NOW + RENEWAL_MAX_SECONDS);
        assert_eq!(Some(staple.next_update), time(b"20300101000000Z"));
        assert_eq!(verify(&answer, &leaf, &issuer, staple.next_update), Err(NoStaple::Expired));
        let answer = good(&leaf, &issuer, [NOW, NOW + 100], &authority.key, None);
        assert_eq!(verify(&answer, &leaf, &issuer, NOW).map(|staple| staple.half_life()), Ok(NOW + 50));
    }

    #[test]
    fn times_are_read() {
        assert_eq!(time(b"19700101000000Z"), Some(0));
        assert_eq!(time(b"20240229123456Z"), Some(1_709_210_096));
        assert_eq!(time(b"20991231235959Z"), Some(4_102_444_799));
        for odd in [&b"20240229123456"[..], b"2024022912345Z", b"20241329000000Z", b"2024-0229123456Z", b""] {
            assert_eq!(time(odd), None);
        }
    }

    #[test]
    fn what_is_no_answer_is_none() {
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate = rcgen::CertificateParams::new(vec!["a.test".to_owned()])
            .expect("a name")
            .self_signed(&key)
            .expect("its own key");
        let seen = Seen::read(certificate.der()).expect("a certificate");
        assert_eq!(verify(&[0x30, 3, 0x0a, 1, 6], &seen, &seen, 0), Err(NoStaple::Status(6)));
        assert_eq!(verify(b"", &seen, &seen, 0), Err(NoStaple::Unreadable));
        let request = request(&seen, &seen).expect("a request");
        assert_eq!(verify(&request, &seen, &seen, 0), Err(NoStaple::Unreadable));
    }
}
