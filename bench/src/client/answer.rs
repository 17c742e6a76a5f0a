//! One HTTP/1.1 answer, as its bytes come in: its head, then a body with a length, in chunks, or up to the stream's end
//! (RFC 9112 section 6.3).

mod chunked;

use anyhow::{Context, Result, bail, ensure};
use chunked::Chunks;

/// What a response's head may take.
const HEAD_LIMIT_BYTES: usize = 16 << 10;
const FIELDS_LIMIT: usize = 96;

/// An answer that is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole {
    pub status: u16,
    /// Of the body.
    pub bytes: u64,
    /// No other answer follows on this connection.
    pub is_last: bool,
}

/// How far an answer has come.
#[derive(Debug, Default)]
pub struct Answer {
    /// What has come of a head that is not whole.
    pending: Vec<u8>,
    head: Option<Head>,
    /// Bytes of the body that have come.
    taken: u64,
}

#[derive(Debug)]
struct Head {
    status: u16,
    is_last: bool,
    body: Body,
}

#[derive(Debug)]
enum Body {
    Length(u64),
    Chunked(Chunks),
    UntilEnd,
}

impl Answer {
    /// Takes the next bytes, none at the stream's end; gives the answer when it is whole. The body goes to `on_body`, with the
    /// position.
    pub fn take(&mut self, bytes: &[u8], mut on_body: impl FnMut(u64, &[u8])) -> Result<Option<Whole>> {
        if bytes.is_empty() {
            return self.end().map(Some);
        }
        let behind_head = if self.head.is_some() { Some(0) } else { self.take_head(bytes)? };
        let (Some(at), Some(head)) = (behind_head, &mut self.head) else { return Ok(None) };
        let (body, taken) = (&bytes[at..], &mut self.taken);
        let mut on_part = |part: &[u8]| {
            on_body(*taken, part);
            *taken += part.len() as u64;
        };
        let is_whole = match &mut head.body {
            Body::Chunked(chunks) => chunks.take(body, on_part)?,
            Body::UntilEnd => {
                on_part(body);
                false
            }
            Body::Length(length) => {
                on_part(body);
                ensure!(*taken <= *length, "the body is longer than it said: {taken}, not {length} bytes");
                *taken == *length
            }
        };
        Ok(is_whole.then_some(Whole { status: head.status, bytes: self.taken, is_last: head.is_last }))
    }

    /// Whether anything of it has come.
    pub fn has_begun(&self) -> bool {
        self.head.is_some() || !self.pending.is_empty()
    }

    /// The status and the body's bytes so far, once the head is whole.
    pub fn head(&self) -> Option<(u16, u64)> {
        self.head.as_ref().map(|head| (head.status, self.taken))
    }

    /// The body's length, if it was said.
    pub fn length(&self) -> Option<u64> {
        match self.head.as_ref()?.body {
            Body::Length(length) => Some(length),
            Body::Chunked(_) | Body::UntilEnd => None,
        }
    }

    fn end(&self) -> Result<Whole> {
        match &self.head {
            Some(Head { status, body: Body::UntilEnd, .. }) => {
                Ok(Whole { status: *status, bytes: self.taken, is_last: true })
            }
            Some(_) => bail!("the connection ended inside an answer, after {} bytes of its body", self.taken),
            None => bail!("the connection ended before an answer's head was whole"),
        }
    }

    /// Gives where the body begins in these bytes, if the head ends in them.
    fn take_head(&mut self, bytes: &[u8]) -> Result<Option<usize>> {
        self.pending.extend_from_slice(bytes);
        loop {
            let Some((used, head)) = parse(&self.pending)? else {
                let have = self.pending.len();
                ensure!(have < HEAD_LIMIT_BYTES, "the answer's head is longer than {HEAD_LIMIT_BYTES} bytes");
                return Ok(None);
            };
            self.pending.drain(..used);
            // 100 Continue, 103 Early Hints: the answer is still to come.
            if !(100..200).contains(&head.status) {
                self.head = Some(head);
                return Ok(Some(bytes.len() - self.pending.len()));
            }
        }
    }
}

