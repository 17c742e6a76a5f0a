//! Chunked bodies: pieces change no verdict, and what is written anew carries the same bytes. The first byte is the cut.
#![no_main]

mod http;

use http::chunk::{Decoder, encode, finish};
use libfuzzer_sys::fuzz_target;

/// Data, trailers and length on the wire; `None`: not whole; an error: no body.
type Read = Result<Option<(Vec<u8>, Vec<u8>, usize)>, http::refusal::Refusal>;

fuzz_target!(|input: &[u8]| {
    let Some((&cut, bytes)) = input.split_first() else { return };
    let whole = read(bytes, bytes.len());
    assert_eq!(whole, read(bytes, usize::from(cut)));
    let Ok(Some((data, trailers, _))) = whole else { return };
    let mut again = Vec::new();
    data.chunks(usize::from(cut) + 1).for_each(|part| encode(part, &mut again));
    finish(&trailers, &mut again);
    let len = again.len();
    assert_eq!(read(&again, len), Ok(Some((data, trailers, len))));
});

fn read(bytes: &[u8], cut: usize) -> Read {
    let mut decoder = Decoder::new(4096);
    let (mut data, mut at) = (Vec::new(), 0);
    for end in [cut.min(bytes.len()), bytes.len()] {
        let fed = decoder.feed(&bytes[at..end], |part| data.extend_from_slice(part))?;
        at += fed.consumed;
        if fed.done {
            return Ok(Some((data, decoder.trailers().to_vec(), at)));
        }
    }
    Ok(None)
}
