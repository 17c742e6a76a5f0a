//! The ends of a connection: half-closes, truncations, resets, a tampered record. A clean end passes on as one; an
//! unclean one never does.

use crate::client::handshake::{SUITES, Suite, TLS12_AES_128, TLS13_AES_256};
use crate::client::record::{ALERT, DATA};
use crate::client::{BAD_RECORD_MAC, Client, Ended, How};
use crate::environment::{Environment, Relay};
use crate::exchange::Setup;
use crate::pattern::Pattern;
use crate::run::{Context, Test};
use crate::scrape::{Metrics, Threads};
use crate::talk;
use crate::upstream::{PeerEnd, Stream};
use anyhow::{Context as _, Result, ensure};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// How seldom tlsplice's clock ticks.
const TICK: Duration = Duration::from_millis(250);

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |name, run| tests.extend(Test::each_relay(env, name, run));
    add("client_close_notify_mid_transfer_still_drains_upstream_bytes", client_closes_first);
    add("upstream_fin_mid_upload_still_drains_client_bytes", upstream_closes_first);
    add("client_fin_without_close_notify_ends_the_download_whole_then_resets_the_upstream", truncated_client);
    add("client_fin_inside_a_record_is_a_truncation", truncated_record);
    add("client_reset_resets_the_upstream", client_reset);
    add("a_client_that_resets_after_its_own_end_is_noticed", reset_after_end);
    add("upstream_reset_gives_the_client_no_close_notify", upstream_reset);
    add("upstream_reset_under_a_blocked_upload_gives_the_client_no_close_notify", reset_under_upload);
    add("upstream_reset_under_a_blocked_request_is_no_end_of_a_response_until_close", reset_under_request);
    add("upstream_reset_behind_its_fin_leaves_the_download_whole", reset_behind_fin);
    add("a_tampered_record_ends_with_bad_record_mac_and_nothing_behind_it_passes", tampered);
    add("nothing_behind_close_notify_reaches_the_upstream", after_close_notify);
    add("an_alert_of_the_client_resets_the_upstream", client_alert);
    add("a_client_that_stays_with_half_a_header_behind_our_end_is_waited_for_at_rest", half_a_header);
    tests
}

const VERSIONS: [Suite; 2] = [TLS13_AES_256, TLS12_AES_128];
const DOORS: [u64; 2] = [0, 16_384];
/// Moved each way before the scene begins: past both doors.
const WARM_BYTES: u64 = 40_000;
const BIG_BYTES: u64 = 3 << 20;

/// Plays a scene on a fresh connection for each version and door, under emulation for each version at one of the doors; all of
/// them must end in the same way.
fn scenes(
    ctx: &Context,
    relay: Relay,
    suites: &[Suite],
    how: &str,
    scene: fn(&Context, Client, Stream) -> Result<()>,
) -> Result<Metrics> {
    let setup = Setup::manual(ctx, relay, &DOORS)?;
    let mut played = 0;
    for (n, suite) in suites.iter().enumerate() {
        for listener in ctx.environment.listeners(n, DOORS.len()) {
            let door = DOORS[listener];
            let (client, stream) = setup.open(ctx, listener, *suite, WARM_BYTES)?;
            scene(ctx, client, stream).with_context(|| format!("{}, offload_after {door}", suite.name))?;
            played += 1;
            let metrics = setup.proxy.settled()?;
            ensure!(
                metrics.ended(how) == played,
                "{}, offload_after {door}: endings: {}",
                suite.name,
                metrics.endings()
            );
        }
    }
    setup.finish(ctx)
}

/// Sends the pattern's download from `WARM_BYTES` on, in a thread, while the client does `then`.
fn while_downloading<T>(stream: &Stream, bytes: u64, fin: bool, then: impl FnOnce() -> Result<T>) -> Result<T> {
    let all = Pattern::down().bytes((WARM_BYTES + bytes) as usize);
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            stream.send(&all[WARM_BYTES as usize..])?;
            if fin { stream.fin() } else { Ok(()) }
        });
        let result = then();
        let sent = sender.join().expect("the sender does not panic");
        let result = result?;
        sent?;
        Ok(result)
    })
}

