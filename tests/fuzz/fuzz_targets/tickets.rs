//! The file of ticket keys: what is taken is written again as it was, and no ticket panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tlsplice::tls::tickets::file::Epochs;

fuzz_target!(|input: &[u8]| {
    let Ok(mut epochs) = Epochs::parse(input) else { return };
    assert_eq!(&epochs.to_bytes()[..], input);
    let now = epochs.length;
    let _ = epochs.rotate(now);
    let _ = (epochs.current(now), epochs.is_due(now));
    epochs.destroy_old(u64::MAX);
});
