//! Small requests at a fixed rate: each has its moment, whether the last was answered or not.
//!
//!   a moment is due ─▶ a free connection sends │ epoll: answers, or the next moment ─▶ …
//!
//! Latency counts from the moment, so a stall shows in every request that it delayed. One thread for each CPU serves many
//! connections: a thread for each would wait for its turn longer than for the answer, and that would be measured.

use super::requests::open_session;
use super::{Count, Load, Mark, Outcome, Window, drive};
use crate::client::{Answer, PATIENCE, Session, Sessions, Target};
use anyhow::{Context, Result, ensure};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// What one wait may tell at most.
const EVENTS: usize = 256;

pub fn run(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    ensure!(load.rate > 0.0, "an open loop takes a rate above 0");
    let request = load.request();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(load.connections);
    let prepare = |thread: usize| {
        // By default the kernel may be 50 µs late.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let count = (thread..load.connections).step_by(threads).count();
        Loop::open(target, &request, count, Schedule { thread, threads, rate: load.rate })
    };
    drive(threads, load.duration, on_mark, prepare, |state, window| state.work(&request, window, load.duration))
}

/// The moments of one thread: one of `threads` in turn.
#[derive(Clone, Copy)]
struct Schedule {
    thread: usize,
    threads: usize,
    rate: f64,
}

impl Schedule {
    fn moment(self, begin: Instant, number: usize) -> Instant {
        begin + Duration::from_secs_f64((self.thread + number * self.threads) as f64 / self.rate)
    }
}

/// One thread's connections.
struct Loop {
    epoll: OwnedFd,
    connections: Vec<Connection>,
    /// Each has its turn.
    free: VecDeque<usize>,
    schedule: Schedule,
}

struct Connection {
    session: Session,
    /// When the request was due that waits for its answer, and what has come of that.
    asked: Option<(Instant, Answer)>,
}

impl Loop {
    fn open(target: &Target, request: &[u8], count: usize, schedule: Schedule) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("epoll")?;
        let config = target.config(Sessions::Fresh)?;
        let mut connections = Vec::with_capacity(count);
        for index in 0..count {
            let session = open_session(target, config.as_ref(), request)?;
            session.socket().set_nonblocking(true)?;
            let data = epoll::EventData::new_u64(index as u64);
            epoll::add(&epoll, session.socket(), data, epoll::EventFlags::IN).context("wait for a connection")?;
            connections.push(Connection { session, asked: None });
        }
        Ok(Self { epoll, connections, free: (0..count).collect(), schedule })
    }

    /// Moments after the end are nobody's; those before it are all kept, however late, but for a target that does not keep up.
    fn work(&mut self, request: &[u8], window: Window, grace: Duration) -> Result<Count> {
        let mut count = Count::new();
        let mut number = 0;
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let (now, due) = (Instant::now(), self.schedule.moment(window.begin, number));
            let is_over = due >= window.end || now > window.end + grace;
            if is_over && self.free.len() == self.connections.len() {
                return Ok(count);
            }
            if !is_over
                && due <= now
                && let Some(index) = self.free.pop_front()
            {
                let connection = &mut self.connections[index];
                connection.session.send(request)?;
                connection.asked = Some((due, Answer::default()));
                number += 1;
                continue;
            }
            let only_answers = is_over || self.free.is_empty();
            let timeout = if only_answers { PATIENCE } else { due.saturating_duration_since(now) };
            let timeout = Timespec::try_from(timeout).context("a wait's length")?;
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result.context("wait for answers")?,
            };
            ensure!(!only_answers || !events.is_empty(), "no answer for {} s", PATIENCE.as_secs());
            for event in events.drain(..) {
                let index = usize::try_from(event.data.u64())?;
                if self.connections[index].answered(&mut count)? {
                    self.free.push_back(index);
                }
            }
        }
    }
}

impl Connection {
    /// Takes what has come. True: its answer is whole.
    fn answered(&mut self, count: &mut Count) -> Result<bool> {
        let Some((due, answer)) = &mut self.asked else {
            // Between requests TLS itself may have something to say.
            let unasked = self.session.accepted_so_far(&mut Answer::default())?;
            ensure!(!unasked, "an answer came that nobody asked for");
            return Ok(false);
        };
        if !self.session.accepted_so_far(answer)? {
            return Ok(false);
        }
        count.took(*due);
        count.units += 1;
        self.asked = None;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Kind;

    #[test]
    fn threads_share_the_moments_out() {
        let begin = Instant::now();
        let of = |thread| Schedule { thread, threads: 2, rate: 1000.0 };
        let mut moments: Vec<_> = [of(0), of(1)].iter().flat_map(|s| (0..3).map(|n| s.moment(begin, n))).collect();
        moments.sort_unstable();
        assert_eq!(moments, (0..6).map(|ms| begin + Duration::from_millis(ms)).collect::<Vec<_>>());
    }

    #[test]
    fn every_moment_has_its_request_and_its_answer() {
        let address = crate::upstream::start(([127, 0, 0, 1], 0).into()).expect("a free port");
        let name = crate::certificate::NAME.try_into().expect("a name");
        let target = Target { address, name, tls: None };
        let load = Load { rate: 400.0, connections: 7, ..Load::of(Kind::OpenLoop, Duration::from_millis(1001)) };
        let outcome = run(&target, &load, &mut |_| Ok(())).expect("answers");
        assert_eq!((outcome.units, outcome.latency.len()), (401, 401), "from 0 s to 1 s, every 2.5 ms");
    }
}
