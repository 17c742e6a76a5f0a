//! Tickets: one node's is resumed by another through rotations, by a fleet that loses its leader, and through the door.

use crate::client::How;
use crate::client::handshake::{Offer, Prepared, SUITES, Suite, TLS12_AES_128, TLS13_AES_256, prepare};
use crate::environment::{Environment, Relay};
use crate::exchange::{self, Plan, Setup};
use crate::pattern::Pattern;
use crate::run::{Context, Test};
use crate::upstream::{Kind, Upstream, exchange as serve};
use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use std::io::ErrorKind;
use std::thread;
use std::time::{Duration, Instant};

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests =
        Test::one_relay(env, "resumed_connections_lose_nothing_on_either_side_of_the_door", through_the_door);
    tests.extend(Test::some_guests(env, "tickets_wait_for_the_first_answer_and_for_nothing_else", beside_an_answer));
    if !env.is_guest() {
        tests.push(Test::new(env, "a_ticket_of_one_process_is_resumed_by_another_through_rotations", fleet));
    }
    tests
}

/// Resumed and not, at the door's thresholds, with data both ways.
fn through_the_door(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0, 1, 16_384])?;
    let suites: &[Suite] = ctx.environment.scale(&SUITES[..], &[TLS13_AES_256, TLS12_AES_128]);
    let mut resumed = 0;
    for suite in suites {
        for listener in 0..3 {
            let offer = Offer::new(ctx, *suite)?.resuming();
            for round in 0..3 {
                let what = || format!("{}, listener {listener}, round {round}", suite.name);
                let prepared = prepare(ctx, setup.proxy.address(listener), &offer).with_context(what)?;
                let is_resumed = prepared.facts.resumed;
                resumed += u64::from(is_resumed);
                // Whether tickets have come in time to be used is the client's matter in TLS 1.3.
                ensure!(suite.tls13 || round == 0 || is_resumed, "{}: a full handshake", what());
                let outcome = exchange::run(prepared.complete()?, &Plan::new(200_000, 200_000).ragged(round + 1));
                let ended = outcome.with_context(what)?.ended;
                ensure!((ended.bytes, ended.how) == (200_000, How::CloseNotify), "{}: {ended:?}", what());
                let served = setup.upstream.served().with_context(what)?;
                ensure!((served.up, served.down) == (200_000, 200_000), "{}: {served:?}", what());
            }
        }
    }
    let metrics = setup.proxy.settled()?;
    let counted = metrics.sum("tlsplice_handshakes_total", &[("resumed", "yes")]);
    ensure!(counted == resumed && resumed > 0, "{resumed} resumed, {counted} counted");
    ctx.note(&format!("{resumed} resumed connections, {} through the door", metrics.offloaded()));
    setup.finish(ctx).map(drop)
}

/// Those of one handshake are in one record.
const TICKET_RECORDS: u64 = 1;

/// What makes the tickets go out that were held for an answer.
#[derive(Debug, Clone, Copy)]
enum Next {
    Answer,
    /// The client says more.
    More,
    /// The upstream has nothing to say.
    End,
}

/// A client that asks with its Finished gets them with the answer, unless the kernel has its keys by then; any other gets
/// them at once.
fn beside_an_answer(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::manual(ctx, relay, &[0, 16_384])?;
    let offer = Offer::new(ctx, TLS13_AES_256)?;
    for listener in 0..2 {
        let address = setup.proxy.address(listener);
        let silent = prepare(ctx, address, &offer)?.complete()?;
        ensure!(silent.socket().peek(&mut [0])? > 0, "listener {listener}: no ticket for a client that waits");
        drop(silent);
        setup.upstream.accept()?;
        for next in [Next::Answer, Next::More, Next::End] {
            let what = || format!("listener {listener}, {next:?}");
            let Prepared { mut client, last_flight, .. } = prepare(ctx, address, &offer)?;
            let mut bytes = last_flight;
            client.tx.seal_data(&mut bytes, b"question", 0)?;
            client.tx.write(&bytes)?;
            let upstream = setup.upstream.accept()?;
            let mut asked = [0; 8];
            upstream.read_exactly(&mut asked)?;
            ensure!(asked == *b"question", "{}: {asked:?}", what());
            client.socket().set_nonblocking(true)?;
            let held = client.socket().peek(&mut [0]).is_err_and(|e| e.kind() == ErrorKind::WouldBlock);
            client.socket().set_nonblocking(false)?;
            ensure!(held == (listener == 1 || relay == Relay::Userspace), "{}: held back: {held}", what());
            let answer = match next {
                Next::Answer => 70,
                Next::More => {
                    client.tx.data(b" answered")?;
                    ensure!(client.socket().peek(&mut [0])? > 0, "{}: no ticket before the answer", what());
                    70
                }
                Next::End => 0,
            };
            upstream.send(Pattern::down().at(0, answer))?;
            upstream.fin()?;
            let ended = client.rx.drain(Some(Pattern::down())).with_context(what)?;
            ensure!((ended.bytes, ended.how) == (answer as u64, How::CloseNotify), "{}: {ended:?}", what());
            ensure!(client.rx.tickets == TICKET_RECORDS, "{}: {} records of tickets", what(), client.rx.tickets);
            client.finish()?;
        }
    }
    setup.finish(ctx).map(drop)
}

