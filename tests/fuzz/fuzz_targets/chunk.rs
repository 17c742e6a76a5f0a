//! Chunked bodies: pieces change no verdict, and what is written anew carries the same bytes.
//!
//! The first byte is the cut: the body comes in two pieces there, in pieces of that size, and as a whole.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tlsplice::http::chunk::{Decoder, encode, finish};
use tlsplice::http::refusal::Refusal;

/// Data, trailers and length on the wire; `None`: not whole; an error: no body.
type Read = Result<Option<(Vec<u8>, Vec<u8>, usize)>, Refusal>;

const TRAILER_LIMIT: usize = 4096;

fuzz_target!(|input: &[u8]| {
    let Some((&cut, bytes)) = input.split_first() else { return };
    let cut = usize::from(cut);
    let whole = read(&[bytes]);
    assert_eq!(whole, read(&<[_; 2]>::from(bytes.split_at(cut.min(bytes.len())))));
    assert_eq!(whole, read(&bytes.chunks(cut % 8 + 1).collect::<Vec<_>>()));
    let Ok(Some((data, trailers, length))) = whole else { return };
    assert!(length <= bytes.len());
    // What lies behind is not looked at.
    assert_eq!(read(&[&bytes[..length], b"\0\xff"]), Ok(Some((data.clone(), trailers.clone(), length))));
    let mut again = Vec::new();
    data.chunks(cut + 1).for_each(|part| encode(part, &mut again));
    finish(&trailers, &mut again);
    let len = again.len();
    assert_eq!(read(&[&again]), Ok(Some((data, trailers, len))));
});

fn read(pieces: &[&[u8]]) -> Read {
    let mut decoder = Decoder::new(TRAILER_LIMIT);
    let (mut data, mut at) = (Vec::new(), 0);
    for piece in pieces {
        let fed = decoder.feed(piece, |part| data.extend_from_slice(part))?;
        at += fed.consumed;
        if fed.done {
            return Ok(Some((data, decoder.trailers().to_vec(), at)));
        }
        assert_eq!(fed.consumed, piece.len(), "what is not whole takes all");
    }
    Ok(None)
}
