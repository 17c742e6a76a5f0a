//! OCSP answers, about a certificate that is its own issuer: none that was not signed is ever taken.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;
use tlsplice::tls::ocsp;
use tlsplice::tls::pem;
use tlsplice::tls::x509::Seen;

fn seen() -> &'static Seen {
    static SEEN: OnceLock<Seen> = OnceLock::new();
    SEEN.get_or_init(|| {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/authority.pem");
        let chain = pem::certificates(file.as_ref()).expect("in the tree");
        Seen::read(&chain[0]).expect("a certificate")
    })
}

fuzz_target!(|input: &[u8]| {
    // The one that signed the answers of the corpus has signed nothing else.
    if let Ok(staple) = ocsp::verify(input, seen(), seen(), 1_800_000_000) {
        assert!(staple.this_update <= 1_800_000_300 && staple.next_update > 1_800_000_000);
    }
});
