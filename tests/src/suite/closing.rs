//! The ends of a connection: half-closes, truncations, resets, a tampered record. A clean end passes on as one; an
//! unclean one never does.

use crate::client::handshake::{SUITES, Suite, TLS12_AES_128, TLS13_AES_256};
use crate::client::record::{ALERT, DATA};
use crate::client::{BAD_RECORD_MAC, Client, Ended, How};
use crate::environment::{Environment, Relay};
use crate::exchange::Setup;
use crate::pattern::Pattern;
use crate::run::{Context, Test};
use crate::scrape::Metrics;
use crate::upstream::{PeerEnd, Stream};
use anyhow::{Context as _, Result, ensure};
use std::thread;
use std::time::Duration;

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
    add("a_tampered_record_ends_with_bad_record_mac_and_nothing_behind_it_passes", tampered);
    add("nothing_behind_close_notify_reaches_the_upstream", after_close_notify);
    add("an_alert_of_the_client_resets_the_upstream", client_alert);
    tests
}

const VERSIONS: [Suite; 2] = [TLS13_AES_256, TLS12_AES_128];
const DOORS: [u64; 2] = [0, 16_384];
/// Moved each way before the scene begins: past both doors.
const WARM_BYTES: u64 = 40_000;
const BIG_BYTES: u64 = 3 << 20;

/// Plays a scene on a fresh connection for each version and door; all of them must end in the same way.
fn scenes(
    ctx: &Context,
    relay: Relay,
    suites: &[Suite],
    how: &str,
    scene: fn(&Context, Client, Stream) -> Result<()>,
) -> Result<Metrics> {
    let setup = Setup::manual(ctx, relay, &DOORS)?;
    let mut played = 0;
    for suite in suites {
        for (listener, door) in DOORS.into_iter().enumerate() {
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