const LIFETIME: Duration = Duration::from_secs(3);
/// Three rotations and the leader's end.
const RUN: Duration = Duration::from_secs(16);
const PAUSE: Duration = Duration::from_millis(100);

/// Two processes take turns, ten handshakes a second: after the first, every one resumes what the other gave.
fn fleet(ctx: &Context) -> Result<()> {
    let relay = ctx.environment.relays()[0];
    let folder = ctx.folder("tickets")?;
    let node = || {
        let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
        Setup::with(ctx, relay, &[0], upstream, |s| {
            s.tls(&format!("tickets = {folder:?}")).tls(&format!("ticket_lifetime = \"{}s\"", LIFETIME.as_secs()))
        })
    };
    let mut nodes = vec![node()?, node()?];
    nodes.iter_mut().for_each(|node| node.proxy.beside_others());
    let leads = |node: &Setup| Ok::<_, anyhow::Error>(node.proxy.metrics()?.sum("tlsplice_ticket_keys_leader", &[]));
    let generation =
        |node: &Setup| Ok::<_, anyhow::Error>(node.proxy.metrics()?.sum("tlsplice_ticket_keys_generation", &[]));
    ensure!((leads(&nodes[0])?, leads(&nodes[1])?) == (1, 0), "the first node does not lead alone");
    let first = generation(&nodes[1])?;
    let (tls12, tls13) = (Offer::new(ctx, TLS12_AES_128)?.resuming(), Offer::new(ctx, TLS13_AES_256)?.resuming());
    let began = Instant::now();
    let (mut handshakes, mut full) = (0_u32, 0_u32);
    let mut killed = false;
    while began.elapsed() < RUN {
        // Half of the time is left for the other to take over.
        if !killed && began.elapsed() > RUN / 2 {
            let mut leader = nodes.remove(0);
            leader.proxy.signal(Signal::KILL)?;
            leader.proxy.wait_exit()?;
            nodes.push(node()?);
            nodes.iter_mut().for_each(|node| node.proxy.beside_others());
            killed = true;
        }
        for offer in [&tls12, &tls13] {
            let node = &nodes[handshakes as usize / 2 % 2];
            let prepared = prepare(ctx, node.proxy.address(0), offer)?;
            handshakes += 1;
            if !prepared.facts.resumed {
                full += 1;
                ensure!(full <= 2, "handshake {handshakes} after {:?} was a full one", began.elapsed());
            }
            let ended = exchange::run(prepared.complete()?, &Plan::new(100, 100))?.ended;
            ensure!(ended.how == How::CloseNotify, "{ended:?}");
            node.upstream.served()?;
        }
        thread::sleep(PAUSE);
    }
    let last = generation(&nodes[0])?;
    ensure!(last >= first + 3, "generation {first} became {last}: fewer than three rotations");
    ensure!(leads(&nodes[0])? + leads(&nodes[1])? == 1, "nobody leads after the leader was killed, or two do");
    ctx.note(&format!(
        "{handshakes} handshakes, {full} full ones (the first of each version), {} rotations",
        last - first
    ));
    for node in nodes {
        node.finish(ctx)?;
    }
    Ok(())
}
