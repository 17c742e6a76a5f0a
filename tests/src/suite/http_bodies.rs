//! Mode http and large bodies: every byte compared, counted lengths spliced behind the door, chunks and until close too.

use crate::client::How;
use crate::environment::{Environment, Relay};
use crate::pattern::Pattern;
use crate::run::{Context, Test};
use crate::talk::{Talk, connect, setup, setup_with};
use crate::upstream::{Kind, Upstream};
use anyhow::{Context as _, Result, ensure};
use std::thread;
use std::time::Duration;

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    tests.extend(Test::each_relay(env, "http_bodies_of_each_framing_arrive_whole", framings));
    let mut big = Test::each_relay(env, "http_a_gibibyte_each_way_arrives_whole_and_is_spliced", gibibyte);
    big.iter_mut().for_each(|test| test.limit = Duration::from_secs(env.scale(240, 600)));
    tests.extend(big);
    tests
}

/// Bodies around the size of a record, and beyond what is moved in one turn.
const SIZES_BYTES: [u64; 7] = [0, 1, 16_383, 16_384, 16_385, 300_000, 3_000_001];

fn framings(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    // Under emulation a client may be slow to have its next body ready.
    let setup = setup_with(ctx, relay, &[0, 1, 100_000], upstream, |s| s.http("upstream_idle = \"1m\""))?;
    for listener in 0..3 {
        let mut client = connect(ctx, &setup, listener)?;
        let mut kept = None;
        for bytes in SIZES_BYTES {
            for chunked in [false, true] {
                let framing =
                    if chunked { "Transfer-Encoding: chunked".to_owned() } else { format!("Content-Length: {bytes}") };
                let head = format!("PUT /x HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n");
                let body = Pattern::up().bytes(usize::try_from(bytes)?);
                let mut tx = client.client.tx;
                let sender = thread::spawn(move || -> Result<_> {
                    let mut wire = head.into_bytes();
                    frame(&mut wire, &body, chunked);
                    tx.data(&wire)?;
                    Ok(tx)
                });
                let stream = match kept.take() {
                    Some(stream) => stream,
                    None => setup.upstream.accept()?,
                };
                take(&stream, bytes, chunked).with_context(|| format!("{bytes} bytes, chunked {chunked}"))?;
                let mut answer = format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n").into_bytes();
                frame(&mut answer, &Pattern::down().bytes(usize::try_from(bytes)?), chunked);
                let answering = thread::spawn(move || stream.send(&answer).map(|()| stream));
                client.client.tx = sender.join().expect("the sender does not panic")?;
                client.until("\r\n\r\n")?;
                let what = || format!("listener {listener}, {bytes} bytes, chunked {chunked}");
                if chunked {
                    unchunk(&mut client, bytes).with_context(what)?;
                } else {
                    client.expect(Pattern::down(), 0, bytes).with_context(what)?;
                }
                kept = Some(answering.join().expect("the server does not panic")?);
            }
        }
        let stream = kept.take().context("a connection that was kept")?;
        client.send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")?;
        crate::talk::heard(&stream, "\r\n\r\n")?;
        let answering = thread::spawn(move || {
            stream.send(&[b"HTTP/1.1 200 OK\r\n\r\n", &Pattern::down().bytes(3_000_001)[..]].concat())
        });
        client.until("\r\n\r\n")?;
        client.expect(Pattern::down(), 0, 3_000_001)?;
        ensure!(client.rest()? == (String::new(), How::CloseNotify), "until close: more, or another end");
        answering.join().expect("the server does not panic")?;
    }
    setup.finish(ctx).map(drop)
}

fn frame(wire: &mut Vec<u8>, body: &[u8], chunked: bool) {
    if !chunked {
        return wire.extend_from_slice(body);
    }
    // Chunks of several sizes, some with an extension.
    for (n, part) in body.chunks(40_001).enumerate() {
        let extension = if n % 2 == 0 { "" } else { ";a=b" };
        wire.extend_from_slice(format!("{:x}{extension}\r\n", part.len()).as_bytes());
        wire.extend_from_slice(part);
        wire.extend_from_slice(b"\r\n");
    }
    wire.extend_from_slice(b"0\r\n\r\n");
}

/// Reads a request whose body is the pattern.
fn take(stream: &crate::upstream::Stream, bytes: u64, chunked: bool) -> Result<()> {
    let head = crate::talk::heard(stream, "\r\n\r\n")?;
    ensure!(head.starts_with("PUT /x HTTP/1.1\r\n"), "{head:?}");
    let mut at = 0;
    let mut expect = |len: usize| -> Result<()> {
        let mut got = vec![0; len];
        stream.read_exactly(&mut got)?;
        Pattern::up().check(at, &got)?;
        at += len as u64;
        Ok(())
    };
    if !chunked {
        return expect(usize::try_from(bytes)?);
    }
    loop {
        let size = crate::talk::heard(stream, "\r\n")?;
        let size = usize::from_str_radix(size.trim_end(), 16)?;
        expect(size)?;
        crate::talk::heard(stream, "\r\n")?;
        if size == 0 {
            ensure!(at == bytes, "{at} of {bytes} bytes");
            return Ok(());
        }
    }
}

fn unchunk(client: &mut Talk, bytes: u64) -> Result<()> {
    let mut at = 0;
    loop {
        let size = client.until("\r\n")?;
        let size = u64::from_str_radix(size.trim_end(), 16)?;
        client.expect(Pattern::down(), at, size)?;
        at += size;
        client.until("\r\n")?;
        if size == 0 {
            ensure!(at == bytes, "{at} of {bytes} bytes");
            return Ok(());
        }
    }
}

/// The pattern's bytes are compared one by one, which is more than a hash.
fn gibibyte(ctx: &Context, relay: Relay) -> Result<()> {
    let bytes: u64 = ctx.environment.scale(1 << 30, 8 << 20);
    let setup = setup(ctx, relay, &[0], Upstream::serve(&ctx.environment, Kind::V4, crate::http::serve)?)?;
    let mut client = connect(ctx, &setup, 0)?;
    client.send(format!("GET /bytes/{bytes} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())?;
    client.until("\r\n\r\n")?;
    client.expect(Pattern::down(), 0, bytes)?;
    client.send(format!("PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: {bytes}\r\n\r\n").as_bytes())?;
    let mut sent = 0;
    while sent < bytes {
        let piece = Pattern::up().at(sent, usize::try_from((bytes - sent).min(1 << 20))?);
        client.send(piece)?;
        sent += piece.len() as u64;
    }
    client.until(&format!("took {bytes}\n"))?;
    client.finish()?;
    let metrics = setup.finish(ctx)?;
    for direction in ["in", "out"] {
        let (spliced, copied) = (metrics.payload(direction, "spliced"), metrics.payload(direction, "copied"));
        ctx.note(&format!("{direction}: {spliced} bytes spliced, {copied} copied"));
        ensure!(spliced + copied >= bytes, "{direction}: {spliced} spliced, {copied} copied");
        ensure!(!relay.splices(direction) || copied < 1 << 20, "{direction}: {copied} bytes were copied");
    }
    Ok(())
}
