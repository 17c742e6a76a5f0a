//! An HTTP/1.1 server that is just enough for curl: `GET /bytes/N` and `PUT` of a pattern, on a connection that is kept.

use crate::pattern::Pattern;
use crate::upstream::{PeerEnd, Served, Stream};
use anyhow::{Context as _, Result, bail, ensure};
use std::io::{BufRead, BufReader, Read, Write};

pub fn serve(stream: Stream) -> Result<Served> {
    let mut reader = BufReader::new(&stream);
    let mut served = Served { up: 0, down: 0, end: PeerEnd::Fin };
    while let Some(head) = Head::read(&mut reader)? {
        match (head.method.as_str(), head.path.strip_prefix("/bytes/")) {
            ("GET", Some(len)) => {
                let len: u64 = len.parse().context("GET /bytes/N")?;
                answer(&stream, len)?;
                let mut sent = 0;
                while sent < len {
                    let piece = Pattern::down().at(sent, usize::try_from(len - sent)?);
                    stream.send(piece)?;
                    sent += piece.len() as u64;
                }
                served.down += len;
            }
            ("PUT" | "POST", _) => {
                served.up += take(&mut reader, head.length)?;
                let text = format!("took {}\n", head.length);
                answer(&stream, text.len() as u64)?;
                stream.send(text.as_bytes())?;
            }
            (method, _) => bail!("no answer to {method} {}", head.path),
        }
    }
    Ok(served)
}

fn answer(mut stream: &Stream, len: u64) -> Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {len}\r\n\r\n")?;
    Ok(())
}

fn take(reader: &mut impl Read, len: u64) -> Result<u64> {
    let mut buf = vec![0; 1 << 16];
    let mut taken = 0;
    while taken < len {
        let want = usize::try_from((len - taken).min(1 << 16))?;
        let n = reader.read(&mut buf[..want]).context("read a body")?;
        ensure!(n > 0, "a body of {len} bytes ended after {taken}");
        Pattern::up().check(taken, &buf[..n])?;
        taken += n as u64;
    }
    Ok(taken)
}

struct Head {
    method: String,
    path: String,
    length: u64,
}

impl Head {
    /// `None` at a clean end.
    fn read(reader: &mut impl BufRead) -> Result<Option<Self>> {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let mut words = line.split_whitespace();
        let method = words.next().context("no method")?.to_owned();
        let path = words.next().context("no path")?.to_owned();
        let mut length = 0;
        loop {
            let mut line = String::new();
            ensure!(reader.read_line(&mut line)? > 0, "a head that is cut");
            if line.trim().is_empty() {
                return Ok(Some(Self { method, path, length }));
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse()?;
            }
        }
    }
}
