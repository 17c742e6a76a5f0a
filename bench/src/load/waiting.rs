//! Connections that hold memory: those that wait, and those whose client reads slowly.

use super::download::Download;
use super::{Load, Mark, Outcome, drive};
use crate::client::{Session, Sessions, Target};
use anyhow::Result;
use std::time::{Duration, Instant};

/// Threads that open and hold connections.
const THREADS: usize = 4;
/// Until freed memory is given back and late events are done.
const SETTLE: Duration = Duration::from_millis(200);
/// What a slow client takes at once, and how long it then waits.
const SLOW_READ_BYTES: usize = 16 << 10;
const SLOW_PAUSE: Duration = Duration::from_millis(10);

/// All stay open between the marks; one request has gone through each. One that the server has ended meanwhile has failed.
pub fn idle(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let request = load.request(target);
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
    drive(THREADS, load.duration, on_mark, prepare, |held, window, count| {
        std::thread::sleep(SETTLE.max(window.end.saturating_duration_since(Instant::now())));
        for session in held {
            match session.is_idle() {
                Ok(()) => count.units += 1,
                Err(error) => count.failed(&error),
            }
        }
        Ok(())
    })
}

/// Each client reads a piece, then waits; the upstream would send as fast as it can.
pub fn slow(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let prepare = |index: usize| {
        let mut held = Vec::new();
        for _ in (index..load.connections).step_by(THREADS) {
            held.push(Download::open(target, load)?);
        }
        std::thread::sleep(SETTLE);
        Ok(held)
    };
    drive(THREADS, load.duration, on_mark, prepare, |held: &mut Vec<Download<'_>>, window, count| {
        let mut scratch = vec![0; SLOW_READ_BYTES];
        while Instant::now() < window.end {
            held.retain_mut(|download| match download.receive(&mut scratch) {
                Ok(bytes) => {
                    count.units += bytes;
                    true
                }
                Err(error) => {
                    count.failed(&error);
                    count.reopened += download.reopened();
                    false
                }
            });
            std::thread::sleep(SLOW_PAUSE);
        }
        count.reopened += held.iter().map(Download::reopened).sum::<u64>();
        Ok(())
    })
}
