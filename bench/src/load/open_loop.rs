//! Small requests at a fixed rate: each has its moment, whether the last was answered or not.
//!
//!   a moment is due ─▶ a free connection sends │ epoll: answers, or the next moment ─▶ …
//!                                              └─ the server has ended it ─▶ opener.rs ─▶ free again
//!
//! Latency counts from the moment, so a stall shows in every request that it delayed. One thread for each CPU serves many
//! connections: a thread for each would wait for its turn longer than for the answer, and that would be measured.

mod opener;

use super::{Count, FAILURE_PAUSE, Load, Mark, Outcome, Window, drive};
use crate::client::{Answer, Closed, PATIENCE, Session, Target};
use anyhow::{Context, Result, bail, ensure};
use opener::Opener;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// What one wait may tell at most.
const EVENTS: usize = 256;
/// The opener's event, beside those of the connections by their index.
const OPENED: u64 = u64::MAX;

pub fn run(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    ensure!(load.rate > 0.0, "an open loop takes a rate above 0");
    let request = load.request(target);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(load.connections);
    let prepare = |thread: usize| {
        // By default the kernel may be 50 µs late.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let count = (thread..load.connections).step_by(threads).count();
        Loop::open(target, &request, count, Schedule { thread, threads, rate: load.rate })
    };
    drive(threads, load.duration, on_mark, prepare, |state, window, count| {
        state.work(&request, window, load.duration, count)
    })
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
    /// How many wait for an answer.
    asked: usize,
    opener: Opener,
    schedule: Schedule,
}

enum Connection {
    Free(Session),
    /// The request that waits for its answer, and what has come of that.
    Asked(Session, Due, Answer),
    /// Another is being opened; for a request that the last did not take.
    Opening(Option<Due>),
}

/// A request's moment.
#[derive(Clone, Copy)]
struct Due {
    at: Instant,
    /// The connection that it went to first was ended by the server: a second time is a failure.
    again: bool,
}

/// What events make of a connection.
enum Turn {
    Waits(Connection),
    Answered { session: Session, at: Instant },
    Ended { unanswered: Option<Due> },
}

