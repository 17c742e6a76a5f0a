//! KeyUpdates of our own client: many, in a row, malformed, unanswered; and the key that tlsplice itself has to renew.

use crate::client::handshake::{Suite, TLS13_AES_128, TLS13_AES_256, TLS13_CHACHA};
use crate::client::record::{DATA, HANDSHAKE};
use crate::client::{Client, Ended, How};
use crate::environment::{Environment, Relay};
use crate::exchange::{self, Account, Plan, Setup, Updates};
use crate::pattern::Pattern;
use crate::run::{Context, Test};
use crate::scrape::Threads;
use crate::upstream::{Kind, PeerEnd, Request, Upstream, exchange as serve};
use anyhow::{Context as _, Result, ensure};
use std::time::Duration;

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |name, run| tests.extend(Test::each_relay(env, name, run));
    add("a_storm_of_key_updates_without_data_is_ended_after_32", storm);
    add("thirty_two_key_updates_in_a_row_are_borne", thirty_two);
    add("malformed_key_updates_end_the_connection", malformed);
    if env.rekeys() {
        add("thousands_of_key_updates_with_data_between_lose_nothing", thousands);
        add("a_client_that_rekeys_by_volume_like_a_jdk_sees_no_reset", like_a_jdk);
        add("key_updates_in_any_framing_are_followed", framings);
        add("replies_owed_to_a_reader_that_stalls_are_sent_later", replies_owed);
        add("tlsplice_renews_its_own_key_before_the_limit", own_limit);
    } else {
        add("a_key_update_past_the_door_drains_the_download_and_ends_cleanly", no_rekey_download);
        add("a_key_update_past_the_door_resets_an_unfinished_upload", no_rekey_upload);
        add("an_exhausted_key_ends_the_connection_before_the_limit", exhausted);
    }
    tests
}

fn thousands(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0])?;
    let (updates, every) = (ctx.environment.scale(10_000, 3_000), 200);
    let plan = Plan::new(updates * every, 4 << 20).ragged(11).updates(Updates::Every(every));
    // A download that is over before the first of them has come would take our half with it.
    let plan = plan.with(|request| request.hold = true);
    let plan = Plan { records: (1, 700), cut_every: 900, ..plan };
    let outcome = setup.transfer(ctx, 0, TLS13_AES_256, &plan)?;
    ensure!(outcome.key_updates_sent >= updates, "only {} were sent", outcome.key_updates_sent);
    ensure!(outcome.client.rx.key_updates > 0, "half of them asked, none was answered");
    let metrics = setup.finish(ctx)?;
    if relay.offloads() {
        let received = metrics.sum("tlsplice_key_updates_total", &[("direction", "received")]);
        ensure!(received == outcome.key_updates_sent, "sent {}, counted {received}", outcome.key_updates_sent);
    }
    Ok(())
}

/// `jdk.tls.keyLimits` at 2^16 and 2^20: a KeyUpdate that asks for one, after so many bytes, sent or received.
fn like_a_jdk(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0, 16_385])?;
    for listener in 0..2 {
        for limit in [1_u64 << 16, 1 << 20] {
            // More in a row without data than a storm has, and yet none: the download goes on between them.
            let bytes = if limit == 1 << 16 { 80 * limit } else { 8 * limit };
            let updates = (1..8).map(|n| (n * limit, true)).collect();
            let up = Plan::new(bytes, 1_000).updates(Updates::At(updates));
            setup.transfer(ctx, listener, TLS13_AES_128, &up)?;
            download_rekeying(ctx, &setup, listener, limit, bytes)?;
        }
    }
    setup.finish(ctx).map(drop)
}

/// The reader sends a KeyUpdate that asks for one whenever it has received `limit` bytes.
fn download_rekeying(ctx: &Context, setup: &Setup, listener: usize, limit: u64, bytes: u64) -> Result<()> {
    let mut client = setup.client(ctx, listener, TLS13_AES_256)?;
    client.tx.data(&Request::new(0, bytes).encode())?;
    let mut received = 0;
    let mut next = limit;
    while received < bytes {
        let Client { tx, rx } = &mut client;
        let from = received;
        let ended = rx.read(next.min(bytes) - from, |at, data| {
            received = from + at + data.len() as u64;
            Pattern::down().check(from + at, data)
        })?;
        ensure!(ended.is_none(), "after {received} of {bytes} bytes: {ended:?}");
        next += limit;
        tx.key_update(true)?;
    }
    // What was on its way before the first of them was read needs no answer.
    let (asked, answered) = (client.tx.key_updates, client.rx.key_updates);
    ensure!(answered <= asked, "asked for {asked}, got {answered}");
    client.finish()?;
    setup.upstream.served().map(drop)
}

