//! The door at every threshold, in the middle of uploads, downloads and both, with KeyUpdates just before and just
//! after it, records of random sizes and writes that are cut anywhere. A failure names its plan, seed included.

use crate::client::handshake::{SUITES, Suite};
use crate::environment::{Environment, Relay};
use crate::exchange::{Close, DOORS, Plan, Setup, Updates};
use crate::pattern::Random;
use crate::run::{Context, Test};
use crate::upstream::REQUEST_BYTES;
use anyhow::{Context as _, Result, ensure};

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Test::each_relay(env, "the_door_loses_nothing_at_any_threshold", every_threshold);
    if env.offload {
        tests.extend(Test::one_relay(env, "a_short_connection_never_goes_through_the_door", short_connections));
    }
    tests
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Traffic {
    Up,
    Down,
    Both,
    /// The download follows the upload.
    InTurn,
}

const TRAFFIC: [Traffic; 4] = [Traffic::Up, Traffic::Down, Traffic::Both, Traffic::InTurn];

/// Beyond the threshold by more than the userspace relay reads at once, so that both relays have their share.
const PAST_THE_DOOR_BYTES: u64 = 700_000;

fn every_threshold(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &DOORS)?;
    let mut round = 0;
    let mut late: Vec<String> = Vec::new();
    for (listener, door) in DOORS.into_iter().enumerate() {
        for traffic in TRAFFIC {
            // All suites natively; in a guest they take turns.
            let suites = ctx.environment.scale(SUITES.len(), 1);
            for turn in 0..suites {
                let suite = SUITES[(round + turn) % SUITES.len()];
                round += 1;
                let plan = plan(ctx, suite, door, traffic, round as u64);
                if one(ctx, &setup, listener, suite, &plan)? {
                    let rekeyed = if plan.updates == Updates::None { "" } else { " rekeyed" };
                    late.push(format!("{traffic:?} {door}{rekeyed}"));
                }
            }
        }
    }
    ctx.note(&format!(
        "{round} transfers; {} ended before the door that they had earned: {}",
        late.len(),
        late.join(", ")
    ));
    setup.finish(ctx).map(drop)
}

fn plan(ctx: &Context, suite: Suite, door: u64, traffic: Traffic, seed: u64) -> Plan {
    let mut random = Random::new(seed);
    let bytes = door + PAST_THE_DOOR_BYTES + random.range(0, 50_000);
    let (up, down) = match traffic {
        Traffic::Up => (bytes, 0),
        Traffic::Down => (0, bytes),
        Traffic::Both | Traffic::InTurn => (bytes, bytes),
    };
    // A half that has ended shuts the door: here only those in turn, and one in four of the others, end one early.
    let early = traffic == Traffic::InTurn || seed % 4 == 1;
    let plan = Plan::new(up, down).ragged(seed).close(if early { Close::First } else { Close::Answer });
    let plan = plan.with(|request| (request.in_turn, request.together) = (traffic == Traffic::InTurn, !early));
    plan.updates(if suite.tls13 { updates(ctx, door, up, &mut random) } else { Updates::None })
}

/// Just before and just after the threshold, as the client counts: its request is part of the stream.
fn updates(ctx: &Context, door: u64, up: u64, random: &mut Random) -> Updates {
    let asks = random.one_in(2);
    let before = door.saturating_sub(REQUEST_BYTES as u64 + random.range(1, 20_000)).min(up);
    if !ctx.environment.rekeys() {
        // Nothing may be rekeyed past the door; before the first byte nobody has come to it yet.
        return if door > 0 && random.one_in(2) { Updates::At(vec![(0, asks)]) } else { Updates::None };
    }
    match random.range(0, 3) {
        0 => Updates::None,
        1 => Updates::At(vec![(0, !asks), (before, asks), (door, !asks), (door + 1, asks), (door + 30_000, asks)]),
        2 => Updates::At(vec![(door, true), (door, false), (door + 17_000, true), (door + 17_000, true)]),
        _ => Updates::Every(random.range(3_000, 40_000)),
    }
}

/// Whether it had moved enough for the door and did not go through it.
fn one(ctx: &Context, setup: &Setup, listener: usize, suite: Suite, plan: &Plan) -> Result<bool> {
    let door = setup.proxy.settings.listeners[listener].offload_after;
    let before = setup.proxy.settled()?;
    setup.transfer(ctx, listener, suite, plan)?;
    let after = setup.proxy.settled()?;
    let offloaded = after.offloaded() - before.offloaded();
    let rekeyed = after.declined("rekeyed") - before.declined("rekeyed");
    let check = || -> Result<bool> {
        if !setup.proxy.settings.relay.offloads() {
            ensure!(offloaded == 0, "it was offloaded");
            return Ok(false);
        }
        let unable = plan.updates != Updates::None && !ctx.environment.rekeys();
        ensure!(offloaded <= 1, "offloaded {offloaded} times");
        ensure!(
            !unable || (offloaded, rekeyed) == (0, 1),
            "rekeyed before the door: offloaded {offloaded}, declined {rekeyed}"
        );
        ensure!(unable || door > 0 || offloaded == 1, "a door at 0 was not taken");
        let owes = plan.updates != Updates::None;
        ensure!(unable || owes || plan.close == Close::First || offloaded == 1, "it never went through its door");
        Ok(!unable && offloaded == 0)
    };
    check().with_context(|| format!("{}, offload_after {door}, {plan:?}", suite.name))
}

fn short_connections(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[1 << 20])?;
    for suite in SUITES {
        setup.transfer(ctx, 0, suite, &Plan::new(100_000, 100_000).ragged(9))?;
    }
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.offloaded() == 0, "{} connections of 100 kB went through a door at 1 MiB", metrics.offloaded());
    Ok(())
}
