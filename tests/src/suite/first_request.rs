//! The first request in the same segment as the client's Finished, whole and cut at every byte: nothing is lost.
//!
//! In TLS 1.2 that needs a resumed session, where the client's Finished comes last, or a client that starts before the
//! server's Finished (RFC 7918); the first is done here.

use crate::client::handshake::{Offer, Prepared, Suite, TLS12_AES_128, TLS13_AES_256, prepare};
use crate::client::record::{ALERT, DATA};
use crate::client::{Client, Ended, How};
use crate::environment::{Environment, Relay};
use crate::exchange::{Plan, Setup};
use crate::pattern::Pattern;
use crate::run::{Context, Test};
use crate::upstream::{PeerEnd, Request, Served};
use anyhow::{Context as _, Result, ensure};

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    tests.extend(Test::each_relay(env, "a_request_in_the_segment_of_finished_is_served", whole));
    tests.extend(Test::each_relay(env, "finished_and_request_cut_at_every_byte_lose_nothing_in_tls13", cut_tls13));
    tests.extend(Test::each_relay(env, "finished_and_request_cut_at_every_byte_lose_nothing_in_tls12", cut_tls12));
    tests.extend(Test::each_relay(
        env,
        "a_key_update_in_the_segment_of_finished_is_followed",
        key_update_with_finished,
    ));
    tests
}

const UP_BYTES: u64 = 40;
const DOWN_BYTES: u64 = 70;

/// Everything that the client has to say after the last flight: request, data, close_notify.
fn speech(client: &mut Client, up: u64, down: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    client.tx.seal_data(&mut bytes, &Request::new(up, down).encode(), 0)?;
    let mut offset = 0;
    while offset < up {
        let piece = Pattern::up().at(offset, usize::try_from((up - offset).min(16_384))?);
        bytes.extend(client.tx.seal(DATA, piece, 0)?);
        offset += piece.len() as u64;
    }
    bytes.extend(client.tx.seal(ALERT, &[1, 0], 0)?);
    Ok(bytes)
}

/// Sends it cut at these places, then takes the answer.
fn say(ctx: &Context, setup: &Setup, prepared: Prepared, up: u64, down: u64, cuts: &[usize]) -> Result<()> {
    let Prepared { mut client, last_flight, .. } = prepared;
    let mut bytes = last_flight;
    bytes.extend(speech(&mut client, up, down)?);
    client.tx.write_cut(&bytes, cuts, ctx.environment.moment())?;
    let ended = client.rx.drain(Some(Pattern::down()))?;
    ensure!(ended == Ended { bytes: down, how: How::CloseNotify, fin: true }, "the client saw {ended:?}");
    let served = setup.upstream.served()?;
    ensure!(served == Served { up, down, end: PeerEnd::Fin }, "the upstream saw {served:?}");
    Ok(())
}

fn whole(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0, 1, 16_384])?;
    for listener in 0..3 {
        for up in [0, 1, 16_384, 16_385, 100_000] {
            let offer = Offer::new(ctx, TLS13_AES_256)?;
            let prepared = prepare(ctx, setup.proxy.address(listener), &offer)?;
            say(ctx, &setup, prepared, up, 100_000, &[]).with_context(|| format!("listener {listener}, {up} bytes"))?;
        }
    }
    setup.finish(ctx).map(drop)
}

fn cut_tls13(ctx: &Context, relay: Relay) -> Result<()> {
    cut_everywhere(ctx, relay, TLS13_AES_256, &Offer::new(ctx, TLS13_AES_256)?)
}

fn cut_tls12(ctx: &Context, relay: Relay) -> Result<()> {
    cut_everywhere(ctx, relay, TLS12_AES_128, &Offer::new(ctx, TLS12_AES_128)?.resuming())
}

fn cut_everywhere(ctx: &Context, relay: Relay, suite: Suite, offer: &Offer) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0, 1])?;
    // Under emulation the default relay and the others share the offsets between them.
    let (first, step) = ctx.environment.scale((1, 1), if relay == Relay::Auto { (1, 2) } else { (2, 2) });
    for listener in 0..2 {
        if !suite.tls13 {
            // Leaves a session to be resumed.
            prepare(ctx, setup.proxy.address(listener), offer)?.complete()?.finish()?;
            setup.upstream.served()?;
        }
        let mut cut = first;
        loop {
            let prepared = prepare(ctx, setup.proxy.address(listener), offer)?;
            let flight = prepared.last_flight.len();
            ensure!(
                flight > 0,
                "the client's Finished was not the last of the handshake; resumed: {}",
                prepared.facts.resumed
            );
            // Beyond the request's record the cuts are like those of any other record.
            if cut > flight + 32 + 60 {
                prepared.complete()?.finish()?;
                setup.upstream.served()?;
                break;
            }
            say(ctx, &setup, prepared, UP_BYTES, DOWN_BYTES, &[cut]).with_context(|| {
                format!("listener {listener}, cut at byte {cut}, the last flight is {flight} bytes")
            })?;
            cut += step;
        }
    }
    setup.finish(ctx).map(drop)
}

/// A KeyUpdate as the first record, alone or with data before it, behind it, or cut.
fn key_update_with_finished(ctx: &Context, relay: Relay) -> Result<()> {
    let doors: &[u64] = if ctx.environment.rekeys() { &[0, 1, 16_384] } else { &[16_384] };
    let setup = Setup::exchanging(ctx, relay, doors)?;
    for listener in 0..doors.len() {
        for (asks, cut_in_update) in [(false, false), (true, false), (false, true), (true, true)] {
            let offer = Offer::new(ctx, TLS13_AES_256)?;
            let Prepared { mut client, last_flight, .. } = prepare(ctx, setup.proxy.address(listener), &offer)?;
            let mut bytes = last_flight;
            let cut = bytes.len() + 9;
            client.tx.seal_key_update(&mut bytes, asks)?;
            client.tx.seal_key_update(&mut bytes, asks)?;
            bytes.extend(speech(&mut client, 20_000, 20_000)?);
            let cuts: &[usize] = if cut_in_update { &[cut] } else { &[] };
            client.tx.write_cut(&bytes, cuts, ctx.environment.moment())?;
            let ended =
                client.rx.drain(Some(Pattern::down())).with_context(|| format!("asks {asks}, cut {cut_in_update}"))?;
            ensure!(ended == Ended { bytes: 20_000, how: How::CloseNotify, fin: true }, "asks {asks}: {ended:?}");
            ensure!(!asks || client.rx.key_updates > 0, "a requested KeyUpdate was not answered");
            setup.upstream.served()?;
        }
        setup.transfer(ctx, listener, TLS13_AES_256, &Plan::new(1_000, 1_000))?;
    }
    setup.finish(ctx).map(drop)
}
