//! Bulk: what a saturated connection moves. The client decrypts nothing on the way down and has sealed everything before the
//! way up begins, so that the machine's time goes to the proxy.

use super::download::{Download, SCRATCH_BYTES};
use super::{Count, Load, Mark, Outcome, drive};
use crate::client::{Session, Sessions, Target};
use anyhow::{Result, ensure};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// So much flows before the clock runs: windows have grown then, and buffers are as full as they stay.
const RUN_IN_BYTES: u64 = 8 << 20;
/// What is sealed at once, from a buffer that repeats.
const SEALED_PIECE_BYTES: usize = 1 << 20;

/// A download that flows.
fn downloading<'a>(target: &'a Target, load: &Load) -> Result<Download<'a>> {
    let mut download = Download::open(target, load)?;
    let mut scratch = vec![0; SCRATCH_BYTES];
    while download.payload().is_some_and(|payload| payload < RUN_IN_BYTES) {
        download.receive(&mut scratch)?;
    }
    Ok(download)
}

fn download(download: &mut Download<'_>, count: &mut Count, goes_on: impl Fn() -> bool) -> Result<()> {
    let mut scratch = vec![0; SCRATCH_BYTES];
    while goes_on() {
        count.units += download.receive(&mut scratch)?;
    }
    count.reopened = download.reopened();
    Ok(())
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
    session.send(&target.get(1))?;
    session.answer(|_, _| ())?;
    let head = target.post(load.path.as_deref().unwrap_or("/"), load.upload_bytes);
    let records = seal_upload(&mut session, &head, load.upload_bytes)?;
    Ok(Upload { session, records, bytes: load.upload_bytes })
}

/// The records of a request with a body.
pub(super) fn seal_upload(session: &mut Session, head: &[u8], bytes: u64) -> Result<Vec<u8>> {
    let mut records = Vec::with_capacity(usize::try_from(bytes + bytes / 256)?);
    session.seal(head, &mut records)?;
    let mut left = usize::try_from(bytes)?;
    let piece = vec![0x5a; SEALED_PIECE_BYTES.min(left)];
    while left > 0 {
        let count = left.min(piece.len());
        session.seal(&piece[..count], &mut records)?;
        left -= count;
    }
    Ok(records)
}

fn upload(upload: &mut Upload, count: &mut Count) -> Result<()> {
    upload.session.send_sealed(&upload.records)?;
    upload.session.accepted()?;
    count.units = upload.bytes;
    Ok(())
}

pub fn down(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let prepare = |_: usize| downloading(target, load);
    drive(load.connections, load.duration, on_mark, prepare, |prepared, window, count| {
        download(prepared, count, || Instant::now() < window.end)
    })
}

/// Its length is the bytes' to say, not the clock's.
pub fn up(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    let prepare = |_: usize| sealed(target, load);
    drive(load.connections, load.duration, on_mark, prepare, |prepared, _, count| upload(prepared, count))
}

/// Downloads go on for as long as there are uploads.
pub fn both(target: &Target, load: &Load, on_mark: &mut dyn FnMut(Mark) -> Result<()>) -> Result<Outcome> {
    enum Way<'a> {
        Down(Download<'a>),
        Up(Upload),
    }
    ensure!(load.connections >= 2, "both takes two connections at least: one for each way");
    let ups = AtomicUsize::new(load.connections / 2);
    let prepare = |index: usize| {
        if index >= load.connections / 2 {
            return downloading(target, load).map(Way::Down);
        }
        let upload = sealed(target, load);
        if upload.is_err() {
            ups.fetch_sub(1, Ordering::Relaxed);
        }
        upload.map(Way::Up)
    };
    drive(load.connections, load.duration, on_mark, prepare, |way, _, count| match way {
        Way::Down(prepared) => download(prepared, count, || ups.load(Ordering::Relaxed) > 0),
        Way::Up(prepared) => {
            let result = upload(prepared, count);
            ups.fetch_sub(1, Ordering::Relaxed);
            result
        }
    })
}
