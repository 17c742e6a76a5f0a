//! What peers do wrong: each has its alert or its close, is counted and logged with stage and reason, and touches nobody
//! else.

use super::programs::openssl;
use crate::client::handshake::{
    Offer, Prepared, Suite, TLS12_AES_128, TLS12_AES_256, TLS12_CHACHA, TLS13_AES_128, TLS13_AES_256, prepare,
};
use crate::client::record::{DATA, HANDSHAKE, MAX_PLAINTEXT_BYTES};
use crate::client::{Client, How, NO_RENEGOTIATION, RECORD_OVERFLOW, UNEXPECTED_MESSAGE};
use crate::environment::{Environment, Relay};
use crate::exchange::{Plan, Setup};
use crate::pattern::{Pattern, Random};
use crate::run::{Context, Test};
use crate::upstream::{PeerEnd, Stream};
use anyhow::{Context as _, Result, ensure};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::Stdio;
use std::time::Instant;

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |name, run| tests.extend(Test::some_guests(env, name, run));
    add("what_is_no_client_hello_is_refused", no_hello);
    add("a_client_hello_in_small_records_is_understood", fragmented_hello);
    add("a_fallback_in_small_records_is_refused_as_in_one", fragmented_fallback);
    add("a_tampered_finished_is_refused", tampered_finished);
    add("a_record_that_is_none_ends_the_connection_alone", bad_records);
    add("a_record_that_is_none_behind_a_full_one_ends_the_connection_too", bad_records_behind_a_full_one);
    add("a_record_of_padding_alone_is_an_unexpected_message", padding_alone);
    add("a_tls12_client_hello_after_the_handshake_gets_no_renegotiation", renegotiation);
    add("records_without_data_are_borne", empty_records);
    add("offers_below_the_policy_are_refused", weak_offers);
    tests
}

/// Sends raw bytes, takes what comes back.
fn raw(ctx: &Context, setup: &Setup, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut socket = TcpStream::connect(setup.proxy.address(0))?;
    socket.set_read_timeout(Some(ctx.environment.patience()))?;
    socket.write_all(bytes)?;
    let mut answer = Vec::new();
    match socket.read_to_end(&mut answer) {
        Err(e) if e.kind() != std::io::ErrorKind::ConnectionReset => Err(e).context("read the answer"),
        Ok(_) | Err(_) => Ok(answer),
    }
}

fn no_hello(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::manual(ctx, relay, &[0])?;
    let (mut bystander, other) = setup.open(ctx, 0, TLS13_AES_128, 1_000)?;
    let mut random = Random::new(3);
    let garbage: Vec<u8> = (0..5_000).map(|_| random.next() as u8).collect();
    let sslv2 = [&[0x80, 0x2e, 0x01, 0x00, 0x02, 0x00, 0x15, 0x00, 0x00, 0x00, 0x10][..], &[7; 37]].concat();
    // A ClientHello of which the record says that it is 65,535 bytes long, and one that ends in its middle.
    let long = [&[22, 3, 1, 0xff, 0xff, 1][..], &[0; 2_000]].concat();
    let broken = [22, 3, 1, 0, 9, 1, 0, 0, 5, 3, 3, 1, 2, 3];
    let cases: [(&str, &[u8]); 6] = [
        ("plain HTTP", b"GET / HTTP/1.1\r\nHost: test.example\r\n\r\n"),
        ("SSLv2", &sslv2),
        ("garbage", &garbage),
        ("too long", &long),
        ("broken", &broken),
        ("an alert", &[21, 3, 1, 0, 2, 2, 40]),
    ];
    for (index, (what, bytes)) in cases.into_iter().enumerate() {
        let answer = raw(ctx, &setup, bytes).with_context(|| what)?;
        let alert = answer.is_empty() || (answer[0] == 21 && answer.len() == 7);
        ensure!(alert, "{what}: the answer is {answer:02x?}");
        let failed = index as u64 + 1;
        setup.proxy.wait_for(what, |m| m.ended("handshake_failed") + m.ended("client_alert") == failed)?;
        setup.check_bystander(&mut bystander, &other)?;
    }
    // The log is written by a thread of its own.
    let explained = |log: &str| {
        let lines = log.lines().filter(|l| l.contains("\"stage\":\"handshake\"") && !l.contains("\"reason\":\"\""));
        lines.count() == cases.len()
    };
    let deadline = Instant::now() + ctx.environment.patience();
    while !explained(&setup.proxy.log()) {
        let log = setup.proxy.log();
        ensure!(Instant::now() < deadline, "not every failure has its line with stage and reason: {log}");
        std::thread::sleep(ctx.environment.moment());
    }
    drop((bystander, other));
    setup.finish(ctx).map(drop)
}

