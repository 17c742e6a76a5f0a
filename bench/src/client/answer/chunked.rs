//! The chunked coding, taken apart (RFC 9112 section 7.1).

use anyhow::{Context, Result, ensure};

/// What a chunk's size with its extensions, or a trailer, may take.
const LINE_LIMIT_BYTES: usize = 4096;

/// How far a body in chunks has come.
#[derive(Debug, Default)]
pub struct Chunks {
    next: Next,
    /// What has come of a line that is not whole.
    line: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default)]
enum Next {
    #[default]
    Size,
    Data(u64),
    /// The line end behind the data.
    DataEnd,
    Trailer,
}

impl Chunks {
    /// Takes the next bytes; true when the last trailer is in. The data goes to `on_data`.
    pub fn take(&mut self, mut bytes: &[u8], mut on_data: impl FnMut(&[u8])) -> Result<bool> {
        while !bytes.is_empty() {
            if let Next::Data(left) = &mut self.next {
                let count = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                on_data(&bytes[..count]);
                bytes = &bytes[count..];
                *left -= count as u64;
                if *left == 0 {
                    self.next = Next::DataEnd;
                }
                continue;
            }
            let end = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |at| at + 1);
            self.line.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end..];
            ensure!(
                self.line.len() < LINE_LIMIT_BYTES,
                "a line between chunks is longer than {LINE_LIMIT_BYTES} bytes"
            );
            if !self.line.ends_with(b"\n") {
                break;
            }
            let line = std::mem::take(&mut self.line);
            if self.after(line.trim_ascii())? {
                ensure!(bytes.is_empty(), "the body goes on behind its last chunk");
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Goes on behind a whole line; true at the end of the body.
    fn after(&mut self, line: &[u8]) -> Result<bool> {
        self.next = match self.next {
            Next::DataEnd => {
                ensure!(line.is_empty(), "a chunk is longer than it said");
                Next::Size
            }
            Next::Trailer if line.is_empty() => return Ok(true),
            Next::Trailer => Next::Trailer,
            Next::Size | Next::Data(_) => match size(line).context("a chunk has no size")? {
                0 => Next::Trailer,
                size => Next::Data(size),
            },
        };
        Ok(false)
    }
}

fn size(line: &[u8]) -> Option<u64> {
    let digits = line.split(|byte| *byte == b';').next()?.trim_ascii();
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}
