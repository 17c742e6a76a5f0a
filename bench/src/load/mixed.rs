//! What a site has: most answers are small, most bytes are in the few that are not, and some connections are kept.
//!
//!   ten requests on four new connections, of 1, 2, 3 and 4 requests; one of the ten, another one each time, is large
//!
//! Tens are begun until the time is up and then finished: a large answer more or less would be the whole difference.

use super::{Count, FAILURE_PAUSE, Load, Mark, Outcome, drive};
use crate::client::{Session, Sessions, Target};
use anyhow::Result;
use rustls::ClientConfig;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// How many requests the connections carry.
const CONNECTIONS: [u64; 4] = [1, 2, 3, 4];
const REQUESTS: u64 = 10;
const LARGE_BYTES: u64 = 8 << 20;
/// From one ten to the next the large one moves so far: no divisor of ten, so each place has its turn.
const STRIDE: u64 = 7;

pub fn run(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let (small, large) = (load.request(target), target.get(LARGE_BYTES));
    let tens = AtomicU64::new(0);
    let prepare = |_: usize| {
        let config = target.config(Sessions::Fresh)?;
        Session::open(target, config.as_ref())?.exchange(&small)?;
        Ok(config)
    };
    let ten = |config: Option<&Arc<ClientConfig>>, count: &mut Count| -> Result<()> {
        let mut until_large = large_place(tens.fetch_add(1, Ordering::Relaxed));
        for requests in CONNECTIONS {
            let mut session = Session::open(target, config)?;
            for _ in 0..requests {
                let since = Instant::now();
                session.exchange(if until_large == 0 { &large } else { &small })?;
                until_large = until_large.wrapping_sub(1);
                count.took(since);
                count.units += 1;
            }
            session.finish()?;
        }
        Ok(())
    };
    drive(load.connections, load.duration, on_mark, prepare, |config, window, count| {
        while Instant::now() < window.end {
            if let Err(error) = ten(config.as_ref(), count) {
                count.failed(&error);
                std::thread::sleep(FAILURE_PAUSE);
            }
        }
        Ok(())
    })
}

/// Which of its ten requests is the large one.
fn large_place(ten: u64) -> u64 {
    ten * STRIDE % REQUESTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ten_has_one_large_request_and_each_place_its_turn() {
        assert_eq!(CONNECTIONS.iter().sum::<u64>(), REQUESTS);
        let mut places: Vec<u64> = (0..REQUESTS).map(large_place).collect();
        places.sort_unstable();
        assert_eq!(places, (0..REQUESTS).collect::<Vec<_>>());
    }
}
