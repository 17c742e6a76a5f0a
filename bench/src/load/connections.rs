//! Connections that are opened for one small answer and closed again.

use super::{Kind, Load, Mark, Outcome, drive};
use crate::client::{Session, Sessions, Target};
use anyhow::Result;

pub fn run(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let sessions = if load.kind == Kind::Resumed { Sessions::Resumed } else { Sessions::Fresh };
    let request = load.request(target);
    let once = |config: Option<&std::sync::Arc<rustls::ClientConfig>>| -> Result<bool> {
        let mut session = Session::open(target, config)?;
        session.exchange(&request)?;
        session.finish()?;
        if load.kind == Kind::Churn {
            session.wait_for_end()?;
        }
        Ok(session.resumed())
    };
    let prepare = |_: usize| {
        let config = target.config(sessions)?;
        // The first connection of each thread brings its tickets, and warms the peer up.
        once(config.as_ref())?;
        Ok(config)
    };
    drive(load.connections, load.duration, on_mark, prepare, |config, window, count| {
        count.until(window, |count| {
            count.resumed += u64::from(once(config.as_ref())?);
            Ok(())
        });
        Ok(())
    })
}