/// Doubled, with data in the same segment, byte by byte, with padding.
fn framings(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0, 1])?;
    for listener in 0..2 {
        for suite in [TLS13_AES_128, TLS13_AES_256, TLS13_CHACHA] {
            let mut client = setup.client(ctx, listener, suite)?;
            let mut bytes = Vec::new();
            client.tx.seal_data(&mut bytes, &Request::new(3_000, 3_000).encode(), 0)?;
            bytes.extend(client.tx.seal(DATA, Pattern::up().at(0, 1_000), 0)?);
            client.tx.seal_key_update(&mut bytes, true)?;
            client.tx.seal_key_update(&mut bytes, false)?;
            bytes.extend(client.tx.seal(DATA, Pattern::up().at(1_000, 1_000), 500)?);
            client.tx.write(&bytes)?;
            let mut bytes = client.tx.seal(HANDSHAKE, &[24, 0, 0, 1, 1], 300)?;
            client.tx.ratchet()?;
            bytes.extend(client.tx.seal(DATA, Pattern::up().at(2_000, 1_000), 0)?);
            let cuts: Vec<usize> = (1..60).collect();
            client.tx.write_cut(&bytes, &cuts, ctx.environment.moment() / 4)?;
            client.tx.close_notify()?;
            let ended = client.rx.drain(Some(Pattern::down())).with_context(|| suite.name)?;
            ensure!(ended.bytes == 3_000 && ended.how == How::CloseNotify, "{}: {ended:?}", suite.name);
            let served = setup.upstream.served()?;
            ensure!((served.up, served.end) == (3_000, PeerEnd::Fin), "{}: {served:?}", suite.name);
        }
    }
    setup.finish(ctx).map(drop)
}

/// More than any limit allows, as fast as it goes: the connection is ended, and costs little until it is.
fn storm(ctx: &Context, relay: Relay) -> Result<()> {
    // Less than a socket buffer, so that the client's FIN is seen behind it.
    let sent = ctx.environment.scale(2_000, 500);
    const CPU_LIMIT: Duration = Duration::from_secs(5);
    for asks in [false, true] {
        let setup = Setup::exchanging(ctx, relay, &[0])?;
        let bystander = setup.client(ctx, 0, TLS13_AES_128)?;
        let mut client = setup.client(ctx, 0, TLS13_AES_256)?;
        let before = Threads::of(setup.proxy.pid())?;
        let mut bytes = Vec::new();
        for _ in 0..sent {
            client.tx.seal_key_update(&mut bytes, asks)?;
        }
        // It may be reset before all is sent.
        let _ = client.tx.write(&bytes);
        let ended = client.rx.drain(None)?;
        // Where the kernel cannot rekey, the first one ends the connection, and cleanly.
        let storms = if ctx.environment.rekeys() { "key_update_storm" } else { "no_rekey" };
        let may_be_clean = storms == "no_rekey";
        ensure!(ended.bytes == 0 && (ended.how != How::CloseNotify || may_be_clean), "{ended:?}");
        drop(client);
        setup.proxy.wait_for("the storm to be ended", |m| m.ended(storms) == 1)?;
        let spent = Threads::of(setup.proxy.pid())?.cpu_since(&before);
        ctx.note(&format!("asks {asks}: ended with {:?} after {spent:?} of CPU", ended.how));
        ensure!(spent < CPU_LIMIT, "a storm cost {spent:?} of CPU");
        exchange_with(bystander)?;
        setup.finish(ctx)?;
    }
    Ok(())
}

/// A connection that stood by while another misbehaved still works.
fn exchange_with(client: Client) -> Result<()> {
    let outcome = exchange::run(client, &Plan::new(50_000, 50_000)).context("the bystander")?;
    ensure!(
        outcome.ended == Ended { bytes: 50_000, how: How::CloseNotify, fin: true },
        "bystander: {:?}",
        outcome.ended
    );
    Ok(())
}