fn fragmented_hello(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0, 16_384])?;
    for listener in 0..2 {
        for suite in [TLS13_AES_256, TLS12_AES_128] {
            for bytes in [1, 7, 100] {
                let offer = Offer::new(ctx, suite)?.hello_in_records_of(bytes);
                let client = Client::connect(ctx, setup.proxy.address(listener), &offer);
                let client = client.with_context(|| format!("{}, records of {bytes} bytes", suite.name))?;
                let ended = crate::exchange::run(client, &Plan::new(50_000, 50_000))?.ended;
                ensure!((ended.bytes, ended.how) == (50_000, How::CloseNotify), "{ended:?}");
                setup.upstream.served()?;
            }
        }
    }
    setup.finish(ctx).map(drop)
}

/// RFC 7507. rustls moves the parts of a message together where they lie, and then no records are left to be read there.
fn fragmented_fallback(ctx: &Context, relay: Relay) -> Result<()> {
    const INAPPROPRIATE_FALLBACK: [u8; 7] = [21, 3, 3, 0, 2, 2, 86];
    let setup = Setup::manual(ctx, relay, &[0, 16_384])?;
    let suites = [0, 4, 0xc0, 0x2b, 0x56, 0x00];
    let body = [&[3, 3][..], &[7; 32], &[0], &suites, &[1, 0]].concat();
    let hello = [&[1, 0, 0, body.len() as u8][..], &body].concat();
    for bytes in [1, 2, 7, 20, 100] {
        let records: Vec<u8> =
            hello.chunks(bytes).flat_map(|part| [&[22, 3, 1, 0, part.len() as u8], part].concat()).collect();
        let answer = raw(ctx, &setup, &records)?;
        ensure!(answer == INAPPROPRIATE_FALLBACK, "records of {bytes} bytes: the answer is {answer:02x?}");
    }
    setup.finish(ctx).map(drop)
}

fn tampered_finished(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0])?;
    let Prepared { mut client, mut last_flight, .. } =
        prepare(ctx, setup.proxy.address(0), &Offer::new(ctx, TLS13_AES_256)?)?;
    *last_flight.last_mut().context("no last flight")? ^= 1;
    client.tx.write(&last_flight)?;
    // The server's alert may be under keys that this client has left behind.
    let mut rest = Vec::new();
    let _ = client.socket().read_to_end(&mut rest);
    ensure!(rest.first().is_none_or(|kind| matches!(kind, 21 | 23)), "the answer is {rest:02x?}");
    drop(client);
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("handshake_failed") == 1, "endings: {}", metrics.endings());
    Ok(())
}

type Spoil = fn(&mut Client) -> Result<Vec<u8>>;

/// Whatever cannot be a record of this connection: a fatal alert, a reset upstream.
fn bad_records(ctx: &Context, relay: Relay) -> Result<()> {
    each_bad_record(ctx, relay, 0)
}

/// What came before it is in a pipe by then, and the kernel tells of a malformed header once.
fn bad_records_behind_a_full_one(ctx: &Context, relay: Relay) -> Result<()> {
    each_bad_record(ctx, relay, MAX_PLAINTEXT_BYTES as u64)
}

