//! The look at a ClientHello before rustls': neither how it is cut into records nor when its bytes come changes the verdict.
//!
//! The first byte is the size of a record, and whether names are strict; the rest is bytes of the wire, and then once more a
//! handshake message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::{Arc, OnceLock};
use tlsplice::protect::record_bytes;
use tlsplice::tls::certificates::Certificates;
use tlsplice::tls::hello::{Gate, Judgement};
use tlsplice::tls::resolver::Resolver;

fuzz_target!(|input: &[u8]| {
    let Some((&first, bytes)) = input.split_first() else { return };
    let judge = |wire: &[u8]| judge(first & 0x80 != 0, wire);
    let whole = judge(bytes);
    for end in [bytes.len() / 2, bytes.len().saturating_sub(1), usize::from(first).min(bytes.len())] {
        let part = judge(&bytes[..end]);
        assert!(part == Judgement::Incomplete || part == whole, "more bytes have changed the verdict");
    }
    let each = usize::from(first & 0x7f) + 1;
    assert_eq!(judge(&records(bytes, each)), judge(&records(bytes, 16 << 10)));
});

fn records(message: &[u8], each: usize) -> Vec<u8> {
    let record = |part: &[u8]| [&[22, 3, 1], &u16::try_from(part.len()).unwrap_or(0).to_be_bytes()[..], part].concat();
    message.chunks(each).flat_map(record).collect()
}

/// What comes of the complete records, each given once.
fn judge(strict: bool, mut wire: &[u8]) -> Judgement {
    let mut gate = Gate::new(strict.then(|| resolver().clone()));
    while let Some(len) = record_bytes(wire).filter(|len| *len <= wire.len()) {
        let judgement = gate.judge(&wire[..len]);
        if judgement != Judgement::Incomplete {
            return judgement;
        }
        wire = &wire[len..];
    }
    Judgement::Incomplete
}

fn resolver() -> &'static Arc<Resolver> {
    static RESOLVER: OnceLock<Arc<Resolver>> = OnceLock::new();
    RESOLVER.get_or_init(|| {
        let leaf = CertificateDer::from_pem_slice(include_bytes!("../seeds/leaf.pem")).expect("in the tree");
        let key = PrivateKeyDer::from_pem_slice(include_bytes!("../seeds/leaf.key")).expect("in the tree");
        Certificates::from_der(vec![leaf], key).expect("a pair").resolver()
    })
}