fn download(client: &mut Client) -> Result<Ended> {
    client.rx.read(u64::MAX, |at, data| Pattern::down().check(WARM_BYTES + at, data)).map(|e| e.expect("no limit"))
}

fn upload(client: &mut Client, from: u64, bytes: u64) -> Result<()> {
    let all = Pattern::up().bytes((from + bytes) as usize);
    client.tx.data(&all[from as usize..])
}

/// Nothing is to be read from such a client and nothing to be sent to it, and still its reset is told.
fn reset_after_end(ctx: &Context, relay: Relay) -> Result<()> {
    let clean = |ctx: &Context, mut client: Client, stream: Stream| {
        client.tx.close_notify()?;
        client.tx.fin()?;
        let (up, end) = stream.drain(Pattern::up(), WARM_BYTES)?;
        ensure!((up, end) == (WARM_BYTES, PeerEnd::Fin), "the upstream saw {up} bytes and {end:?}");
        client.reset()?;
        // An end of the upstream's would come too late. It looks for the reset from its clock's next tick on.
        thread::sleep(TICK + ctx.environment.moment() * 50);
        Ok(())
    };
    let cut = |ctx: &Context, client: Client, stream: Stream| {
        client.tx.fin()?;
        // For the end to have been read before the reset comes.
        thread::sleep(ctx.environment.moment() * 50);
        client.reset()?;
        let (_, end) = stream.drain(Pattern::up(), WARM_BYTES)?;
        ensure!(end == PeerEnd::Reset, "the upstream saw {end:?}");
        Ok(())
    };
    scenes(ctx, relay, &VERSIONS, "client_reset", clean)?;
    scenes(ctx, relay, &VERSIONS, "client_reset", cut).map(drop)
}

fn client_closes_first(ctx: &Context, relay: Relay) -> Result<()> {
    let scene = |_: &Context, mut client: Client, stream: Stream| {
        upload(&mut client, WARM_BYTES, 100_000)?;
        client.tx.close_notify()?;
        let (up, end) = stream.drain(Pattern::up(), WARM_BYTES)?;
        ensure!((up, end) == (WARM_BYTES + 100_000, PeerEnd::Fin), "the upstream saw {up} bytes and {end:?}");
        let ended = while_downloading(&stream, BIG_BYTES, true, || download(&mut client))?;
        ensure!(ended == Ended { bytes: BIG_BYTES, how: How::CloseNotify, fin: true }, "the client saw {ended:?}");
        Ok(())
    };
    scenes(ctx, relay, &VERSIONS, "clean", scene).map(drop)
}

fn upstream_closes_first(ctx: &Context, relay: Relay) -> Result<()> {
    let scene = |_: &Context, mut client: Client, stream: Stream| {
        while_downloading(&stream, 1_000, true, || {
            let ended = download(&mut client)?;
            ensure!(ended == Ended { bytes: 1_000, how: How::CloseNotify, fin: true }, "the client saw {ended:?}");
            Ok(())
        })?;
        thread::scope(|scope| {
            let reader = scope.spawn(|| stream.drain(Pattern::up(), WARM_BYTES));
            upload(&mut client, WARM_BYTES, BIG_BYTES)?;
            client.tx.close_notify()?;
            let (up, end) = reader.join().expect("the reader does not panic")?;
            ensure!((up, end) == (WARM_BYTES + BIG_BYTES, PeerEnd::Fin), "the upstream saw {up} bytes and {end:?}");
            Ok(())
        })
    };
    scenes(ctx, relay, &VERSIONS, "clean", scene).map(drop)
}

