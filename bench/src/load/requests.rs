//! Small requests over kept connections, each as soon as the last was answered.

use super::{Count, Load, Mark, Outcome, drive};
use crate::client::{Session, Sessions, Target};
use anyhow::Result;
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::Instant;

/// Requests on each connection before the clock runs.
const WARM_UP: usize = 20;

/// A connection that has had some requests.
pub fn open_session(target: &Target, config: Option<&Arc<ClientConfig>>, request: &[u8]) -> Result<Session> {
    let mut session = Session::open(target, config)?;
    for _ in 0..WARM_UP {
        session.exchange(request)?;
    }
    Ok(session)
}

pub fn run(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let request = load.request();
    let prepare = |_: usize| open_session(target, target.config(Sessions::Fresh)?.as_ref(), &request);
    drive(load.connections, load.duration, on_mark, prepare, |session, window| {
        let mut count = Count::new();
        while Instant::now() < window.end {
            let since = Instant::now();
            session.exchange(&request)?;
            count.took(since);
            count.units += 1;
        }
        Ok(count)
    })
}
