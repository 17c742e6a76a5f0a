//! Work on several things, so many at a time, with what came of it in their order.

use std::iter;
use std::sync::Mutex;
use std::thread;

/// As many as this machine has processors for.
pub fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Performs the work on each item, `at_once` of them at a time.
pub fn perform<T: Send, R: Send>(items: Vec<T>, at_once: usize, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let queue = Mutex::new(items.into_iter().enumerate());
    let next = || queue.lock().expect("no holder of this lock panics").next();
    let some = || iter::from_fn(next).map(|(at, item)| (at, work(item))).collect::<Vec<_>>();
    let mut done: Vec<(usize, R)> = thread::scope(|scope| {
        let running: Vec<_> = (0..at_once).map(|_| scope.spawn(some)).collect();
        running.into_iter().flat_map(|some| some.join().expect("no work panics")).collect()
    });
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn results_stand_in_the_order_of_the_items_and_two_run_at_a_time() {
        let pair = Barrier::new(2);
        let done = perform(vec![3, 1, 2, 4], 2, |item| {
            // Alone it would wait forever.
            pair.wait();
            item * 10
        });
        assert_eq!(done, [30, 10, 20, 40]);
    }
}
