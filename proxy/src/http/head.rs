//! Finds where a head ends, byte by byte and strictly, before anything in it is understood.
//!
//!   bytes ─▶ Scanner ─▶ need more │ the head's length │ a refusal
//!
//! A line ends with CRLF and with nothing else: a bare CR or LF, a NUL or another control byte is refused here, so that
//! no parser behind this one, ours or the upstream's, can find another end (RFC 9112 section 2.2).

use super::refusal::{Refusal, Status};

/// Fields of one head, at most: more of them are an attack or an accident.
pub const FIELDS_MAX: usize = 128;

/// Where the scan of a head stands, so that a head that trickles in is read once.
#[derive(Debug, Clone)]
pub struct Scanner {
    at: usize,
    /// The byte before `at` was a CR.
    after_cr: bool,
    /// Bytes of the line so far.
    line: usize,
    /// The first line is over.
    past_first: bool,
    /// Bytes of an empty line before the first, which is passed over (RFC 9112 section 2.2).
    skipped: usize,
    may_skip: bool,
}

/// A head in full: where it begins and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub start: usize,
    pub end: usize,
}

impl Scanner {
    /// One empty line may come before a request, of a client that ended a body so.
    pub fn request() -> Self {
        Self { at: 0, after_cr: false, line: 0, past_first: false, skipped: 0, may_skip: true }
    }

    pub fn response() -> Self {
        Self { may_skip: false, ..Self::request() }
    }

    /// Nothing of a message has been seen yet; an empty line does not count.
    pub fn is_idle(&self) -> bool {
        self.at == self.skipped
    }

    /// Looks at `bytes`, of which those of the calls before are the front. `limit` is for the whole head.
    ///
    /// # Errors
    /// 400 for what is no line, 431 for a head beyond the limit.
    pub fn scan(&mut self, bytes: &[u8], limit: usize) -> Result<Option<Extent>, Refusal> {
        while let Some(&byte) = bytes.get(self.at) {
            if self.at - self.skipped >= limit {
                return Err(Refusal::new(Status::FieldsTooLarge, "the head is longer than http.head_size"));
            }
            self.at += 1;
            match (self.after_cr, byte) {
                (false, b'\r') => self.after_cr = true,
                (true, b'\n') => {
                    self.after_cr = false;
                    if self.line > 0 {
                        self.past_first = true;
                        self.line = 0;
                    } else if self.past_first {
                        return Ok(Some(Extent { start: self.skipped, end: self.at }));
                    } else if self.may_skip && self.skipped == 0 {
                        self.skipped = self.at;
                    } else {
                        return Err(Refusal::bad_request("empty lines before the message"));
                    }
                }
                (true, _) => return Err(Refusal::bad_request("a CR without its LF")),
                (false, b'\n') => return Err(Refusal::bad_request("a LF without its CR")),
                (false, b' ' | b'\t') if self.line == 0 && self.past_first => {
                    return Err(Refusal::bad_request("a folded field line"));
                }
                (false, b'\t' | b' '..=b'~' | 0x80..) => self.line += 1,
                (false, _) => return Err(Refusal::bad_request("a control byte in the head")),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scan(bytes: &[u8]) -> Result<Option<Extent>, Refusal> {
        Scanner::request().scan(bytes, 1000)
    }

    #[test]
    fn a_head_ends_at_its_empty_line() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nrest";
        assert_eq!(scan(head), Ok(Some(Extent { start: 0, end: head.len() - 4 })));
        assert_eq!(scan(&head[..head.len() - 5]), Ok(None));
        assert_eq!(scan(b"\r\nGET /\r\n\r\n"), Ok(Some(Extent { start: 2, end: 11 })));
    }

    #[test]
    fn nothing_but_crlf_ends_a_line() {
        for bad in [
            &b"GET / HTTP/1.1\nHost: a\r\n\r\n"[..],
            b"GET / HTTP/1.1\r\nHost: a\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n",
            b"GET / HTTP/1.1\rHost: a\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\0\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\x7f\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\x0b\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
            b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\n\tfolded\r\n\r\n",
            b"\r\n\r\nGET / HTTP/1.1\r\n\r\n",
            b"\nGET / HTTP/1.1\r\n\r\n",
        ] {
            assert!(
                matches!(scan(bad), Err(r) if r.status == Status::BadRequest),
                "{:?}",
                String::from_utf8_lossy(bad)
            );
        }
    }

    #[test]
    fn a_head_beyond_the_limit_is_refused_as_soon_as_it_is() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        assert!(Scanner::request().scan(head, head.len()).is_ok_and(|e| e.is_some()));
        let refused = Scanner::request().scan(head, head.len() - 1);
        assert!(matches!(refused, Err(r) if r.status == Status::FieldsTooLarge));
    }

    proptest! {
        #[test]
        fn pieces_do_not_change_what_a_scan_finds(bytes in "(\r\n|\r|\n|[a-c :]|\t|\0){0,40}(\r\n\r\n)?", cut in 0usize..40) {
            let bytes = bytes.as_bytes();
            let whole = scan(bytes);
            let mut scanner = Scanner::request();
            let mut found = Ok(None);
            let cut = cut.min(bytes.len());
            for end in [cut, bytes.len()] {
                if found == Ok(None) {
                    found = scanner.scan(&bytes[..end], 1000);
                }
            }
            prop_assert_eq!(found, whole);
        }

        #[test]
        fn a_head_that_is_found_has_no_empty_line_within(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Some(Extent { start, end })) = scan(&bytes) {
                let head = &bytes[start..end];
                prop_assert!(head.ends_with(b"\r\n\r\n"));
                prop_assert!(!head[..head.len() - 1].windows(4).any(|w| w == b"\r\n\r\n"));
                prop_assert!(head.iter().all(|b| *b != 0));
            }
        }
    }
}
