//! OCSP answers: none that was not signed is ever taken, and what is taken is good, current, and about this certificate.
//!
//!   an answer (begins with 0x30) ─▶ verify: good only if somebody signed these bytes when the corpus was made
//!   anything else: mode byte, ResponseData ─▶ signed here ─▶ verify: what a signature would keep hidden from the fuzzer
#![no_main]

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use libfuzzer_sys::fuzz_target;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use std::sync::OnceLock;
use tlsplice::tls::der::{self, BIT_STRING, ENUMERATED, OCTET_STRING, OID, Reader, SEQUENCE, Signed, context};
use tlsplice::tls::ocsp::{self, NoStaple};
use tlsplice::tls::x509::Seen;

/// In 2027, while the answers of the corpus are current.
const NOW: u64 = 1_800_000_000;
const CLOCK_SECONDS: u64 = 300;
const BASIC: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x30, 0x01, 0x01];
const ECDSA_SHA256: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
/// What the authority and its responder have signed.
const ANSWERS: [&[u8]; 3] = [
    include_bytes!("../seeds/good.ocsp"),
    include_bytes!("../seeds/good-by-responder.ocsp"),
    include_bytes!("../seeds/good-sha256.ocsp"),
];

struct Parties {
    authority: Seen,
    leaf: Seen,
    responder: Vec<u8>,
    keys: [EcdsaKeyPair; 2],
}

fn parties() -> &'static Parties {
    static PARTIES: OnceLock<Parties> = OnceLock::new();
    PARTIES.get_or_init(|| {
        let der = |pem: &[u8]| CertificateDer::from_pem_slice(pem).expect("in the tree");
        let seen = |pem: &[u8]| Seen::read(&der(pem)).expect("a certificate");
        let key = |pem: &[u8]| {
            let key = PrivatePkcs8KeyDer::from_pem_slice(pem).expect("in the tree");
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, key.secret_pkcs8_der()).expect("a key")
        };
        Parties {
            authority: seen(include_bytes!("../seeds/authority.pem")),
            leaf: seen(include_bytes!("../seeds/leaf.pem")),
            responder: der(include_bytes!("../seeds/responder.pem")).to_vec(),
            keys: [key(include_bytes!("../seeds/authority.key")), key(include_bytes!("../seeds/responder.key"))],
        }
    })
}

fuzz_target!(|input: &[u8]| {
    let Parties { authority, leaf, responder, keys } = parties();
    if input.first() == Some(&SEQUENCE) {
        if judged(input) {
            let taken = message(input).expect("what is taken was read");
            assert!(ANSWERS.iter().any(|known| message(known) == Some(taken)), "nobody has signed this");
        }
        return;
    }
    let Some((&mode, data)) = input.split_first() else { return };
    let by_responder = mode & 1 != 0;
    let data = der::write(SEQUENCE, &[data]);
    let signature = keys[usize::from(by_responder)].sign(&SystemRandom::new(), &data).expect("signed");
    let wrapped = answer(&data, signature.as_ref(), if by_responder { responder } else { &[] });
    judged(&wrapped);
    // The certificate that the responder answered about is not its issuer, nor the other way round.
    assert!(ocsp::verify(&wrapped, authority, leaf, NOW).is_err());
    let mut other = leaf.clone();
    other.serial.push(0);
    assert!(ocsp::verify(&wrapped, &other, authority, NOW).is_err() || message_has(&data, &other.serial));
    // Not by the issuer, and by no certificate that came along.
    let foreign = answer(&data, signature.as_ref(), &[]);
    assert!(!by_responder || ocsp::verify(&foreign, leaf, authority, NOW).is_err());
});

/// Whether it is taken. Then its times hold, and hold no longer when it ends.
fn judged(bytes: &[u8]) -> bool {
    let Parties { authority, leaf, .. } = parties();
    let Ok(staple) = ocsp::verify(bytes, leaf, authority, NOW) else { return false };
    assert_eq!(staple.der, bytes);
    assert!(staple.this_update <= NOW + CLOCK_SECONDS && NOW < staple.next_update);
    assert!((staple.this_update.min(staple.next_update)..=staple.next_update).contains(&staple.half_life()));
    assert_eq!(ocsp::verify(bytes, leaf, authority, staple.next_update), Err(NoStaple::Expired));
    true
}

fn message_has(data: &[u8], serial: &[u8]) -> bool {
    data.windows(serial.len()).any(|window| window == serial)
}

/// OCSPResponse (RFC 6960 section 4.2.1).
fn answer(data: &[u8], signature: &[u8], certificate: &[u8]) -> Vec<u8> {
    let list = match certificate {
        [] => Vec::new(),
        certificate => der::write(context(0), &[&der::write(SEQUENCE, &[certificate])]),
    };
    let algorithm = der::write(SEQUENCE, &[ECDSA_SHA256]);
    let basic = der::write(SEQUENCE, &[data, &algorithm, &der::write(BIT_STRING, &[&[0], signature]), &list]);
    let bytes = der::write(SEQUENCE, &[&der::write(OID, &[BASIC]), &der::write(OCTET_STRING, &[&basic])]);
    der::write(SEQUENCE, &[&der::write(ENUMERATED, &[&[0]]), &der::write(context(0), &[&bytes])])
}

/// What the signature of an answer is over.
fn message(answer: &[u8]) -> Option<&[u8]> {
    let mut inside = Reader(answer).next(SEQUENCE)?.inside();
    inside.next(ENUMERATED)?;
    let mut inside = inside.next(context(0))?.inside().next(SEQUENCE)?.inside();
    inside.next(OID)?;
    Some(Signed::read(inside.next(OCTET_STRING)?.body)?.message.whole)
}
