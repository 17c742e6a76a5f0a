//! A client that sends its records byte by byte: each byte may wake tlsplice a few times, and no byte may make it spin
//! (6.1 calls a partial record readable).

use crate::client::handshake::{TLS12_AES_256, TLS13_AES_256};
use crate::client::record::DATA;
use crate::environment::{Environment, Relay};
use crate::exchange::Setup;
use crate::pattern::Pattern;
use crate::run::{Context, Test};
use crate::scrape::Threads;
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

pub fn tests(env: &Environment) -> Vec<Test> {
    Test::each_relay(env, "a_trickled_record_wakes_it_a_few_times_a_byte", trickle)
}

/// Times that any thread of tlsplice went to sleep, for each byte.
const SLEEPS_PER_BYTE: f64 = 6.0;
/// Of the time: a relay that spins takes all of it.
const CPU_SHARE: f64 = 0.6;

fn trickle(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::manual(ctx, relay, &[0, 16_384])?;
    let pause = Duration::from_millis(ctx.environment.scale(2, 20));
    let payload = ctx.environment.scale(150, 60);
    for listener in 0..2 {
        for suite in [TLS13_AES_256, TLS12_AES_256] {
            let (mut client, stream) = setup.open(ctx, listener, suite, 40_000)?;
            let record = client.tx.seal(DATA, Pattern::up().at(40_000, payload), 0)?;
            let cuts: Vec<usize> = (1..record.len()).collect();
            let (before, started) = (Threads::of(setup.proxy.pid())?, Instant::now());
            client.tx.write_cut(&record, &cuts, pause)?;
            let took = started.elapsed();
            let after = Threads::of(setup.proxy.pid())?;
            let cpu = after.cpu_since(&before).as_secs_f64();
            let slept = after.sleeps_since(&before) as f64 / record.len() as f64;
            let share = cpu / took.as_secs_f64();
            ctx.note(&format!(
                "{}, listener {listener}: {slept:.2} wake-ups a byte, {:.0} µs of CPU a byte, {:.0} % of the time",
                suite.name,
                cpu * 1e6 / record.len() as f64,
                share * 100.0
            ));
            ensure!(slept < SLEEPS_PER_BYTE, "{slept:.1} wake-ups a byte");
            ensure!(share < CPU_SHARE, "{share:.2} of the time was spent on the CPU");
            let mut got = vec![0; payload];
            stream.read_exactly(&mut got)?;
            Pattern::up().check(40_000, &got)?;
        }
    }
    setup.finish(ctx).map(drop)
}
