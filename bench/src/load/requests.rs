//! Small requests over kept connections, each as soon as the last was answered.

use super::{Load, Mark, Outcome, drive};
use crate::client::{Kept, Sessions, Target};
use anyhow::Result;
use rustls::ClientConfig;
use std::sync::Arc;

/// Requests on each connection before the clock runs.
const WARM_UP: usize = 20;

/// A connection that has had some requests, or the last of several, if the server allows fewer.
pub fn warm<'a>(target: &'a Target, config: Option<Arc<ClientConfig>>, request: &[u8]) -> Result<Kept<'a>> {
    let mut kept = Kept::open(target, config)?;
    for _ in 0..WARM_UP {
        kept.exchange(request)?;
    }
    Ok(kept)
}

pub fn run(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let request = load.request(target);
    let prepare = |_: usize| warm(target, target.config(Sessions::Fresh)?, &request);
    drive(load.connections, load.duration, on_mark, prepare, |kept, window, count| {
        let before = kept.reopened();
        count.until(window, |_| kept.exchange(&request));
        count.reopened = kept.reopened() - before;
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::super::fickle::{self, End};
    use super::*;
    use crate::load::{Count, Kind, run};
    use std::time::Duration;

    fn count(kind: Kind, requests: usize, end: End) -> Count {
        let load = Load { connections: 3, rate: 500.0, ..Load::of(kind, Duration::from_millis(400)) };
        run(&fickle::start(requests, end), &load, &mut |_| Ok(())).expect("the load goes on").count
    }

    #[test]
    fn a_connection_that_the_server_ends_is_no_failure() {
        for kind in [Kind::Request, Kind::OpenLoop] {
            for end in [End::Announced, End::Silent] {
                let Count { units, reopened, failure, .. } = count(kind, 3, end);
                assert!(units > 0 && reopened > 0, "{kind:?} {end:?}: {units} requests, {reopened} opened anew");
                assert_eq!(failure, None, "{kind:?} {end:?}");
            }
        }
    }

    #[test]
    fn what_fails_is_counted_and_the_load_goes_on() {
        for kind in [Kind::Request, Kind::OpenLoop] {
            let Count { units, failed, failure, .. } = count(kind, WARM_UP + 2, End::Refusal);
            assert!(units > 0 && failed > 0, "{kind:?}: {units} requests, {failed} failed");
            assert_eq!(failure.as_deref(), Some("the answer's status is 503"), "{kind:?}");
        }
    }

    #[test]
    fn a_request_without_an_answer_is_asked_once_more_and_not_for_ever() {
        // Each connection but those of the warm-up gets none.
        let target = fickle::start(1, End::Unanswered);
        let mut kept = Kept::open(&target, None).expect("it accepts");
        let error = kept.exchange(b"GET / HTTP/1.1\r\n\r\n").expect_err("no answer");
        assert!(error.is::<crate::client::Closed>(), "{error:#}");
        assert_eq!(kept.reopened(), 1);
    }
}