/// 32 in a row, then data, and again: no storm.
fn thirty_two(ctx: &Context, relay: Relay) -> Result<()> {
    // Where the kernel cannot rekey, the connection stays before the door.
    let door = if ctx.environment.rekeys() { 0 } else { 1 << 20 };
    let setup = Setup::exchanging(ctx, relay, &[door])?;
    for suite in [TLS13_AES_256, TLS13_CHACHA] {
        let account = Account::open(&setup.proxy)?;
        let mut client = setup.client(ctx, 0, suite)?;
        let mut bytes = Vec::new();
        client.tx.seal_data(&mut bytes, &Request::new(3_000, 10).encode(), 0)?;
        for round in 0..3 {
            for _ in 0..32 {
                client.tx.seal_key_update(&mut bytes, round == 1)?;
            }
            bytes.extend(client.tx.seal(DATA, Pattern::up().at(round * 1_000, 1_000), 0)?);
        }
        client.tx.write(&bytes)?;
        let ended = client.finish().with_context(|| suite.name)?;
        ensure!(ended.bytes == 10 && ended.how == How::CloseNotify, "{}: {ended:?}", suite.name);
        setup.upstream.served()?;
        account.close(&setup.proxy, 3_032, 10, false)?;
    }
    setup.finish(ctx).map(drop)
}

/// What begins like a KeyUpdate and is none: a fatal alert, a reset for the upstream, and nobody else is touched.
fn malformed(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::manual(ctx, relay, &[0])?;
    let (mut bystander, other) = setup.open(ctx, 0, TLS13_AES_128, 1_000)?;
    let cases: [(&str, &[&[u8]]); 6] = [
        ("value 7", &[&[24, 0, 0, 1, 7]]),
        ("two in one record", &[&[24, 0, 0, 1, 0, 24, 0, 0, 1, 0]]),
        ("something behind", &[&[24, 0, 0, 1, 0, 0]]),
        ("too long", &[&[24, 0, 0, 2, 0, 0]]),
        ("fragmented", &[&[24, 0, 0], &[1, 0]]),
        ("a ClientHello", &[&[1, 0, 0, 2, 3, 3]]),
    ];
    for (what, records) in cases {
        let (mut client, stream) = setup.open(ctx, 0, TLS13_AES_256, 30_000)?;
        let mut bytes = Vec::new();
        for record in records {
            bytes.extend(client.tx.seal(HANDSHAKE, record, 0)?);
        }
        client.tx.write(&bytes)?;
        let ended = client.rx.drain(None).with_context(|| what)?;
        ensure!(matches!(ended.how, How::Alert(_)), "{what}: the client saw {ended:?}");
        let (_, end) = stream.drain(Pattern::up(), 30_000)?;
        ensure!(end == PeerEnd::Reset, "{what}: the upstream saw {end:?}");
    }
    bystander.tx.data(Pattern::up().at(1_000, 5_000))?;
    let mut got = [0; 5_000];
    other.read_exactly(&mut got)?;
    drop(other);
    drop(bystander);
    let metrics = setup.finish(ctx)?;
    let ended = metrics.ended("unexpected_message") + metrics.ended("bad_record");
    ensure!(ended == cases.len() as u64, "endings: {}", metrics.endings());
    Ok(())
}

/// The server cannot answer at once when its send buffer is full: it owes, and pays before its next record.
fn replies_owed(ctx: &Context, relay: Relay) -> Result<()> {
    const DOWN_BYTES: u64 = 24 << 20;
    let setup = Setup::exchanging(ctx, relay, &[0])?;
    for suite in [TLS13_AES_128, TLS13_CHACHA] {
        let mut client = setup.client(ctx, 0, suite)?;
        client.tx.data(&Request::new(200, DOWN_BYTES).encode())?;
        // Until nothing moves any more, because nobody reads.
        std::thread::sleep(ctx.environment.moment() * 300);
        for n in 0..20 {
            client.tx.key_update(true)?;
            client.tx.data(Pattern::up().at(n * 10, 10))?;
            std::thread::sleep(ctx.environment.moment());
        }
        client.tx.close_notify()?;
        let ended = client.rx.drain(Some(Pattern::down())).with_context(|| suite.name)?;
        ensure!(ended.bytes == DOWN_BYTES && ended.how == How::CloseNotify, "{}: {ended:?}", suite.name);
        ensure!(client.rx.key_updates > 0, "{}: twenty were asked for, none came", suite.name);
        let served = setup.upstream.served()?;
        ensure!((served.up, served.end) == (200, PeerEnd::Fin), "{served:?}");
    }
    setup.finish(ctx).map(drop)
}

