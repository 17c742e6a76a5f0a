//! New connections that move so many bytes one way and end. What they cost from accept to close, as the bytes grow, is the cost
//! curve: where it begins is what a connection costs, how steep it is what its bytes cost.
//!
//! As in bulk, a client decrypts no download and has sealed an upload before it begins to send.

use super::bulk::{SCRATCH_BYTES, seal_upload};
use super::{Count, Kind, Load, Mark, Outcome, drive};
use crate::client::{Session, Sessions, Target, get};
use crate::upstream;
use anyhow::{Context, Result};
use std::time::Instant;

pub fn run(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let bytes = load.transfer_bytes;
    let mut fetched = get(bytes);
    if let Some(path) = &load.path {
        fetched = crate::client::get_path(path);
    }
    let once = |config: Option<&std::sync::Arc<rustls::ClientConfig>>, scratch: &mut [u8]| -> Result<()> {
        let session = Session::open(target, config)?;
        if load.kind == Kind::Store { store(session, load) } else { fetch(session, &fetched, bytes, scratch) }
    };
    let prepare = |_: usize| {
        let config = target.config(Sessions::Fresh)?;
        let mut scratch = vec![0; SCRATCH_BYTES];
        once(config.as_ref(), &mut scratch)?;
        Ok((config, scratch))
    };
    drive(load.connections, load.duration, on_mark, prepare, |(config, scratch), window| {
        let mut count = Count::new();
        while Instant::now() < window.end {
            let since = Instant::now();
            once(config.as_ref(), scratch)?;
            count.took(since);
            count.units += 1;
        }
        Ok(count)
    })
}

fn fetch(mut session: Session, request: &[u8], bytes: u64, scratch: &mut [u8]) -> Result<()> {
    session.send(request)?;
    // Sealed now: once records are only counted, there is nobody left to seal it.
    let goodbye = session.sealed_goodbye()?;
    let mut counted = session.count_only()?;
    let whole = bytes + upstream::head(bytes).len() as u64;
    while counted.payload() < whole || !counted.is_between_records() {
        counted.receive(scratch)?.context("the download ended early")?;
    }
    counted.end(&goodbye)?;
    while counted.receive(scratch)?.is_some() {}
    Ok(())
}

fn store(mut session: Session, load: &Load) -> Result<()> {
    let path = load.path.as_deref().unwrap_or("/");
    let records = seal_upload(&mut session, path, load.transfer_bytes)?;
    session.send_sealed(&records)?;
    session.accepted()?;
    session.finish()?;
    session.wait_for_end()
}
