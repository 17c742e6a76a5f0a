//! The chunked coding (RFC 9112 section 7.1): taken apart strictly on one side, written anew on the other.
//!
//!   bytes ─▶ Decoder ─▶ data ─▶ encode ─▶ bytes        … last chunk ─▶ trailers ─▶ finish
//!
//! Chunks are not passed on as they came: extensions are dropped and sizes written by us, so that the next reader finds
//! the ends that we found. This module buffers a trailer section and nothing else.

use super::field::{Connection, Field};
use super::framing::LENGTH_MAX;
use super::head::FIELDS_MAX;
use super::refusal::{Refusal, Status};
use super::request::put;

/// Hexadecimal digits of a chunk size, leading zeros included: as many as 2^63 has.
const SIZE_DIGITS: usize = 16;
/// Bytes of extensions behind one chunk size, and behind all of a body: nobody uses them, so more is an attack.
const EXTENSION_BYTES: usize = 256;
const EXTENSIONS_BYTES: usize = 16 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Digits of a size; so many are read.
    Size(usize),
    /// Blanks behind a size, where an extension has to follow.
    Blank,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// In a line of the trailer section with so many bytes.
    Trailer(usize),
    /// Behind the CR of such a line.
    TrailerLf(usize),
    Done,
}

/// One body, as far as it is read.
#[derive(Debug, Clone)]
pub struct Decoder {
    state: State,
    /// Of the chunk: its size, then what is left of it.
    left: u64,
    total: u64,
    extension: usize,
    extensions: usize,
    trailers: Vec<u8>,
    trailer_limit: usize,
    connection: Connection,
}

/// What one call came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fed {
    /// Bytes at the front that belong to this body.
    pub consumed: usize,
    /// The body is complete.
    pub done: bool,
}

impl Decoder {
    /// `trailer_limit`: bytes of the trailer section, at most.
    pub fn new(trailer_limit: usize) -> Self {
        Self {
            state: State::Size(0),
            left: 0,
            total: 0,
            extension: 0,
            extensions: 0,
            trailers: Vec::new(),
            trailer_limit,
            connection: Connection::default(),
        }
    }

    /// Drops the trailers that are named there, as such fields of the head are (RFC 9110 section 7.6.1).
    pub fn without(self, connection: Connection) -> Self {
        Self { connection, ..self }
    }

