//! HTTP as bytes: a client that says what it is told to and cuts the answers apart, and a server in the test's hands.

use crate::client::handshake::{Offer, Suite, TLS13_AES_256};
use crate::client::{Client, How};
use crate::environment::Relay;
use crate::exchange::Setup;
use crate::pattern::Pattern;
use crate::proxy::Settings;
use crate::run::Context;
use crate::upstream::{Kind, PeerEnd, Served, Stream, Upstream};
use anyhow::{Context as _, Result, ensure};

/// A tlsplice in mode http before this upstream, with a listener for each threshold.
pub fn setup(ctx: &Context, relay: Relay, doors: &[u64], upstream: Upstream) -> Result<Setup> {
    setup_with(ctx, relay, doors, upstream, |settings| settings)
}

pub fn setup_with(
    ctx: &Context,
    relay: Relay,
    doors: &[u64],
    upstream: Upstream,
    change: impl FnOnce(Settings) -> Settings,
) -> Result<Setup> {
    Setup::with(ctx, relay, doors, upstream, |settings| change(settings.mode("http")))
}

/// The upstream's connections are in the test's hands.
pub fn manual(ctx: &Context, relay: Relay, doors: &[u64]) -> Result<Setup> {
    setup(ctx, relay, doors, Upstream::manual(&ctx.environment, Kind::V4)?)
}

/// A client, and what it was sent and has not looked at.
#[derive(Debug)]
pub struct Talk {
    pub client: Client,
    got: Vec<u8>,
}

pub fn connect(ctx: &Context, setup: &Setup, listener: usize) -> Result<Talk> {
    connect_by(ctx, setup, listener, TLS13_AES_256)
}

pub fn connect_by(ctx: &Context, setup: &Setup, listener: usize, suite: Suite) -> Result<Talk> {
    Ok(Talk { client: setup.client(ctx, listener, suite)?, got: Vec::new() })
}

impl Talk {
    pub fn send(&mut self, text: impl AsRef<[u8]>) -> Result<()> {
        self.client.tx.data(text.as_ref())
    }

    /// Receives once more. `Some`: how the stream ended.
    fn more(&mut self) -> Result<Option<How>> {
        let got = &mut self.got;
        let ended = self.client.rx.read(1, |_, data| {
            got.extend_from_slice(data);
            Ok(())
        })?;
        Ok(ended.map(|ended| ended.how))
    }

    /// The next bytes, up to and with this text.
    pub fn until(&mut self, end: &str) -> Result<String> {
        loop {
            if let Some(at) = self.got.windows(end.len()).position(|w| w == end.as_bytes()) {
                return Ok(String::from_utf8(self.got.drain(..at + end.len()).collect())?);
            }
            let ended = self.more()?;
            ensure!(ended.is_none(), "{ended:?} after {:?}", String::from_utf8_lossy(&self.got));
        }
    }

    /// Exactly so many bytes of the pattern, from this place on.
    pub fn expect(&mut self, pattern: Pattern, from: u64, len: u64) -> Result<()> {
        let mut at = 0;
        while at < len {
            let n = usize::try_from(len - at)?.min(self.got.len());
            pattern.check(from + at, &self.got[..n])?;
            self.got.drain(..n);
            at += n as u64;
            if at < len {
                let ended = self.more()?;
                ensure!(ended.is_none(), "{ended:?} after {at} of {len} bytes");
            }
        }
        Ok(())
    }

    /// All that still comes, as text, and how it ended.
    pub fn rest(&mut self) -> Result<(String, How)> {
        loop {
            if let Some(how) = self.more()? {
                return Ok((String::from_utf8_lossy(&std::mem::take(&mut self.got)).into_owned(), how));
            }
        }
    }

    pub fn finish(self) -> Result<()> {
        let ended = self.client.finish()?;
        ensure!(self.got.is_empty() && ended.bytes == 0, "more came than was asked for: {ended:?}");
        Ok(())
    }
}

