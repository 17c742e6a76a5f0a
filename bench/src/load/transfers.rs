//! New connections that move so many bytes one way and end. What they cost from accept to close, as the bytes grow, is the cost
//! curve: where it begins is what a connection costs, how steep it is what its bytes cost.
//!
//! As in bulk, a client decrypts no download of our upstream's and has sealed an upload before it begins to send.

use super::bulk::seal_upload;
use super::download::SCRATCH_BYTES;
use super::{Kind, Load, Mark, Outcome, drive};
use crate::client::{Session, Sessions, Target};
use anyhow::{Context, Result};

pub fn run(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let fetched = Load { answer_bytes: load.transfer_bytes, ..load.clone() }.request(target);
    let once = |config: Option<&std::sync::Arc<rustls::ClientConfig>>, scratch: &mut [u8]| -> Result<()> {
        let session = Session::open(target, config)?;
        match (load.kind, &load.path) {
            (Kind::Store, _) => store(session, target, load),
            // How long it is may be known at its end only.
            (_, Some(_)) => fetch_and_read(session, &fetched),
            (_, None) => fetch(session, &fetched, scratch),
        }
    };
    let prepare = |_: usize| {
        let config = target.config(Sessions::Fresh)?;
        let mut scratch = vec![0; SCRATCH_BYTES];
        once(config.as_ref(), &mut scratch)?;
        Ok((config, scratch))
    };
    drive(load.connections, load.duration, on_mark, prepare, |(config, scratch), window, count| {
        count.until(window, |_| once(config.as_ref(), scratch));
        Ok(())
    })
}

fn fetch(mut session: Session, request: &[u8], scratch: &mut [u8]) -> Result<()> {
    session.send(request)?;
    // Sealed now: once records are only counted, there is nobody left to seal it.
    let goodbye = session.sealed_goodbye()?;
    let mut counted = session.count_only()?;
    while !counted.is_whole() {
        counted.receive(scratch)?.context("the download ended early")?;
    }
    counted.end(&goodbye)?;
    while counted.receive(scratch)?.is_some() {}
    Ok(())
}

fn fetch_and_read(mut session: Session, request: &[u8]) -> Result<()> {
    session.exchange(request)?;
    if !session.is_over() {
        session.finish()?;
    }
    session.wait_for_end()
}

fn store(mut session: Session, target: &Target, load: &Load) -> Result<()> {
    let path = load.path.as_deref().unwrap_or("/");
    let records = seal_upload(&mut session, &target.post(path, load.transfer_bytes), load.transfer_bytes)?;
    session.send_sealed(&records)?;
    session.accepted()?;
    session.finish()?;
    session.wait_for_end()
}