    /// Reads on; `data` gets what the chunks carry, in order.
    ///
    /// # Errors
    /// 400 or 431 for what is no chunked body. It is the same whatever pieces the body comes in.
    pub fn feed(&mut self, bytes: &[u8], mut data: impl FnMut(&[u8])) -> Result<Fed, Refusal> {
        let mut at = 0;
        while at < bytes.len() && self.state != State::Done {
            if self.state == State::Data {
                let len = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len() - at);
                data(&bytes[at..at + len]);
                at += len;
                self.left -= len as u64;
                if self.left == 0 {
                    self.state = State::DataCr;
                }
                continue;
            }
            self.state = self.step(bytes[at])?;
            at += 1;
        }
        Ok(Fed { consumed: at, done: self.state == State::Done })
    }

    fn step(&mut self, byte: u8) -> Result<State, Refusal> {
        const SIZE: Refusal = Refusal::bad_request("a chunk size that is none");
        match self.state {
            State::Size(digits) => match (byte, char::from(byte).to_digit(16)) {
                (_, Some(_)) if digits == SIZE_DIGITS => Err(SIZE),
                (_, Some(digit)) => {
                    self.left = self.left << 4 | u64::from(digit);
                    Ok(State::Size(digits + 1))
                }
                (b'\r' | b' ' | b'\t' | b';', None) if digits == 0 => Err(SIZE),
                (b'\r', None) => self.size_read().map(|()| State::SizeLf),
                (b' ' | b'\t', None) => self.extend().map(|()| State::Blank),
                (b';', None) => self.extend().map(|()| State::Extension),
                (_, None) => Err(SIZE),
            },
            State::Blank => match byte {
                b' ' | b'\t' => self.extend().map(|()| State::Blank),
                b';' => self.extend().map(|()| State::Extension),
                _ => Err(SIZE),
            },
            State::Extension => match byte {
                b'\r' => self.size_read().map(|()| State::SizeLf),
                b'\t' | b' '..=b'~' => self.extend().map(|()| State::Extension),
                _ => Err(Refusal::bad_request("a chunk extension with a control byte")),
            },
            State::SizeLf if byte == b'\n' => Ok(if self.left == 0 { State::Trailer(0) } else { State::Data }),
            State::DataCr if byte == b'\r' => Ok(State::DataLf),
            State::DataLf if byte == b'\n' => Ok(State::Size(0)),
            State::SizeLf => Err(Refusal::bad_request("a chunk size without its CRLF")),
            State::DataCr | State::DataLf => Err(Refusal::bad_request("a chunk that is longer than its size")),
            State::Trailer(line) => self.trailer(line, byte),
            State::TrailerLf(line) => match (byte, line) {
                (b'\n', 0) => self.complete().map(|()| State::Done),
                (b'\n', _) => self.keep(byte).map(|()| State::Trailer(0)),
                _ => Err(Refusal::bad_request("a CR without its LF in the trailers")),
            },
            State::Data | State::Done => Ok(self.state),
        }
    }

    fn size_read(&mut self) -> Result<(), Refusal> {
        self.extension = 0;
        self.total = self.total.saturating_add(self.left);
        if self.left > LENGTH_MAX || self.total > LENGTH_MAX {
            return Err(Refusal::bad_request("a chunked body beyond 2^63"));
        }
        Ok(())
    }

    fn extend(&mut self) -> Result<(), Refusal> {
        self.extension += 1;
        self.extensions += 1;
        if self.extension > EXTENSION_BYTES || self.extensions > EXTENSIONS_BYTES {
            return Err(Refusal::bad_request("too many bytes of chunk extensions"));
        }
        Ok(())
    }

    fn trailer(&mut self, line: usize, byte: u8) -> Result<State, Refusal> {
        match byte {
            b'\r' if line == 0 => return Ok(State::TrailerLf(0)),
            b' ' | b'\t' if line == 0 => return Err(Refusal::bad_request("a folded trailer line")),
            b'\r' => self.keep(byte)?,
            b'\t' | b' '..=b'~' | 0x80.. => {
                self.keep(byte)?;
                return Ok(State::Trailer(line + 1));
            }
            _ => return Err(Refusal::bad_request("a control byte in the trailers")),
        }
        Ok(State::TrailerLf(line))
    }

    fn keep(&mut self, byte: u8) -> Result<(), Refusal> {
        if self.trailers.len() >= self.trailer_limit {
            return Err(Refusal::new(Status::FieldsTooLarge, "trailers longer than http.head_size"));
        }
        self.trailers.push(byte);
        Ok(())
    }

    /// Judges the trailers once they are all there, and keeps those that are not of one connection.
    fn complete(&mut self) -> Result<(), Refusal> {
        let mut section = std::mem::take(&mut self.trailers);
        section.extend_from_slice(b"\r\n");
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let is_named = |field: &httparse::Header<'_>| self.connection.names(field.name);
        match httparse::parse_headers(&section, &mut fields) {
            Ok(httparse::Status::Complete((end, fields))) if end == section.len() => {
                if fields.iter().any(|field| !Field::may_trail(field.name)) {
                    return Err(Refusal::bad_request("a trailer that frames, routes or controls the message"));
                }
                if fields.iter().any(is_named) {
                    let kept = fields.iter().filter(|field| !is_named(field));
                    kept.for_each(|field| put(&mut self.trailers, field.name, field.value));
                    return Ok(());
                }
            }
            Err(httparse::Error::TooManyHeaders) => {
                return Err(Refusal::new(Status::FieldsTooLarge, "more trailers than a message may have"));
            }
            Ok(_) | Err(_) => return Err(Refusal::bad_request("a trailer that is no field")),
        }
        section.truncate(section.len() - 2);
        self.trailers = section;
        Ok(())
    }

    /// The trailers of a complete body, each with its CRLF.
    pub fn trailers(&self) -> &[u8] {
        if self.state == State::Done { &self.trailers } else { &[] }
    }
}

/// Appends one chunk; nothing for no data, as that would be the end.
pub fn encode(data: &[u8], out: &mut Vec<u8>) {
    if data.is_empty() {
        return;
    }
    out.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(b"\r\n");
}