/// A client that sends ALPN too.
pub fn connect_with_alpn(ctx: &Context, setup: &Setup, protocols: &[&str]) -> Result<Option<String>> {
    let offer = Offer::new(ctx, TLS13_AES_256)?.alpn(protocols);
    let prepared = crate::client::handshake::prepare(ctx, setup.proxy.address(0), &offer)?;
    let alpn = prepared.facts.alpn.clone();
    prepared.complete()?.finish()?;
    Ok(alpn)
}

/// The next bytes of an upstream's connection, up to and with this text.
pub fn heard(stream: &Stream, end: &str) -> Result<String> {
    let mut got = Vec::new();
    let mut byte = [0];
    while !got.ends_with(end.as_bytes()) {
        stream.read_exactly(&mut byte).with_context(|| format!("after {:?}", String::from_utf8_lossy(&got)))?;
        got.push(byte[0]);
    }
    Ok(String::from_utf8(got)?)
}

/// Everything that still comes to an upstream's connection, and its end.
pub fn heard_to_end(stream: &Stream) -> Result<(String, PeerEnd)> {
    let mut got = Vec::new();
    let mut buf = vec![0; 1 << 16];
    loop {
        match stream.read_some(&mut buf)? {
            Ok(0) => return Ok((String::from_utf8_lossy(&got).into_owned(), PeerEnd::Fin)),
            Ok(n) => got.extend_from_slice(&buf[..n]),
            Err(end) => return Ok((String::from_utf8_lossy(&got).into_owned(), end)),
        }
    }
}

/// A server that answers each request with what it heard: its head, and its body in full.
pub fn echo(stream: Stream) -> Result<Served> {
    let mut served = Served { up: 0, down: 0, end: PeerEnd::Fin };
    let mut buf = vec![0; 1 << 16];
    let mut got: Vec<u8> = Vec::new();
    loop {
        while let Some(len) = request_len(&got)? {
            let body = got[..len].to_vec();
            got.drain(..len);
            served.up += len as u64;
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.send(&[head.as_bytes(), &body].concat())?;
            served.down += body.len() as u64;
        }
        match stream.read_some(&mut buf)? {
            Ok(0) => break,
            Ok(n) => got.extend_from_slice(&buf[..n]),
            Err(end) => {
                served.end = end;
                break;
            }
        }
    }
    ensure!(
        got.is_empty() || served.end == PeerEnd::Reset,
        "half a request with a clean end: {:?}",
        String::from_utf8_lossy(&got)
    );
    Ok(served)
}

/// The length of the whole request at the front, read in the one way that there is. An error: it could be read otherwise.
fn request_len(bytes: &[u8]) -> Result<Option<usize>> {
    let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&bytes[..end])?;
    ensure!(!head.replace("\r\n", "").contains(['\r', '\n', '\0']), "bare line ends in {head:?}");
    let values = |name: &str| -> Vec<String> {
        let fields = head.split("\r\n").skip(1).filter_map(|line| line.split_once(':'));
        fields.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim().to_owned()).collect()
    };
    let (lengths, codings) = (values("content-length"), values("transfer-encoding"));
    ensure!(lengths.len() + codings.len() <= 1, "framed twice: {head:?}");
    ensure!(values("host").len() == 1, "not one Host: {head:?}");
    let body = &bytes[end + 4..];
    let len = match (lengths.first(), codings.first()) {
        (Some(length), _) => Some(length.parse()?),
        (None, Some(coding)) => {
            ensure!(coding == "chunked", "{coding}");
            chunked_len(body)?
        }
        (None, None) => Some(0),
    };
    Ok(len.map(|len| end + 4 + len).filter(|len| *len <= bytes.len()))
}

fn chunked_len(body: &[u8]) -> Result<Option<usize>> {
    let mut at = 0;
    loop {
        let Some(line) = body[at..].windows(2).position(|w| w == b"\r\n") else { return Ok(None) };
        let size = usize::from_str_radix(std::str::from_utf8(&body[at..at + line])?, 16)?;
        at += line + 2;
        if size == 0 {
            let Some(end) = body[at - 2..].windows(4).position(|w| w == b"\r\n\r\n") else { return Ok(None) };
            return Ok(Some(at - 2 + end + 4));
        }
        at += size + 2;
        if at > body.len() {
            return Ok(None);
        }
    }
}