/// What a stream without a close_notify comes to, once the client has sent `last` and its FIN.
fn truncation(mut client: Client, stream: &Stream, up: u64, last: &[u8]) -> Result<()> {
    client.tx.write(last)?;
    client.tx.fin()?;
    let ended = while_downloading(stream, BIG_BYTES, true, || download(&mut client))?;
    ensure!(ended.bytes == BIG_BYTES, "the download was to go on to its end; the client saw {ended:?}");
    ensure!(ended.how == How::CloseNotify, "the download was complete; the client saw {ended:?}");
    let (got, end) = stream.drain(Pattern::up(), WARM_BYTES)?;
    ensure!(end == PeerEnd::Reset, "the upstream saw {end:?} after a truncated upload");
    ensure!(got <= WARM_BYTES + up, "the upstream got {got} bytes");
    Ok(())
}

fn truncated_client(ctx: &Context, relay: Relay) -> Result<()> {
    let scene = |_: &Context, mut client: Client, stream: Stream| {
        let last = client.tx.seal(DATA, Pattern::up().at(WARM_BYTES, 1_000), 0)?;
        truncation(client, &stream, 1_000, &last)
    };
    scenes(ctx, relay, &VERSIONS, "client_truncated", scene).map(drop)
}

fn truncated_record(ctx: &Context, relay: Relay) -> Result<()> {
    let scene = |_: &Context, mut client: Client, stream: Stream| {
        let mut last = client.tx.seal(DATA, Pattern::up().at(WARM_BYTES, 1_000), 0)?;
        let whole = client.tx.seal(DATA, Pattern::up().at(WARM_BYTES + 1_000, 1_000), 0)?;
        last.extend(&whole[..500]);
        truncation(client, &stream, 1_000, &last)
    };
    scenes(ctx, relay, &VERSIONS, "client_truncated", scene).map(drop)
}

fn client_reset(ctx: &Context, relay: Relay) -> Result<()> {
    let scene = |_: &Context, client: Client, stream: Stream| {
        client.reset()?;
        let (_, end) = stream.drain(Pattern::up(), WARM_BYTES)?;
        ensure!(end == PeerEnd::Reset, "the upstream saw {end:?}");
        Ok(())
    };
    scenes(ctx, relay, &VERSIONS, "client_reset", scene).map(drop)
}

fn upstream_reset(ctx: &Context, relay: Relay) -> Result<()> {
    let scene = |_: &Context, mut client: Client, stream: Stream| {
        stream.send(Pattern::down().at(WARM_BYTES, 100_000))?;
        stream.reset()?;
        let ended = download(&mut client)?;
        ensure!(ended.how != How::CloseNotify, "a reset passed for a clean end: {ended:?}");
        ensure!(ended.bytes <= 100_000, "{ended:?}");
        Ok(())
    };
    scenes(ctx, relay, &VERSIONS, "upstream_reset", scene).map(drop)
}

/// More than all queues on the way to an upstream that does not read.
const BLOCKED_BYTES: u64 = 24 << 20;

/// Uploads until nobody takes more; then the upstream does `last`. What the client saw of that, and of its upload.
fn while_blocked(ctx: &Context, client: &mut Client, last: impl FnOnce() -> Result<()>) -> Result<(Ended, Result<()>)> {
    let Client { tx, rx } = client;
    let sent = &AtomicU64::new(0);
    thread::scope(|scope| {
        let sending = scope.spawn(move || -> Result<()> {
            let mut at = 0;
            while at < BLOCKED_BYTES {
                let piece = Pattern::up().at(at, usize::try_from((BLOCKED_BYTES - at).min(1 << 16))?);
                tx.data(piece)?;
                at += piece.len() as u64;
                sent.store(at, Relaxed);
            }
            Ok(())
        });
        let mut before = u64::MAX;
        while before != sent.load(Relaxed) {
            before = sent.load(Relaxed);
            thread::sleep(ctx.environment.moment() * 100);
        }
        ensure!(before < BLOCKED_BYTES, "the upload was not blocked");
        last()?;
        let ended = rx.drain(None)?;
        Ok((ended, sending.join().expect("the sender does not panic")))
    })
}

