//! Certificates on a real NFS share: replaced by another node, and with everything that such a share does to its readers.

use super::certificates::{Load, POLL, Share, Way, end};
use crate::environment::{Environment, Kernel};
use crate::nfs::Nfs;
use crate::run::{Context, Test};
use anyhow::{Result, ensure};
use std::thread;
use std::time::Duration;

/// A fault lasts long enough to be seen twice, and so to be said.
const FAULT: Duration = POLL.saturating_mul(6);
const REPLACEMENTS: usize = 200;
const LIMIT: Duration = Duration::from_secs(400);

pub fn tests(env: &Environment) -> Vec<Test> {
    if env.kernel != Kernel::Uml {
        // It takes a kernel with an NFS server that is ours alone: the host's is not, and Debian's guests have no module of
        // it in their images. What reads the files is the same everywhere.
        return Vec::new();
    }
    let mut test =
        Test::new(env, "certificates_on_nfs_are_replaced_200_times_and_no_fault_of_the_share_is_seen", replaced_on_nfs);
    test.limit = LIMIT;
    vec![test]
}

/// What happens to the share while the certificates on it are replaced.
#[derive(Debug, Clone, Copy)]
enum Trouble {
    None(Way),
    /// Every handle is stale.
    Stale,
    Unmounted,
}

const TROUBLES: [Trouble; 7] = [
    Trouble::None(Way::Rename),
    Trouble::None(Way::Swap),
    Trouble::Stale,
    Trouble::None(Way::Halves),
    Trouble::None(Way::BadKey),
    Trouble::Unmounted,
    Trouble::None(Way::Vanished),
];
/// The server stops there and starts again, which takes it some seconds.
const STOPPED_AT: [usize; 2] = [60, 140];

fn replaced_on_nfs(ctx: &Context) -> Result<()> {
    let folder = ctx.environment.tmp.join("nfs");
    let load = Load::new(&folder)?;
    let mut nfs = Nfs::start(&folder)?;
    // Another node writes, and its changes come by the network.
    let mut share = Share::new(nfs.export.clone(), &load.leaves[0])?;
    let setup = load.serve(ctx, nfs.mounted.join("live"))?;
    // A server that has just started lets nobody in for a while.
    let patience = ctx.environment.patience() * 3;
    let shaken = load.replaced(&setup, REPLACEMENTS, patience, |turn, to| {
        if STOPPED_AT.contains(&turn) {
            nfs.stop()?;
            thread::sleep(FAULT);
            share.swap(to)?;
            return nfs.serve();
        }
        match TROUBLES[turn % TROUBLES.len()] {
            Trouble::None(way) => share.replace(way, to),
            Trouble::Stale => {
                nfs.stale(true)?;
                thread::sleep(FAULT);
                nfs.stale(false)?;
                // Only now: meanwhile the reader could not give back the delegation of a file that is removed, and the
                // server would wait for it until its lease ends.
                share.swap(to)
            }
            Trouble::Unmounted => {
                nfs.unmount()?;
                share.swap(to)?;
                thread::sleep(FAULT);
                nfs.mount()
            }
        }
    })?;
    let log = setup.proxy.log();
    let said = |word: &str| log.lines().filter(|line| line.contains("are refused") && line.contains(word)).count();
    let (stale, gone) = (said("Stale file handle"), said("No such file"));
    ctx.note(&format!("{REPLACEMENTS} replacements on NFS; stale {stale} times, gone {gone} times; {shaken}"));
    ensure!(stale > 0 && gone > 0, "stale {stale} times, gone {gone} times: the test proves nothing");
    end(setup)
}
