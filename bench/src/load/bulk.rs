//! Bulk: what a saturated connection moves. The client decrypts nothing on the way down and has sealed everything before the
//! way up begins, so that the machine's time goes to the proxy.

use super::{Count, Load, Mark, Outcome, drive};
use crate::client::{Counted, Session, Sessions, Target, post};
use anyhow::{Context, Result};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// What is read at once.
pub(super) const SCRATCH_BYTES: usize = 256 << 10;
/// So much flows before the clock runs: windows have grown then, and buffers are as full as they stay.
const RUN_IN_BYTES: u64 = 8 << 20;
/// What is sealed at once, from a buffer that repeats.
const SEALED_PIECE_BYTES: usize = 1 << 20;

/// A download that flows.
fn downloading(target: &Target, load: &Load) -> Result<Counted> {
    let mut session = Session::open(target, target.config(Sessions::Fresh)?.as_ref())?;
    session.send(&load.request())?;
    let mut counted = session.count_only()?;
    let mut scratch = vec![0; SCRATCH_BYTES];
    while load.path.is_none() && counted.payload() < RUN_IN_BYTES {
        counted.receive(&mut scratch)?.context("the download ended before it flowed")?;
    }
    Ok(counted)
}

fn download(counted: &mut Counted, goes_on: impl Fn() -> bool) -> Result<Count> {
    let mut count = Count::new();
    let mut scratch = vec![0; SCRATCH_BYTES];
    while goes_on() {
        match counted.receive(&mut scratch)? {
            Some(payload) => count.units += payload,
            None => break,
        }
    }
    Ok(count)
}

/// An upload that only has to be sent.
#[derive(Debug)]
struct Upload {
    session: Session,
    records: Vec<u8>,
    bytes: u64,
}

fn sealed(target: &Target, load: &Load) -> Result<Upload> {
    let mut session = Session::open(target, target.config(Sessions::Fresh)?.as_ref())?;
    // Everything is set up at the peer before the clock runs, its connection to the upstream too, whatever that answers.
    session.send(&crate::client::get(1))?;
    session.answer(|_, _| ())?;
    let records = seal_upload(&mut session, load.path.as_deref().unwrap_or("/"), load.upload_bytes)?;
    Ok(Upload { session, records, bytes: load.upload_bytes })
}

/// The records of a request with a body.
pub(super) fn seal_upload(session: &mut Session, path: &str, bytes: u64) -> Result<Vec<u8>> {
    let mut records = Vec::with_capacity(usize::try_from(bytes + bytes / 256)?);
    session.seal(&post(path, bytes), &mut records)?;
    let mut left = usize::try_from(bytes)?;
    let piece = vec![0x5a; SEALED_PIECE_BYTES.min(left)];
    while left > 0 {
        let count = left.min(piece.len());
        session.seal(&piece[..count], &mut records)?;
        left -= count;
    }
    Ok(records)
}

fn upload(upload: &mut Upload) -> Result<Count> {
    let mut count = Count::new();
    upload.session.send_sealed(&upload.records)?;
    upload.session.accepted()?;
    count.units = upload.bytes;
    Ok(count)
}

pub fn down(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let prepare = |_: usize| downloading(target, load);
    drive(load.connections, load.duration, on_mark, prepare, |counted, window| {
        download(counted, || Instant::now() < window.end)
    })
}

/// Its length is the bytes' to say, not the clock's.
pub fn up(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let prepare = |_: usize| sealed(target, load);
    drive(load.connections, load.duration, on_mark, prepare, |prepared, _| upload(prepared))
}

/// Downloads go on for as long as there are uploads.
pub fn both(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    enum Way {
        Down(Counted),
        Up(Upload),
    }
    let ups = AtomicUsize::new(load.connections / 2);
    let prepare = |index: usize| {
        let is_up = index < load.connections / 2;
        if is_up { sealed(target, load).map(Way::Up) } else { downloading(target, load).map(Way::Down) }
    };
    drive(load.connections, load.duration, on_mark, prepare, |way, _| match way {
        Way::Down(counted) => download(counted, || ups.load(Ordering::Relaxed) > 0),
        Way::Up(prepared) => {
            let count = upload(prepared);
            ups.fetch_sub(1, Ordering::Relaxed);
            count
        }
    })
}