/// That both halves are over, by a reset: it is told once, to whichever half asks first.
fn check_reset((ended, upload): (Ended, Result<()>)) -> Result<()> {
    ensure!(ended.how != How::CloseNotify, "a reset passed for a clean end: {ended:?}");
    let upload = upload.err().context("the upload went on")?;
    let error = upload.root_cause().downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    ensure!(ended.how == How::Reset || error == Some(ErrorKind::ConnectionReset), "{ended:?}, upload: {upload:#}");
    Ok(())
}

fn reset_under_upload(ctx: &Context, relay: Relay) -> Result<()> {
    let scene = |ctx: &Context, mut client: Client, stream: Stream| {
        check_reset(while_blocked(ctx, &mut client, move || {
            stream.send(Pattern::down().at(WARM_BYTES, 100_000))?;
            stream.reset()
        })?)
    };
    scenes(ctx, relay, &VERSIONS, "upstream_reset", scene).map(drop)
}

fn reset_under_request(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = talk::manual(ctx, relay, &DOORS)?;
    for (listener, door) in DOORS.into_iter().enumerate() {
        let mut client = setup.client(ctx, listener, TLS13_AES_256)?;
        let head = format!("PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: {BLOCKED_BYTES}\r\n\r\n");
        client.tx.data(head.as_bytes())?;
        let stream = setup.upstream.accept()?;
        talk::heard(&stream, "\r\n\r\n")?;
        let seen = while_blocked(ctx, &mut client, move || {
            stream.send(&[b"HTTP/1.1 200 OK\r\n\r\n", Pattern::down().at(0, 100_000)].concat())?;
            stream.reset()
        })?;
        check_reset(seen).with_context(|| format!("offload_after {door}"))?;
        drop(client);
        let metrics = setup.proxy.settled()?;
        let ended = listener as u64 + 1;
        ensure!(metrics.ended("upstream_reset") == ended, "offload_after {door}: endings: {}", metrics.endings());
    }
    setup.finish(ctx).map(drop)
}

/// What a FIN has ended is whole, whatever becomes of the connection.
fn reset_behind_fin(ctx: &Context, relay: Relay) -> Result<()> {
    let scene = |ctx: &Context, mut client: Client, stream: Stream| {
        let (ended, _) = while_blocked(ctx, &mut client, move || {
            stream.send(Pattern::down().at(WARM_BYTES, 10_000))?;
            stream.fin()?;
            stream.reset()
        })?;
        ensure!((ended.bytes, ended.how) == (10_000, How::CloseNotify), "the client saw {ended:?}");
        Ok(())
    };
    scenes(ctx, relay, &VERSIONS, "upstream_reset", scene).map(drop)
}

fn tampered(ctx: &Context, relay: Relay) -> Result<()> {
    let scene = |_: &Context, mut client: Client, stream: Stream| {
        let mut bytes = client.tx.seal(DATA, Pattern::up().at(WARM_BYTES, 1_000), 0)?;
        let start = bytes.len();
        bytes.extend(client.tx.seal(DATA, Pattern::up().at(WARM_BYTES + 1_000, 1_000), 0)?);
        bytes[start + 300] ^= 1;
        bytes.extend(client.tx.seal(DATA, Pattern::up().at(WARM_BYTES + 2_000, 1_000), 0)?);
        client.tx.write(&bytes)?;
        let ended = download(&mut client)?;
        ensure!(ended.how == How::Alert(BAD_RECORD_MAC), "the client saw {ended:?}");
        let (up, end) = stream.drain(Pattern::up(), WARM_BYTES)?;
        ensure!(up <= WARM_BYTES + 1_000 && end == PeerEnd::Reset, "the upstream saw {up} bytes and {end:?}");
        Ok(())
    };
    scenes(ctx, relay, &SUITES, "bad_record_mac", scene).map(drop)
}

