//! The look at a ClientHello before rustls': neither how it is cut into records nor when its bytes come changes the verdict.
//!
//! The first byte is the size of a record, and whether names are strict; the rest is bytes of the wire, and then once more a
//! handshake message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::OnceLock;
use tlsplice::tls::certificates::Certificates;
use tlsplice::tls::hello::{Gate, Judgement};

fuzz_target!(|input: &[u8]| {
    let Some((&first, bytes)) = input.split_first() else { return };
    let gate = gate(first & 0x80 != 0);
    let whole = gate.judge(bytes);
    for end in [bytes.len() / 2, bytes.len().saturating_sub(1), usize::from(first).min(bytes.len())] {
        let part = gate.judge(&bytes[..end]);
        assert!(part == Judgement::Incomplete || part == whole, "more bytes have changed the verdict");
    }
    let each = usize::from(first & 0x7f) + 1;
    assert_eq!(gate.judge(&records(bytes, each)), gate.judge(&records(bytes, 16 << 10)));
});

fn records(message: &[u8], each: usize) -> Vec<u8> {
    let record = |part: &[u8]| [&[22, 3, 1], &u16::try_from(part.len()).unwrap_or(0).to_be_bytes()[..], part].concat();
    message.chunks(each).flat_map(record).collect()
}

fn gate(strict: bool) -> &'static Gate {
    static GATES: OnceLock<[Gate; 2]> = OnceLock::new();
    let gates = GATES.get_or_init(|| {
        let leaf = CertificateDer::from_pem_slice(include_bytes!("../seeds/leaf.pem")).expect("in the tree");
        let key = PrivateKeyDer::from_pem_slice(include_bytes!("../seeds/leaf.key")).expect("in the tree");
        let certificates = Certificates::from_der(vec![leaf], key).expect("a pair");
        [Gate::new(None), Gate::new(Some(certificates.resolver()))]
    });
    &gates[usize::from(strict)]
}