/// Appends the end of a body.
pub fn finish(trailers: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(b"0\r\n");
    out.extend_from_slice(trailers);
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The data, the trailers, and how long the body is on the wire.
    type Whole = (Vec<u8>, Vec<u8>, usize);

    fn read(bytes: &[u8], cuts: &[usize]) -> Result<Option<Whole>, Refusal> {
        let mut decoder = Decoder::new(1000);
        let (mut data, mut at) = (Vec::new(), 0);
        for &cut in cuts.iter().chain([&bytes.len()]) {
            let cut = cut.clamp(at, bytes.len());
            let fed = decoder.feed(&bytes[at..cut], |d| data.extend_from_slice(d))?;
            at += fed.consumed;
            if fed.done {
                return Ok(Some((data, decoder.trailers().to_vec(), at)));
            }
        }
        Ok(None)
    }

    #[test]
    fn chunks_are_put_together() {
        let body = b"5\r\nhello\r\n006;a=b\r\n world\r\n0\r\nX-Sum: 1\r\n\r\nGET";
        let trailers = b"X-Sum: 1\r\n".to_vec();
        assert_eq!(read(body, &[]), Ok(Some((b"hello world".to_vec(), trailers, body.len() - 3))));
        assert_eq!(read(b"0\r\n\r\n", &[]), Ok(Some((vec![], vec![], 5))));
        assert_eq!(read(b"A \t;x\r\n0123456789\r\n0\r\n\r\n", &[]).map(|d| d.is_some()), Ok(true));
        assert_eq!(read(b"5\r\nhel", &[]), Ok(None));
    }

    #[test]
    fn trailers_of_the_connection_end_here() {
        let mut connection = Connection::default();
        connection.add("X-Hop, x-sum").expect("good");
        for (sent, passed) in [
            ("X-HOP: 1\r\nX-Sum:2\r\n", ""),
            ("X-One: 1\r\nx-hop: 2\r\nX-Two: \u{e9}\r\n", "X-One: 1\r\nX-Two: \u{e9}\r\n"),
            ("X-One:1\r\n", "X-One:1\r\n"),
        ] {
            let mut decoder = Decoder::new(1000).without(connection.clone());
            let fed = decoder.feed(format!("0\r\n{sent}\r\n").as_bytes(), |_| {}).expect("good");
            assert!(fed.done, "{sent:?}");
            assert_eq!(String::from_utf8_lossy(decoder.trailers()), passed);
        }
    }

    #[test]
    fn what_is_no_chunk_is_refused() {
        for bad in [
            "\r\n",
            "x\r\n",
            "0x5\r\n",
            "-5\r\n",
            "+5\r\n",
            " 5\r\n",
            "5 \r\nhello\r\n",
            "5\nhello\r\n0\r\n\r\n",
            "5\rhello",
            "5\r\nhello0\r\n",
            "5\r\nhello\n",
            "5\r\nhello\r0",
            "5;a\nhello",
            "5;a\r\r\n",
            "5;\0\r\n",
            "5;\u{e9}\r\n",
            "8000000000000000\r\n",
            "ffffffffffffffff\r\n",
            "00000000000000005\r\n",
            "5,5\r\n",
            ";\r\n",
            "0\r\nX: 1\n\r\n",
            "0\r\nX: 1\r\r\n",
            "0\r\n X: 1\r\n\r\n",
            "0\r\nX\r\n\r\n",
            "0\r\nX : 1\r\n\r\n",
            "0\r\n: 1\r\n\r\n",
            "0\r\nContent-Length: 5\r\n\r\n",
            "0\r\ntransfer-encoding: chunked\r\n\r\n",
            "0\r\nHost: a\r\n\r\n",
            "0\r\nX_Forwarded_For: a\r\n\r\n",
            "0\r\nX: \0\r\n\r\n",
            "0\r\nGET / HTTP/1.1\r\n\r\n",
        ] {
            assert!(read(bad.as_bytes(), &[]).is_err(), "{bad:?}");
        }
        let long = format!("5;{}\r\n", "a".repeat(EXTENSION_BYTES));
        assert!(read(long.as_bytes(), &[]).is_err());
        let trailers = format!("0\r\nX: {}\r\n\r\n", "a".repeat(1000));
        assert!(matches!(read(trailers.as_bytes(), &[]), Err(r) if r.status == Status::FieldsTooLarge));
        let two = "7fffffffffffffff\r\n".to_owned();
        assert_eq!(read(two.as_bytes(), &[]), Ok(None), "the longest that there is");
    }

    proptest! {
        #[test]
        fn what_we_write_is_read_back(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..8),
                                      cuts in proptest::collection::vec(0usize..400, 0..6)) {
            let mut wire = Vec::new();
            for piece in &pieces {
                encode(piece, &mut wire);
            }
            finish(b"X-Sum: 1\r\n", &mut wire);
            let len = wire.len();
            wire.extend_from_slice(b"5\r\nnext");
            let mut cuts = cuts;
            cuts.sort_unstable();
            let (data, trailers, end) = read(&wire, &cuts).expect("ours is good").expect("and whole");
            prop_assert_eq!(data, pieces.concat());
            prop_assert_eq!(trailers, b"X-Sum: 1\r\n");
            prop_assert_eq!(end, len);
        }

        #[test]
        fn pieces_do_not_change_the_verdict(wire in "([0-9a-f]{0,3}(;[a-z]{0,3})?\r?\n?[a-z]{0,6}\r?\n?){0,6}(0\r\n(X: 1\r\n)?\r\n)?",
                                            cuts in proptest::collection::vec(0usize..80, 0..8)) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            prop_assert_eq!(read(wire.as_bytes(), &cuts), read(wire.as_bytes(), &[]));
        }
    }
}