fn each_bad_record(ctx: &Context, relay: Relay, before: u64) -> Result<()> {
    let setup = Setup::manual(ctx, relay, &[0, 16_384])?;
    let (mut bystander, other) = setup.open(ctx, 0, TLS13_AES_128, 1_000)?;
    let cases: [(&str, Option<u8>, Spoil); 7] = [
        ("16385 bytes of plaintext", Some(RECORD_OVERFLOW), |c| c.tx.seal(DATA, &Pattern::up().bytes(16_385), 0)),
        ("a header of 17000 bytes", None, |_| Ok([&[23, 3, 3, 0x42, 0x68][..], &[1; 17_000]].concat())),
        ("type 99", None, |c| c.tx.seal(99, b"what", 0)),
        ("plain HTTP", None, |_| Ok(b"GET / HTTP/1.1\r\n\r\n and so on".to_vec())),
        ("version 9.9", None, |c| {
            let mut record = c.tx.seal(DATA, b"data", 0)?;
            record[1..3].copy_from_slice(&[9, 9]);
            Ok(record)
        }),
        ("a record shorter than its tag", None, |_| {
            // The kernel looks at a header with the explicit nonce behind it, so more must follow.
            Ok([&[23, 3, 3, 0, 5, 1, 2, 3, 4, 5][..], &[23, 3, 3, 0, 5, 1, 2, 3, 4, 5]].concat())
        }),
        ("a plain ChangeCipherSpec", None, |_| Ok([20, 3, 3, 0, 1, 1].repeat(40))),
    ];
    for (what, alert, spoil) in cases {
        for (listener, suite) in [(0, TLS13_AES_256), (1, TLS13_AES_128), (0, TLS12_AES_256), (1, TLS12_CHACHA)] {
            let scene = || spoiled(&setup, setup.open(ctx, listener, suite, 40_000)?, alert, before, spoil);
            scene().with_context(|| format!("{what}, {}, listener {listener}", suite.name))?;
            setup.check_bystander(&mut bystander, &other)?;
        }
    }
    drop((bystander, other));
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("internal") == 0, "endings: {}", metrics.endings());
    ctx.note(&format!("endings: {}", metrics.endings()));
    Ok(())
}

/// `data` bytes in a record of their own go before the one that is none, in the same write.
fn spoiled(
    setup: &Setup,
    (mut client, stream): (Client, Stream),
    alert: Option<u8>,
    data: u64,
    spoil: Spoil,
) -> Result<()> {
    let before = setup.proxy.metrics()?;
    let mut records = Vec::new();
    if data > 0 {
        client.tx.seal_data(&mut records, Pattern::up().at(40_000, data as usize), 0)?;
    }
    records.extend(spoil(&mut client)?);
    // They may be refused before they have been taken whole.
    let _ = client.tx.write(&records);
    let ended = client.rx.drain(None)?;
    ensure!(ended.bytes == 0, "data came: {ended:?}");
    match (alert, ended.how) {
        (Some(want), How::Alert(got)) => ensure!(want == got, "alert {got} instead of {want}"),
        (Some(want), other) => anyhow::bail!("no alert {want}, but {other:?}"),
        (None, How::CloseNotify) => anyhow::bail!("it passed for a clean end"),
        (None, _) => {}
    }
    let (up, end) = stream.drain(Pattern::up(), 40_000)?;
    ensure!(up <= 40_000 + data && end == PeerEnd::Reset, "the upstream saw {up} bytes and {end:?}");
    drop(client);
    let ended = before.ended_any() + 1;
    setup.proxy.wait_for("the end to be counted", |m| m.ended_any() == ended)?;
    Ok(())
}

/// RFC 8446 section 5.4. Behind the door the kernel finds its own word for it.
fn padding_alone(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::manual(ctx, relay, &[1 << 30])?;
    let (mut client, stream) = setup.open(ctx, 0, TLS13_AES_128, 1_000)?;
    let record = client.tx.seal(0, &[], 100)?;
    client.tx.write(&record)?;
    let ended = client.rx.drain(None)?;
    ensure!(ended.how == How::Alert(UNEXPECTED_MESSAGE), "the client saw {ended:?}");
    let (_, end) = stream.drain(Pattern::up(), 1_000)?;
    ensure!(end == PeerEnd::Reset, "the upstream saw {end:?}");
    drop(client);
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("unexpected_message") == 1, "endings: {}", metrics.endings());
    Ok(())
}