const RECORDS_PER_KEY: u64 = 200;

fn limited(ctx: &Context, relay: Relay) -> Result<Setup> {
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    Setup::with(ctx, relay, &[0], upstream, |s| s.limit(&format!("records_per_key = {RECORDS_PER_KEY}")))
}

fn own_limit(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = limited(ctx, relay)?;
    for suite in [TLS13_AES_128, TLS13_AES_256] {
        let records = 5 * RECORDS_PER_KEY;
        let outcome = setup.transfer(ctx, 0, suite, &Plan::new(1_000, records * 16_384))?;
        if relay.offloads() {
            ensure!(
                outcome.client.rx.key_updates >= 3,
                "{records} records under {} keys",
                outcome.client.rx.key_updates + 1
            );
        }
    }
    setup.finish(ctx).map(drop)
}

fn exhausted(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = limited(ctx, relay)?;
    for suite in [TLS13_AES_128, TLS13_AES_256] as [Suite; 2] {
        let mut client = setup.client(ctx, 0, suite)?;
        client.tx.data(&Request::new(0, 10 * RECORDS_PER_KEY * 16_384).encode())?;
        let ended = client.rx.drain(Some(Pattern::down()))?;
        ensure!(ended.bytes <= RECORDS_PER_KEY * 16_384, "{ended:?}");
        ensure!(ended.how != How::Reset, "{ended:?}");
        drop(client);
        setup.upstream.served()?;
    }
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("key_exhausted") == 2, "endings: {}", metrics.endings());
    Ok(())
}

/// 6.1 and 6.12: nothing can be read any more, but what is on its way to the client arrives, and a close_notify.
fn no_rekey_download(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::manual(ctx, relay, &[0, 16_384])?;
    for listener in 0..2 {
        for asks in [false, true] {
            let (mut client, stream) = setup.open(ctx, listener, TLS13_AES_256, 60_000)?;
            client.tx.key_update(asks)?;
            client.tx.close_notify()?;
            std::thread::sleep(ctx.environment.moment() * 10);
            let down = Pattern::down().bytes(4 << 20);
            let ended = std::thread::scope(|scope| {
                let sender = scope.spawn(|| stream.send(&down).and_then(|()| stream.fin()));
                let ended = client.rx.drain(Some(Pattern::down()));
                sender.join().expect("the sender does not panic")?;
                ended
            })?;
            ensure!(ended.bytes == 4 << 20 && ended.how == How::CloseNotify, "asks {asks}: {ended:?}");
            drop(client);
            let (_, end) = stream.drain(Pattern::up(), 60_000)?;
            ensure!(end == PeerEnd::Reset, "an upload that nobody saw the end of: the upstream saw {end:?}");
        }
    }
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("no_rekey") == 4, "endings: {}", metrics.endings());
    Ok(())
}

fn no_rekey_upload(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0])?;
    let mut client = setup.client(ctx, 0, TLS13_AES_256)?;
    client.tx.data(&Request::new(1 << 20, 100_000).encode())?;
    client.tx.data(Pattern::up().at(0, 100_000))?;
    client.tx.key_update(false)?;
    // It is not read any more, so it may not be taken either.
    let _ = client.tx.data(Pattern::up().at(100_000, 100_000));
    let ended = client.rx.drain(Some(Pattern::down()))?;
    ensure!(ended.bytes == 100_000 && ended.how == How::CloseNotify, "{ended:?}");
    drop(client);
    let served = setup.upstream.served()?;
    ensure!(served.up == 100_000 && served.end == PeerEnd::Reset, "{served:?}");
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("no_rekey") == 1, "endings: {}", metrics.endings());
    Ok(())
}
