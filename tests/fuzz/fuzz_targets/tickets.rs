//! The file of ticket keys: what is taken is written again as it was, and its epochs keep their order whatever the time.
//!
//! A digest stands before everything, so the input is also tried with the right one.
#![no_main]

use aws_lc_rs::digest::{SHA256, digest};
use libfuzzer_sys::fuzz_target;
use tlsplice::tls::tickets::file::{Epochs, FILE_BYTES};

const DIGEST_BYTES: usize = 32;

fuzz_target!(|input: &[u8]| {
    file(input);
    let mut body = input.to_vec();
    body.resize(FILE_BYTES - DIGEST_BYTES, 0);
    let sum = digest(&SHA256, &body);
    body.extend_from_slice(sum.as_ref());
    file(&body);
});

fn file(input: &[u8]) {
    let Ok(mut epochs) = Epochs::parse(input) else { return };
    assert_eq!(&epochs.to_bytes()[..], input);
    for now in [0, 1, epochs.length, epochs.length.wrapping_mul(epochs.generation), u64::MAX / 2, u64::MAX] {
        let Some(rotated) = epochs.rotate(now) else { continue };
        let again = Epochs::parse(&rotated.to_bytes()).expect("what was rotated is a file");
        assert_eq!(again.generation, epochs.generation.saturating_add(1));
        let Some(sealing) = epochs.current(now) else { panic!("no epoch was destroyed") };
        // A clock that is far behind seals with an epoch that may be over; what it opens is what was sealed.
        let opening = epochs.find(&sealing.id, now);
        assert!(opening.is_none_or(|opening| opening.secret() == sealing.secret()));
        // Whoever seals when a rotation is due is understood behind it. Time ends with u64.
        if epochs.is_due(now) && now < u64::MAX {
            assert!(again.find(&sealing.id, now).is_some_and(|opening| opening.secret() == sealing.secret()));
        }
    }
    epochs.destroy_old(u64::MAX);
    epochs.destroy_old(0);
}
