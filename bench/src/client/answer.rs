//! One HTTP answer, as its bytes come in.

use anyhow::{Context, Result, ensure};

/// What a response's head may take.
const HEAD_LIMIT_BYTES: usize = 16 << 10;
const HEAD_END: &[u8] = b"\r\n\r\n";

/// How far an answer has come.
#[derive(Debug, Default)]
pub struct Answer {
    /// What has come of a head that is not whole.
    head: Vec<u8>,
    /// Status, length, and what has come of the body.
    body: Option<(u16, u64, u64)>,
}

impl Answer {
    /// Takes the next bytes, none at the stream's end; gives status and body length when the answer is whole. The body goes to
    /// `on_body`, with the position.
    pub fn take(&mut self, bytes: &[u8], mut on_body: impl FnMut(u64, &[u8])) -> Result<Option<(u16, u64)>> {
        ensure!(!bytes.is_empty(), "the connection ended inside an answer");
        let mut body = bytes;
        if self.body.is_none() {
            let before = self.head.len();
            self.head.extend_from_slice(bytes);
            let Some(at) = self.head.windows(HEAD_END.len()).position(|four| four == HEAD_END) else {
                ensure!(
                    self.head.len() < HEAD_LIMIT_BYTES,
                    "the answer's head is longer than {HEAD_LIMIT_BYTES} bytes"
                );
                return Ok(None);
            };
            let (status, length) = parse_head(&self.head[..at])?;
            self.body = Some((status, length, 0));
            body = &bytes[at + HEAD_END.len() - before..];
        }
        let Some((status, length, taken)) = &mut self.body else { return Ok(None) };
        on_body(*taken, body);
        *taken += body.len() as u64;
        ensure!(*taken <= *length, "the body is longer than it said: {taken}, not {length} bytes");
        Ok((*taken == *length).then_some((*status, *length)))
    }
}

fn parse_head(head: &[u8]) -> Result<(u16, u64)> {
    let text = std::str::from_utf8(head).context("the answer's head is no text")?;
    let status = text.split(' ').nth(1).and_then(|word| word.get(..3)?.parse().ok());
    let status = status.with_context(|| format!("no HTTP answer: {:?}", text.lines().next().unwrap_or_default()))?;
    let length = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    Ok((status, length.context("the answer has no Content-Length, which this client needs")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_or_refused() {
        assert_eq!(parse_head(b"HTTP/1.1 200 OK\r\ncontent-length: 12").unwrap(), (200, 12));
        assert!(parse_head(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked").is_err());
        assert!(parse_head(b"garbage").is_err());
    }

    #[test]
    fn an_answer_is_whole_in_any_pieces_and_never_longer() {
        let bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
        for step in 1..=bytes.len() {
            let (mut answer, mut body) = (Answer::default(), Vec::new());
            let mut pieces = bytes.chunks(step).peekable();
            while let Some(piece) = pieces.next() {
                let whole = answer.take(piece, |_, part| body.extend_from_slice(part)).unwrap();
                assert_eq!(whole, pieces.peek().is_none().then_some((200, 5)), "in pieces of {step}");
            }
            assert_eq!(body, b"hello");
        }
        assert!(Answer::default().take(&[&bytes[..], b"!"].concat(), |_, _| ()).is_err());
        assert!(Answer::default().take(b"", |_, _| ()).is_err());
        assert!(Answer::default().take(&[b'a'; HEAD_LIMIT_BYTES], |_, _| ()).is_err());
    }
}
