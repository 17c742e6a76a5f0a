//! The server behind every peer: small HTTP/1.1 on one thread, so that peers that speak HTTP and peers that relay bytes do
//! the same work.
//!
//!   GET /bytes/N ─▶ N bytes of a pattern      POST /… ─▶ takes the body, answers "ok", or 400 if it must be the pattern and is not
//!
//! It holds no buffer for a waiting connection, so that many idle ones cost the machine little.

use anyhow::{Context, Result};
use std::io;
use std::net::SocketAddr;
use std::sync::LazyLock;
use tokio::net::{TcpListener, TcpStream};

/// The pattern repeats after so many bytes: a prime, so that nothing shifted looks right.
const PATTERN_PERIOD: usize = 251;
/// What is written at once; whole periods.
const CHUNK_BYTES: usize = PATTERN_PERIOD * 1024;
/// The longest head that is taken.
const HEAD_LIMIT_BYTES: usize = 16 << 10;
/// Bursts of connections wait here.
const BACKLOG: u32 = 4096;

static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| pattern(0, CHUNK_BYTES));

/// The pattern's bytes from a position on.
pub fn pattern(from: u64, count: usize) -> Vec<u8> {
    (from..).take(count).map(|at| (at % PATTERN_PERIOD as u64) as u8).collect()
}

/// Starts it on a thread of its own; gives its address. It runs until the process ends.
pub fn start(listen: SocketAddr) -> Result<SocketAddr> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .name("upstream".into())
        .spawn(move || {
            if let Err(error) = serve(listen, &sender) {
                let _ = sender.send(Err(error));
            }
        })
        .context("start the upstream's thread")?;
    receiver.recv().context("the upstream's thread ended")?
}

fn serve(listen: SocketAddr, ready: &std::sync::mpsc::Sender<Result<SocketAddr>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    runtime.block_on(async {
        let socket = match listen {
            SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4(),
            SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6(),
        }?;
        socket.set_reuseaddr(true)?;
        socket.bind(listen).with_context(|| format!("bind the upstream to {listen}"))?;
        let listener = socket.listen(BACKLOG).context("listen as upstream")?;
        let _ = ready.send(Ok(listener.local_addr()?));
        accept(&listener).await
    })
}

async fn accept(listener: &TcpListener) -> Result<()> {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                let _ = socket.set_nodelay(true);
                // A peer that hangs up in the middle is no trouble of ours.
                tokio::spawn(async move { drop(converse(&socket).await) });
            }
            // Out of descriptors, as a rule: those that close make room.
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Bytes(u64),
    Body { length: u64, checked: bool },
}

async fn converse(socket: &TcpStream) -> io::Result<()> {
    let mut pending = Vec::new();
    let mut scratch = vec![0; HEAD_LIMIT_BYTES];
    loop {
        let Some(head) = head_end(&pending) else {
            if pending.len() > HEAD_LIMIT_BYTES {
                return Err(io::Error::other("the head is too long"));
            }
            if pending.is_empty() {
                scratch = Vec::new();
                socket.readable().await?;
                scratch.resize(HEAD_LIMIT_BYTES, 0);
            }
            let count = read(socket, &mut scratch).await?;
            if count == 0 {
                return Ok(());
            }
            pending.extend_from_slice(&scratch[..count]);
            continue;
        };
        let asked = parse(&pending[..head]).ok_or_else(|| io::Error::other("no request"))?;
        pending.drain(..head);
        match asked {
            Asked::Bytes(length) => send_pattern(socket, length).await?,
            Asked::Body { length, checked } => take_body(socket, &mut pending, length, checked).await?,
        }
    }
}

fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4)
}

fn parse(head: &[u8]) -> Option<Asked> {
    let text = std::str::from_utf8(head).ok()?;
    let mut lines = text.split("\r\n");
    let mut words = lines.next()?.split(' ');
    let (method, path) = (words.next()?, words.next()?);
    if method == "GET" {
        return Some(Asked::Bytes(path.strip_prefix("/bytes/").map_or(Some(2), |n| n.parse().ok())?));
    }
    let length = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    })?;
    Some(Asked::Body { length, checked: path == "/checked" })
}

async fn read(socket: &TcpStream, into: &mut [u8]) -> io::Result<usize> {
    loop {
        socket.readable().await?;
        match socket.try_read(into) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

async fn write(socket: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match socket.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The head of an answer of so many bytes.
pub fn head(length: u64) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").into_bytes()
}

async fn send_pattern(socket: &TcpStream, length: u64) -> io::Result<()> {
    let mut first = head(length);
    let with_head = length.min(CHUNK_BYTES as u64) as usize;
    first.extend_from_slice(&PATTERN[..with_head]);
    write(socket, &first).await?;
    let mut left = length - with_head as u64;
    while left > 0 {
        let count = left.min(CHUNK_BYTES as u64) as usize;
        write(socket, &PATTERN[..count]).await?;
        left -= count as u64;
    }
    Ok(())
}

async fn take_body(socket: &TcpStream, pending: &mut Vec<u8>, length: u64, checked: bool) -> io::Result<()> {
    let mut position = 0;
    let mut right = true;
    let mut scratch = vec![0; CHUNK_BYTES];
    while position < length {
        let count = if pending.is_empty() {
            read(socket, &mut scratch).await?
        } else {
            let count = pending.len().min(scratch.len()).min((length - position) as usize);
            scratch[..count].copy_from_slice(&pending[..count]);
            pending.drain(..count);
            count
        };
        if count == 0 {
            return Err(io::Error::other("the body ends early"));
        }
        let taken = count.min((length - position) as usize);
        right &= !checked || scratch[..taken] == pattern(position, taken);
        pending.extend_from_slice(&scratch[taken..count]);
        position += taken as u64;
    }
    let answer: &[u8] = if right {
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    } else {
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno"
    };
    write(socket, answer).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        assert_eq!(parse(b"GET /bytes/1024 HTTP/1.1\r\nHost: x\r\n\r\n"), Some(Asked::Bytes(1024)));
        assert_eq!(parse(b"GET /bytes/x HTTP/1.1\r\n\r\n"), None);
        let posted = b"POST /checked HTTP/1.1\r\ncontent-length: 7\r\n\r\n";
        assert_eq!(parse(posted), Some(Asked::Body { length: 7, checked: true }));
        assert_eq!(parse(b"POST / HTTP/1.1\r\n\r\n"), None);
    }
}