fn after_close_notify(ctx: &Context, relay: Relay) -> Result<()> {
    let scene = |_: &Context, mut client: Client, stream: Stream| {
        let mut bytes = client.tx.seal(DATA, Pattern::up().at(WARM_BYTES, 1_000), 0)?;
        bytes.extend(client.tx.seal(ALERT, &[1, 0], 0)?);
        bytes.extend(client.tx.seal(DATA, Pattern::up().at(WARM_BYTES + 1_000, 9_000), 0)?);
        client.tx.write(&bytes)?;
        let (up, end) = stream.drain(Pattern::up(), WARM_BYTES)?;
        ensure!((up, end) == (WARM_BYTES + 1_000, PeerEnd::Fin), "the upstream saw {up} bytes and {end:?}");
        let ended = while_downloading(&stream, BIG_BYTES, true, || download(&mut client))?;
        ensure!((ended.bytes, ended.how) == (BIG_BYTES, How::CloseNotify), "the client saw {ended:?}");
        Ok(())
    };
    scenes(ctx, relay, &VERSIONS, "clean", scene).map(drop)
}

fn client_alert(ctx: &Context, relay: Relay) -> Result<()> {
    const INTERNAL_ERROR: u8 = 80;
    let scene = |_: &Context, mut client: Client, stream: Stream| {
        let alert = client.tx.seal(ALERT, &[2, INTERNAL_ERROR], 0)?;
        client.tx.write(&alert)?;
        let ended = download(&mut client)?;
        ensure!(ended.how != How::CloseNotify, "the client saw {ended:?}");
        let (_, end) = stream.drain(Pattern::up(), WARM_BYTES)?;
        ensure!(end == PeerEnd::Reset, "the upstream saw {end:?}");
        Ok(())
    };
    scenes(ctx, relay, &VERSIONS, "client_alert", scene).map(drop)
}

/// Behind our FIN the front of a record counts as readable, to the relay and to those who close: waiting for the rest of it
/// must not become asking for it.
fn half_a_header(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::manual(ctx, relay, &DOORS)?;
    for (listener, door) in DOORS.into_iter().enumerate() {
        for closes_first in [true, false] {
            let what = || format!("offload_after {door}, the client closes first: {closes_first}");
            let (mut client, stream) = setup.open(ctx, listener, TLS13_AES_256, WARM_BYTES)?;
            let kind = if closes_first { ALERT } else { DATA };
            let mut last = client.tx.seal(kind, &[1, 0], 0)?;
            last.extend([DATA, 3, 3]);
            if closes_first {
                client.tx.write(&last)?;
                let (_, end) = stream.drain(Pattern::up(), WARM_BYTES)?;
                ensure!(end == PeerEnd::Fin, "{}: the upstream saw {end:?}", what());
            }
            stream.fin()?;
            let ended = client.rx.drain(None)?;
            ensure!(ended == Ended { bytes: 0, how: How::CloseNotify, fin: true }, "{}: {ended:?}", what());
            if !closes_first {
                client.tx.write(&last)?;
                stream.read_exactly(&mut [0; 2])?;
            }
            rests(ctx, &setup).with_context(what)?;
        }
    }
    setup.finish(ctx).map(drop)
}

/// That tlsplice hardly does anything for a while.
fn rests(ctx: &Context, setup: &Setup) -> Result<()> {
    const CPU_SHARE: f64 = 0.3;
    let (before, started) = (Threads::of(setup.proxy.pid())?, Instant::now());
    thread::sleep(Duration::from_millis(1_500));
    let cpu = Threads::of(setup.proxy.pid())?.cpu_since(&before);
    let share = cpu.as_secs_f64() / started.elapsed().as_secs_f64();
    ctx.note(&format!("{:.1} % of the time", share * 100.0));
    ensure!(share < CPU_SHARE, "{share:.2} of the time was spent on the CPU");
    Ok(())
}