/// Gives a whole head and its length.
fn parse(bytes: &[u8]) -> Result<Option<(usize, Head)>> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_LIMIT];
    let mut response = httparse::Response::new(&mut fields);
    let parsed = response.parse(bytes).with_context(|| {
        let line = bytes.split(|byte| *byte == b'\r').next().unwrap_or_default();
        format!("no HTTP answer: {:?}", String::from_utf8_lossy(&line[..line.len().min(80)]))
    })?;
    let httparse::Status::Complete(used) = parsed else { return Ok(None) };
    let status = response.code.unwrap_or_default();
    let mut is_last = response.version == Some(0);
    let (mut length, mut is_chunked) = (None, false);
    for field in response.headers.iter() {
        let value = std::str::from_utf8(field.value).unwrap_or_default().trim();
        if field.name.eq_ignore_ascii_case("content-length") {
            length = Some(value.parse().with_context(|| format!("the answer's Content-Length is {value:?}"))?);
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            is_chunked = value.rsplit(',').next().is_some_and(|last| last.trim().eq_ignore_ascii_case("chunked"));
            ensure!(is_chunked, "the answer's Transfer-Encoding is {value:?}, which ends in no chunks");
        } else if field.name.eq_ignore_ascii_case("connection") {
            let has = |wanted: &str| value.split(',').any(|option| option.trim().eq_ignore_ascii_case(wanted));
            is_last = has("close") || (is_last && !has("keep-alive"));
        }
    }
    let body = match (status, is_chunked, length) {
        (204 | 304, _, _) => Body::Length(0),
        (_, true, _) => Body::Chunked(Chunks::default()),
        (_, false, Some(length)) => Body::Length(length),
        (_, false, None) => Body::UntilEnd,
    };
    let is_last = is_last || matches!(body, Body::UntilEnd);
    Ok(Some((used, Head { status, is_last, body })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(status: u16, bytes: u64, is_last: bool) -> Option<Whole> {
        Some(Whole { status, bytes, is_last })
    }

    /// The answer in pieces of any size, each time to the same end.
    fn in_any_pieces(text: &str, body: &str, expected: Option<Whole>) {
        for step in 1..=text.len() {
            let (mut answer, mut came) = (Answer::default(), Vec::new());
            let mut pieces = text.as_bytes().chunks(step).peekable();
            while let Some(piece) = pieces.next() {
                let taken = answer.take(piece, |at, part| {
                    assert_eq!(at, came.len() as u64);
                    came.extend_from_slice(part);
                });
                let is_last_piece = pieces.peek().is_none();
                assert_eq!(taken.unwrap(), if is_last_piece { expected } else { None }, "{text:?} by {step}");
            }
            assert_eq!(String::from_utf8_lossy(&came), body);
        }
    }

    #[test]
    fn an_answer_is_whole_in_any_pieces() {
        in_any_pieces("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", "hello", whole(200, 5, false));
        in_any_pieces("HTTP/1.1 204 No\r\n\r\n", "", whole(204, 0, false));
        in_any_pieces("HTTP/1.1 100 C\r\n\r\nHTTP/1.1 404 N\r\nContent-Length: 0\r\n\r\n", "", whole(404, 0, false));
        let chunked =
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n1\r\n!\r\n0\r\nA: b\r\n\r\n";
        in_any_pieces(chunked, "hello!", whole(200, 6, false));
        in_any_pieces("HTTP/1.1 200 OK\r\nA: b\r\n\r\nhello", "hello", None);
    }

    #[test]
    fn an_announced_end_is_known() {
        let last = |head: &str| {
            let text = format!("{head}\r\nContent-Length: 0\r\n\r\n");
            Answer::default().take(text.as_bytes(), |_, _| ()).unwrap().unwrap().is_last
        };
        assert!(last("HTTP/1.1 200 OK\r\nConnection: foo, Close"));
        assert!(last("HTTP/1.0 200 OK"));
        assert!(!last("HTTP/1.0 200 OK\r\nConnection: keep-alive"));
        assert!(!last("HTTP/1.1 200 OK\r\nConnection: keep-alive"));
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        let refused = |text: &[u8]| Answer::default().take(text, |_, _| ()).is_err();
        assert!(refused(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello!"), "longer than it says");
        assert!(refused(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"));
        assert!(refused(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n"));
        assert!(refused(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"));
        assert!(refused(b"garbage"));
        assert!(refused(b""), "the end");
        let long = [b"HTTP/1.1 200 OK\r\nA: ".to_vec(), vec![b'a'; HEAD_LIMIT_BYTES]].concat();
        assert!(refused(&long));
    }

    #[test]
    fn the_end_of_the_stream_is_an_end_only_where_it_was_said() {
        let ended = |text: &[u8]| {
            let mut answer = Answer::default();
            assert_eq!(answer.take(text, |_, _| ()).unwrap(), None);
            answer.take(b"", |_, _| ()).map(|whole| whole.expect("an end is an answer or an error"))
        };
        assert_eq!(ended(b"HTTP/1.1 200 OK\r\n\r\nhello").unwrap(), whole(200, 5, true).unwrap());
        assert!(ended(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello").is_err());
        assert!(ended(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n").is_err());
        assert!(ended(b"HTTP/1.1 200").is_err());
    }
}
