//! The end: no new connections, and time for those that are there.
//!
//!   signal ─▶ /ready says no ─▶ [drain_delay: served as before] ─▶ listeners close ─▶ [drain_timeout] ─▶ what is left is cut

use super::Signals;
use super::start::Terminator;
use crate::config::Server;
use crate::exit::Failure;
use crate::worker::{Command, Worker};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Workers cut what is left at the deadline; they get this long to do it.
const CUT_GRACE: Duration = Duration::from_secs(2);

impl Terminator {
    /// Serves for `server.drain_delay` as before, so that whoever balances finds out by `/ready`, then lets the workers finish
    /// within `server.drain_timeout`; another SIGTERM or SIGINT ends it at once.
    pub(super) async fn drain(self, reason: &'static str, signals: &mut Signals) -> Result<(), Failure> {
        let Server { drain_delay: delay, drain_timeout: timeout, .. } = self.config.server;
        let counters = self.counters();
        let live = || counters.iter().map(|c| c.live.get()).fold(0, u64::wrapping_add);
        let cut =
            |signal: &'static str| tracing::warn!(signal, connections = live(), "a second signal, connections are cut");
        // A worker that has died takes nobody: clients of its listeners wait in vain already.
        if !delay.is_zero() && !self.has_lost_a_worker() {
            tracing::info!(
                reason,
                connections = live(),
                delay_s = delay.as_secs_f64(),
                "is not ready any more, and serves on"
            );
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                signal = signals.end() => {
                    cut(signal);
                    return Ok(());
                }
            }
        }
        tracing::info!(reason, connections = live(), timeout_s = timeout.as_secs_f64(), "drains");
        let deadline = Instant::now() + timeout;
        for worker in &self.workers {
            worker.send(Command::Drain { deadline });
        }
        let joined = join(self.workers);
        tokio::select! {
            panicked = joined => match panicked {
                Ok(0) | Err(_) => tracing::info!("drained"),
                Ok(panicked) => return Err(Failure::Host(format!("{panicked} workers had died"))),
            },
            () = tokio::time::sleep_until((deadline + CUT_GRACE).into()) => {
                tracing::warn!(connections = live(), "the drain has timed out, connections are cut");
            }
            signal = signals.end() => cut(signal),
        }
        Ok(())
    }
}

/// Waits for the threads on one more thread, and says how many had panicked.
fn join(workers: Vec<Worker>) -> oneshot::Receiver<usize> {
    let (done, joined) = oneshot::channel();
    std::thread::spawn(move || {
        let panicked = workers.into_iter().map(Worker::join).filter(Result::is_err).count();
        // Nobody waits any more after the deadline.
        let _ = done.send(panicked);
    });
    joined
}