fn renegotiation(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::manual(ctx, relay, &[0, 16_384])?;
    let mut played = 0;
    for listener in 0..2 {
        for suite in [TLS12_AES_128, TLS12_AES_256, TLS12_CHACHA] as [Suite; 3] {
            let (mut client, stream) = setup.open(ctx, listener, suite, 40_000)?;
            let mut hello = vec![1, 0, 0, 41, 3, 3];
            hello.extend([9; 32]);
            hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
            let record = client.tx.seal(HANDSHAKE, &hello, 0)?;
            client.tx.write(&record)?;
            let what = format!("{}, listener {listener}", suite.name);
            let ended = client.rx.drain(None).with_context(|| what.clone())?;
            ensure!(ended.how == How::Alert(NO_RENEGOTIATION), "{what}: the client saw {ended:?}");
            let (_, end) = stream.drain(Pattern::up(), 40_000)?;
            ensure!(end == PeerEnd::Reset, "{what}: the upstream saw {end:?}");
            played += 1;
        }
    }
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("renegotiation") == played, "endings: {}", metrics.endings());
    Ok(())
}

/// Legal, if odd (RFC 8446 section 5.4; RFC 5246 section 6.2.1), as long as it is no flood.
fn empty_records(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::manual(ctx, relay, &[0, 16_384])?;
    for listener in 0..2 {
        for suite in [TLS13_AES_256, TLS12_AES_128, TLS12_CHACHA] {
            let (mut client, stream) = setup.open(ctx, listener, suite, 40_000)?;
            let mut bytes = Vec::new();
            for n in 0..20 {
                for _ in 0..n % 5 {
                    bytes.extend(client.tx.seal(DATA, &[], 0)?);
                }
                bytes.extend(client.tx.seal(DATA, Pattern::up().at(40_000 + n * 100, 100), 0)?);
            }
            bytes.extend(client.tx.seal(DATA, &[], 200)?);
            client.tx.write_cut(&bytes, &[1, 30, 300, 1_000], ctx.environment.moment())?;
            client.tx.close_notify()?;
            let (up, end) = stream.drain(Pattern::up(), 40_000)?;
            ensure!((up, end) == (42_000, PeerEnd::Fin), "{}: the upstream saw {up} bytes and {end:?}", suite.name);
            stream.fin()?;
            drop(stream);
            let ended = client.rx.drain(None)?;
            ensure!(ended.how == How::CloseNotify, "{}: {ended:?}", suite.name);
            client.socket().shutdown(Shutdown::Both)?;
        }
    }
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("clean") == 6, "endings: {}", metrics.endings());
    Ok(())
}

fn weak_offers(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0])?;
    let offers: [&[&str]; 5] = [
        &["-tls1", "-cipher", "ALL@SECLEVEL=0"],
        &["-tls1_1", "-cipher", "ALL@SECLEVEL=0"],
        &["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA:AES128-GCM-SHA256@SECLEVEL=0"],
        &["-tls1_2", "-cipher", "DHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES128-CCM"],
        &["-tls1_3", "-curves", "secp521r1"],
    ];
    for offer in offers {
        // The last choice of an option counts.
        let mut command = openssl(ctx, setup.proxy.address(0), TLS13_AES_128, false)?;
        let keep: Vec<_> = command.get_args().map(std::ffi::OsStr::to_owned).collect();
        let keep = keep.into_iter().filter(|a| a != "-tls1_3" && a != "-ciphersuites" && a != TLS13_AES_128.openssl);
        command = super::programs::program("openssl")?;
        command.args(keep).args(offer).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let output = command.output().context("run openssl")?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(words.contains("alert"), "{offer:?}: no alert: {words}");
    }
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("handshake_failed") == offers.len() as u64, "endings: {}", metrics.endings());
    Ok(())
}
