//! Threads that begin and end their work together:
//!
//!   prepare ─▶ ready │ mark Begin │ work until the time is up │ done │ mark End │ let go
//!
//! Between the marks nothing is set up and nothing is torn down, so what a proxy costs between them is the work alone.

use super::{Count, Mark, Outcome, Window};
use anyhow::{Context, Result, anyhow};
use std::sync::{Barrier, Mutex, RwLock};
use std::time::{Duration, Instant};

/// Runs the same on each of the threads. An error in the work of one is a failure, and what it had done until then counts.
pub fn drive<S>(
    threads: usize,
    duration: Duration,
    on_mark: &mut dyn FnMut(Mark) -> Result<()>,
    prepare: impl Fn(usize) -> Result<S> + Sync,
    work: impl Fn(&mut S, Window, &mut Count) -> Result<()> + Sync,
) -> Result<Outcome> {
    let [ready, go, done, release] = [(); 4].map(|()| Barrier::new(threads + 1));
    let window = Mutex::new(None);
    let one = |index: usize| {
        let state = prepare(index);
        ready.wait();
        go.wait();
        let window = *window.lock().expect("no holder of this lock panics");
        let outcome = state.and_then(|mut state| {
            let window = window.ok_or_else(|| anyhow!("given up before it began"))?;
            let mut count = Count::new();
            if let Err(error) = work(&mut state, window, &mut count) {
                count.failed(&error);
            }
            // The state goes along: what is open stays open until the end was marked.
            Ok((count, state))
        });
        done.wait();
        release.wait();
        outcome.map(|(count, _)| count)
    };
    // Nobody waits for the others before all are there: the system may have no thread left.
    let are_all_there = RwLock::new(false);
    std::thread::scope(|scope| {
        let (one, are_all_there) = (&one, &are_all_there);
        let mut start = are_all_there.write().expect("no holder of this lock panics");
        let mut workers = Vec::with_capacity(threads);
        for index in 0..threads {
            let body = move || {
                let is_on = *are_all_there.read().expect("no holder of this lock panics");
                if is_on { one(index) } else { Err(anyhow!("given up before it began")) }
            };
            let worker = std::thread::Builder::new().spawn_scoped(scope, body);
            workers.push(worker.with_context(|| format!("start thread {} of {threads}", index + 1))?);
        }
        *start = true;
        drop(start);
        ready.wait();
        let begun = on_mark(Mark::Begin);
        let begin = Instant::now();
        if begun.is_ok() {
            *window.lock().expect("no holder of this lock panics") = Some(Window { begin, end: begin + duration });
        }
        go.wait();
        done.wait();
        let elapsed = begin.elapsed();
        let ended = begun.and_then(|()| on_mark(Mark::End));
        release.wait();
        let mut outcome = Outcome { elapsed, count: Count::new() };
        let mut trouble = None;
        for worker in workers {
            match worker.join().map_err(|_| anyhow!("a thread of the generator panicked")).flatten() {
                Ok(count) => outcome.count.add(count)?,
                Err(error) => trouble = Some(error),
            }
        }
        ended?;
        trouble.map_or(Ok(outcome), Err)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    #[test]
    fn what_was_done_before_a_failure_counts() {
        let mut marks = Vec::new();
        let mut on_mark = |mark| {
            marks.push(mark);
            Ok(())
        };
        let outcome = drive(3, Duration::ZERO, &mut on_mark, Ok, |index, _, count| {
            count.units = 10;
            if *index == 1 {
                bail!("the second broke");
            }
            Ok(())
        });
        let count = outcome.unwrap().count;
        assert_eq!((count.units, count.failed, count.failure.as_deref()), (30, 1, Some("the second broke")));
        assert_eq!(marks, [Mark::Begin, Mark::End]);
    }

    #[test]
    fn what_cannot_begin_is_an_error() {
        let prepare = |index| if index == 0 { Err(anyhow!("no connection")) } else { Ok(()) };
        let error = drive(2, Duration::ZERO, &mut |_| Ok(()), prepare, |(), _, _| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "no connection");
        let marked = drive(2, Duration::ZERO, &mut |_| bail!("no mark"), |_| Ok(()), |(), _, _| Ok(()));
        assert_eq!(marked.unwrap_err().to_string(), "no mark");
    }
}
