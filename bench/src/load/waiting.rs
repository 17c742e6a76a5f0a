//! Connections that hold memory: those that wait, and those whose client reads slowly.

use super::{Count, Load, Mark, Outcome, drive};
use crate::client::{Counted, Session, Sessions, Target};
use anyhow::{Context, Result};
use std::time::{Duration, Instant};

/// Threads that open and hold connections.
const THREADS: usize = 4;
/// Until freed memory is given back and late events are done.
const SETTLE: Duration = Duration::from_millis(200);
/// What a slow client takes at once, and how long it then waits.
const SLOW_READ_BYTES: usize = 16 << 10;
const SLOW_PAUSE: Duration = Duration::from_millis(10);

/// All stay open between the marks; one request has gone through each.
pub fn idle(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let request = load.request();
    let prepare = |index: usize| {
        let config = target.config(Sessions::Fresh)?;
        let mut held = Vec::new();
        for _ in (index..load.connections).step_by(THREADS) {
            let mut session = Session::open(target, config.as_ref())?;
            session.exchange(&request)?;
            held.push(session);
        }
        Ok(held)
    };
    drive(THREADS, load.duration, on_mark, prepare, |held, _| {
        std::thread::sleep(SETTLE);
        let mut count = Count::new();
        count.units = held.len() as u64;
        Ok(count)
    })
}

/// Each client reads a piece, then waits; the upstream would send as fast as it can.
pub fn slow(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let request = load.request();
    let prepare = |index: usize| {
        let config = target.config(Sessions::Fresh)?;
        let mut held = Vec::new();
        for _ in (index..load.connections).step_by(THREADS) {
            let mut session = Session::open(target, config.as_ref())?;
            session.send(&request)?;
            held.push(session.count_only()?);
        }
        std::thread::sleep(SETTLE);
        Ok(held)
    };
    drive(THREADS, load.duration, on_mark, prepare, |held: &mut Vec<Counted>, window| {
        let mut count = Count::new();
        let mut scratch = vec![0; SLOW_READ_BYTES];
        while Instant::now() < window.end {
            for counted in held.iter_mut() {
                count.units += counted.receive(&mut scratch)?.context("a slow download ended")?;
            }
            std::thread::sleep(SLOW_PAUSE);
        }
        Ok(count)
    })
}
