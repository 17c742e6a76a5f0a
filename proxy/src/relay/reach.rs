//! How much one direction reads at once: more for as long as all of it is taken.
//!
//!   read in full, all taken ─▶ twice as much, up to MOST        a part not taken ─▶ LEAST
//!
//! A large read is a large send, and its sides are woken less often for each byte: over loopback bulk costs a third less
//! at 512 KiB than at 128. What a socket does not take is kept by the connection, so more than LEAST is read only while what all
//! of the worker's connections keep leaves room for it in `limits.send_memory`.

use super::spare::kept_bytes;
use crate::protect::PLAIN_BYTES;
use crate::send_room::SendMemory;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub struct Reach<const LEAST: usize, const MOST: usize> {
    bytes: usize,
}

impl<const LEAST: usize, const MOST: usize> Default for Reach<LEAST, MOST> {
    fn default() -> Self {
        Self { bytes: LEAST }
    }
}

impl<const LEAST: usize, const MOST: usize> Reach<LEAST, MOST> {
    /// Bytes to read at once.
    pub fn bytes(&self, memory: &SendMemory) -> usize {
        if self.bytes == LEAST || memory.has(kept_bytes() + self.bytes) { self.bytes } else { LEAST }
    }

    /// How a read went, and what became of it.
    pub fn note(&mut self, in_full: bool, all_taken: bool) {
        if !all_taken {
            self.bytes = LEAST;
        } else if in_full {
            self.bytes = (2 * self.bytes).min(MOST);
        }
    }
}

/// Reads of an upstream in a row that gave less than a record. After some of them its answers are taken to be short: one
/// record is asked for, by a plain recv, which costs less than recvmsg or a pipe.
#[derive(Debug, Clone, Copy, Default)]
pub struct ShortReads(u8);

impl ShortReads {
    const ENOUGH: u8 = 2;

    pub fn are_usual(self) -> bool {
        self.0 == Self::ENOUGH
    }

    /// A read gave so many bytes.
    pub fn note(&mut self, bytes: usize) {
        self.0 = if bytes < PLAIN_BYTES { Self::ENOUGH.min(self.0 + 1) } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::Spare;

    #[test]
    fn grows_with_full_reads_and_falls_with_what_is_not_taken() {
        let memory = SendMemory::new(1000);
        let mut reach = Reach::<10, 50>::default();
        reach.note(false, true);
        assert_eq!(reach.bytes(&memory), 10);
        reach.note(true, true);
        reach.note(false, true);
        assert_eq!(reach.bytes(&memory), 20);
        reach.note(true, true);
        reach.note(true, true);
        assert_eq!(reach.bytes(&memory), 50, "the most");
        reach.note(true, false);
        assert_eq!(reach.bytes(&memory), 10);
    }

    #[test]
    fn a_full_record_ends_a_row_of_short_reads() {
        let mut reads = ShortReads::default();
        reads.note(1);
        assert!(!reads.are_usual());
        reads.note(PLAIN_BYTES - 1);
        reads.note(1);
        assert!(reads.are_usual());
        reads.note(PLAIN_BYTES);
        assert!(!reads.are_usual());
    }

    #[test]
    fn what_others_keep_leaves_no_room() {
        let memory = SendMemory::new(100);
        let mut reach = Reach::<10, 50>::default();
        reach.note(true, true);
        let mut spare = Spare::default();
        spare.push(&[0; 90]);
        assert_eq!(reach.bytes(&memory), 10);
        spare.clear();
        assert_eq!(reach.bytes(&memory), 20);
    }
}
