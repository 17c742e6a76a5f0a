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

/// An answer that may be stapled, until it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staple {
    pub der: Vec<u8>,
    /// Both in seconds since 1970.
    pub this_update: u64,
    pub next_update: u64,
}

impl Staple {
    /// It should be renewed from here on.
    pub fn half_life(&self) -> u64 {
        u64::midpoint(self.this_update, self.next_update)
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
            && delegate.is_issued_by(issuer)
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
mod tests {
    use super::*;

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