impl Loop {
    fn open(target: &Target, request: &[u8], count: usize, schedule: Schedule) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("epoll")?;
        let opener = Opener::start(target.clone(), request.to_vec())?;
        let data = epoll::EventData::new_u64(OPENED);
        epoll::add(&epoll, opener.bell(), data, epoll::EventFlags::IN).context("wait for new connections")?;
        let (connections, free) = (Vec::with_capacity(count), VecDeque::with_capacity(count));
        let mut all = Self { epoll, connections, free, asked: 0, opener, schedule };
        for index in 0..count {
            let session = all.opener.first()?;
            all.connections.push(Connection::Opening(None));
            all.set_free(index, session)?;
        }
        Ok(all)
    }

    /// Takes a new connection in.
    fn set_free(&mut self, index: usize, session: Session) -> Result<()> {
        session.socket().set_nonblocking(true)?;
        let data = epoll::EventData::new_u64(index as u64);
        epoll::add(&self.epoll, session.socket(), data, epoll::EventFlags::IN).context("wait for a connection")?;
        self.connections[index] = Connection::Free(session);
        self.free.push_back(index);
        Ok(())
    }

    /// Moments after the end are nobody's; those before it are all kept, however late, but for a target that does not keep up.
    fn work(&mut self, request: &[u8], window: Window, grace: Duration, count: &mut Count) -> Result<()> {
        let mut number = 0;
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let (now, due) = (Instant::now(), self.schedule.moment(window.begin, number));
            let is_over = due >= window.end || now > window.end + grace;
            if is_over && self.asked == 0 {
                return Ok(());
            }
            if !is_over
                && due <= now
                && let Some(index) = self.free.pop_front()
            {
                self.ask(index, request, Due { at: due, again: false }, count);
                number += 1;
                continue;
            }
            let only_events = is_over || self.free.is_empty();
            let timeout = if only_events { PATIENCE } else { due.saturating_duration_since(now) };
            let timeout = Timespec::try_from(timeout).context("a wait's length")?;
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result.context("wait for answers")?,
            };
            ensure!(!only_events || !events.is_empty(), "no answer for {} s", PATIENCE.as_secs());
            for event in events.drain(..) {
                match event.data.u64() {
                    OPENED => self.take_opened(request, count)?,
                    index => self.turn(usize::try_from(index)?, count),
                }
            }
        }
    }

    fn ask(&mut self, index: usize, request: &[u8], due: Due, count: &mut Count) {
        let Connection::Free(mut session) = self.take(index) else { return };
        self.asked += 1;
        match session.send(request) {
            Ok(()) => self.connections[index] = Connection::Asked(session, due, Answer::default()),
            // The server has ended it, and its event is still to come.
            Err(_) if !due.again => self.reopen(index, Some(due), count),
            Err(error) => self.fail(index, &error, count),
        }
    }

    fn take(&mut self, index: usize) -> Connection {
        std::mem::replace(&mut self.connections[index], Connection::Opening(None))
    }

    /// A request has failed.
    fn fail(&mut self, index: usize, error: &anyhow::Error, count: &mut Count) {
        count.failed(error);
        self.asked -= 1;
        self.order(index, None, FAILURE_PAUSE, count);
    }

    fn reopen(&mut self, index: usize, unanswered: Option<Due>, count: &mut Count) {
        self.free.retain(|free| *free != index);
        self.order(index, unanswered, Duration::ZERO, count);
    }

    fn order(&mut self, index: usize, unanswered: Option<Due>, pause: Duration, count: &mut Count) {
        self.connections[index] = Connection::Opening(unanswered);
        if let Err(error) = self.opener.order(index, pause) {
            self.asked -= usize::from(unanswered.is_some());
            count.failed(&error);
        }
    }

    fn turn(&mut self, index: usize, count: &mut Count) {
        match self.take(index).turn() {
            Ok(Turn::Waits(connection)) => self.connections[index] = connection,
            Ok(Turn::Answered { session, at }) => {
                count.took(at);
                count.units += 1;
                self.asked -= 1;
                if session.is_over() {
                    self.reopen(index, None, count);
                } else {
                    self.connections[index] = Connection::Free(session);
                    self.free.push_back(index);
                }
            }
            Ok(Turn::Ended { unanswered }) => self.reopen(index, unanswered, count),
            Err(error) => self.fail(index, &error, count),
        }
    }

    fn take_opened(&mut self, request: &[u8], count: &mut Count) -> Result<()> {
        while let Some((index, opened)) = self.opener.opened()? {
            let Connection::Opening(unanswered) = self.connections[index] else { bail!("opened twice") };
            match opened {
                Ok(session) => {
                    count.reopened += 1;
                    self.set_free(index, session)?;
                    if let Some(due) = unanswered {
                        self.free.pop_back();
                        self.asked -= 1;
                        self.ask(index, request, Due { again: true, ..due }, count);
                    }
                }
                Err(error) => {
                    count.failed(&error);
                    self.asked -= usize::from(unanswered.is_some());
                    self.order(index, None, FAILURE_PAUSE, count);
                }
            }
        }
        Ok(())
    }
}

impl Connection {
    /// Takes what has come. Between requests that is TLS itself or the end; an error is one of a request's.
    fn turn(self) -> Result<Turn> {
        Ok(match self {
            Self::Free(mut session) => match session.is_idle() {
                Ok(()) => Turn::Waits(Self::Free(session)),
                Err(_) => Turn::Ended { unanswered: None },
            },
            Self::Asked(mut session, due, mut answer) => match session.accepted_so_far(&mut answer) {
                Ok(true) => Turn::Answered { session, at: due.at },
                Ok(false) => Turn::Waits(Self::Asked(session, due, answer)),
                Err(error) if error.is::<Closed>() && !due.again => Turn::Ended { unanswered: Some(due) },
                Err(error) => return Err(error),
            },
            // An event of the socket that is gone.
            Self::Opening(unanswered) => Turn::Waits(Self::Opening(unanswered)),
        })
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
        let count = outcome.count;
        assert_eq!((count.units, count.latency.len()), (401, 401), "from 0 s to 1 s, every 2.5 ms");
        assert_eq!((count.reopened, count.failed), (0, 0));
    }
}
