//! Small requests over kept connections.

use super::{Count, Load, Mark, Outcome, drive};
use crate::client::{Session, Sessions, Target};
use anyhow::{Result, ensure};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Requests on each connection before the clock runs.
const WARM_UP: usize = 20;

fn open_session(target: &Target, request: &[u8]) -> Result<Session> {
    let mut session = Session::open(target, target.config(Sessions::Fresh)?.as_ref())?;
    for _ in 0..WARM_UP {
        exchange(&mut session, request)?;
    }
    Ok(session)
}

fn exchange(session: &mut Session, request: &[u8]) -> Result<()> {
    let (status, _) = session.exchange(request)?;
    ensure!(status < 400, "the answer's status is {status}");
    Ok(())
}

/// Closed loop: the next one when the last was answered.
pub fn closed(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let request = load.request();
    let prepare = |_: usize| open_session(target, &request);
    drive(load.connections, load.duration, on_mark, prepare, |session, window| {
        let mut count = Count::new();
        while Instant::now() < window.end {
            let since = Instant::now();
            exchange(session, &request)?;
            count.took(since);
            count.units += 1;
        }
        Ok(count)
    })
}

/// Open loop: each request has its moment, whether the last was answered or not. A free connection takes the next moment,
/// and one that is late counts its lateness: a stall shows in every request that it delayed.
pub fn open(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    ensure!(load.rate > 0.0, "an open loop takes a rate above 0");
    let request = load.request();
    let next = AtomicU64::new(0);
    let prepare = |_: usize| open_session(target, &request);
    drive(load.connections, load.duration, on_mark, prepare, |session, window| {
        let mut count = Count::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let due = window.begin + Duration::from_secs_f64(number as f64 / load.rate);
            // Moments after the end are nobody's; those before it are all kept, however late.
            if due >= window.end || Instant::now() > window.end + load.duration {
                return Ok(count);
            }
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            exchange(session, &request)?;
            count.took(due);
            count.units += 1;
        }
    })
}
