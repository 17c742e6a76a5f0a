//! Small requests over kept connections, each as soon as the last was answered.

use super::{Load, Mark, Outcome, drive};
use crate::client::{Closed, Kept, Session, Sessions, Target};
use anyhow::Result;
use rustls::ClientConfig;
use std::sync::Arc;

/// Requests on each connection before the clock runs.
const WARM_UP: usize = 20;

/// A connection that has had some requests; a new one, if the server allows no more.
pub fn open_session(target: &Target, config: Option<&Arc<ClientConfig>>, request: &[u8]) -> Result<Session> {
    let mut session = Session::open(target, config)?;
    session.exchange(request)?;
    for _ in 1..WARM_UP {
        let is_over = session.is_over()
            || match session.exchange(request) {
                Err(error) if error.is::<Closed>() => true,
                result => result.map(|()| false)?,
            };
        if is_over {
            return Session::open(target, config);
        }
    }
    Ok(session)
}

pub fn run(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let request = load.request(target);
    let prepare = |_: usize| {
        let mut kept = Kept::open(target, target.config(Sessions::Fresh)?)?;
        for _ in 0..WARM_UP {
            kept.exchange(&request)?;
        }
        Ok(kept)
    };
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
    use crate::load::{Kind, run};
    use std::time::Duration;

    fn outcome(kind: Kind, requests: usize, end: End) -> Outcome {
        let load = Load { connections: 3, rate: 500.0, ..Load::of(kind, Duration::from_millis(400)) };
        run(&fickle::start(requests, end), &load, &mut |_| Ok(())).expect("the load goes on")
    }

    #[test]
    fn a_connection_that_the_server_ends_is_no_failure() {
        for kind in [Kind::Request, Kind::OpenLoop] {
            for end in [End::Announced, End::Silent] {
                let Outcome { units, reopened, failure, .. } = outcome(kind, 3, end);
                assert!(units > 0 && reopened > 0, "{kind:?} {end:?}: {units} requests, {reopened} opened anew");
                assert_eq!(failure, None, "{kind:?} {end:?}");
            }
        }
    }

    #[test]
    fn what_fails_is_counted_and_the_load_goes_on() {
        for kind in [Kind::Request, Kind::OpenLoop] {
            let Outcome { units, failed, failure, .. } = outcome(kind, WARM_UP + 2, End::Refusal);
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
