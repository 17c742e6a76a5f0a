//! What was read and a socket did not take: kept by its connection until the socket is writable again.
//!
//!   bytes ─▶ send ─▶ taken
//!               └─▶ Spare ─▶ flush, before anything else goes out

use crate::ring::Sock;
use crate::sys::socket::{self, Follow, VECTORS};
use std::cell::Cell;
use std::io::{self, IoSlice};
use std::ops::Range;

/// Bytes of ours on their way out: what a send did not take. A connection has several, and mostly they are empty: then
/// each is a pointer and no more.
#[derive(Default)]
pub struct Spare(Option<Box<Unsent>>);

/// Never without a byte that is still to be sent.
#[derive(Default)]
struct Unsent {
    bytes: Vec<u8>,
    at: usize,
}

thread_local! {
    /// A worker is a thread: what all its connections keep.
    static KEPT_BYTES: Cell<usize> = const { Cell::new(0) };
}

/// Bytes that the connections of this worker keep, all together: read, and not taken by where they go.
pub fn kept_bytes() -> usize {
    KEPT_BYTES.get()
}

impl Spare {
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Unsent bytes.
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |unsent| unsent.bytes.len() - unsent.at)
    }

    pub fn push(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.0.get_or_insert_default().bytes.extend_from_slice(bytes);
            KEPT_BYTES.set(KEPT_BYTES.get() + bytes.len());
        }
    }

    /// Takes over what another has, behind what is there.
    pub fn append(&mut self, other: &mut Self) {
        match (&self.0, other.0.take()) {
            (None, taken) => self.0 = taken,
            (Some(_), Some(taken)) => self.push(&taken.bytes[taken.at..]),
            (Some(_), None) => {}
        }
    }

    pub fn clear(&mut self) {
        self.0 = None;
    }

    /// Sends what is there. True when nothing is left; the memory is given back then.
    pub fn flush(&mut self, to: &mut Sock) -> io::Result<bool> {
        while let Some(unsent) = &mut self.0 {
            if !to.writable {
                return Ok(false);
            }
            unsent.at += send(to, &unsent.bytes[unsent.at..])?;
            if unsent.at == unsent.bytes.len() {
                self.0 = None;
            }
        }
        Ok(true)
    }

    /// Sends `bytes` after what is there already, in one send with it, and keeps what is not taken.
    pub fn send(&mut self, to: &mut Sock, bytes: &[u8]) -> io::Result<()> {
        if !self.is_empty() {
            self.push(bytes);
            return self.flush(to).map(drop);
        }
        let at = send(to, bytes)?;
        self.push(&bytes[at..]);
        Ok(())
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        KEPT_BYTES.set(KEPT_BYTES.get() - self.bytes.len());
    }
}

/// send(2) until all is taken or the socket is full, which is noted.
fn send(to: &mut Sock, bytes: &[u8]) -> io::Result<usize> {
    let mut at = 0;
    while at < bytes.len() {
        match socket::send(to.fd(), &bytes[at..], to.follow) {
            Ok(n) => {
                to.sent(n);
                at += n;
            }
            Err(e) if socket::is_again(&e) && !to.is_full() => {}
            Err(e) if socket::is_again(&e) => break,
            Err(e) => return Err(e),
        }
    }
    Ok(at)
}

/// Sends pieces of what was received, and keeps in `spare` what the socket does not take.
pub fn hand_on(to: &Sock, received: &[u8], pieces: &[Range<usize>], spare: &mut Spare) -> io::Result<()> {
    let mut full = !spare.is_empty();
    for now in pieces.chunks(VECTORS) {
        let sent = match now {
            _ if full => Ok(0),
            [one] => socket::send(to.fd(), &received[one.clone()], Follow::Unknown),
            many => send_pieces(to, received, many),
        };
        let mut sent = match sent {
            Ok(n) => n,
            Err(e) if socket::is_again(&e) => 0,
            Err(e) => return Err(e),
        };
        to.sent(sent);
        for piece in now {
            let taken = sent.min(piece.len());
            sent -= taken;
            full |= taken < piece.len();
            spare.push(&received[piece.start + taken..piece.end]);
        }
    }
    // A short send may only mean that the socket took a part: the flush that follows finds out.
    Ok(())
}

fn send_pieces(to: &Sock, received: &[u8], pieces: &[Range<usize>]) -> io::Result<usize> {
    let mut vectors = [IoSlice::new(&[]); VECTORS];
    for (vector, piece) in vectors.iter_mut().zip(pieces) {
        *vector = IoSlice::new(&received[piece.clone()]);
    }
    socket::send_vectored(to.fd(), &vectors[..pieces.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_counted_until_it_is_gone() {
        let (mut one, mut other) = (Spare::default(), Spare::default());
        one.push(&[1; 100]);
        one.push(&[]);
        other.push(&[2; 50]);
        one.push(&[3; 10]);
        assert_eq!((kept_bytes(), one.len()), (160, 110));
        let (mut third, mut fourth) = (Spare::default(), Spare::default());
        third.push(&[4; 5]);
        fourth.append(&mut third);
        one.append(&mut third);
        assert_eq!((kept_bytes(), one.len(), third.is_empty(), fourth.len()), (165, 110, true, 5));
        one.append(&mut fourth);
        assert_eq!((kept_bytes(), one.len(), fourth.is_empty()), (165, 115, true));
        one.clear();
        assert_eq!(kept_bytes(), 50);
        drop(other);
        assert_eq!(kept_bytes(), 0);
    }
}
