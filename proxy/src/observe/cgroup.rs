//! The cgroup whose sockets are counted: one that outlives the service.
//!
//!   below tlsplice.slice (the unit says so) ─▶ that slice
//!   in another service's cgroup             ─▶ that one, which ends with the service
//!   elsewhere                               ─▶ tlsplice.slice is made, and the process joins a leaf of it
//!
//! A socket belongs to the cgroup that its process was in when it was made, so this comes before the first bind.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// systemd's slice for the unit, and the cgroup that is made where there is none.
pub const SLICE: &str = "tlsplice.slice";
/// The leaf for a process that systemd has not placed.
const LEAF: &str = "run";

/// A cgroup that the program can be attached to.
#[derive(Debug)]
pub struct Cgroup {
    pub path: PathBuf,
    /// Its number, as links name it.
    pub id: u64,
    /// It goes with the service, and the counting with it.
    pub is_short_lived: bool,
}

impl Cgroup {
    /// Finds the cgroup and sees to it that this process is in it.
    ///
    /// # Errors
    /// One line: what this host lacks or refuses.
    pub fn enter() -> Result<Self, String> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| format!("/proc/self/mountinfo: {e}"))?;
        let mount =
            mount_of(&mounts, "cgroup2").ok_or("no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup")?;
        let own = fs::read_to_string("/proc/self/cgroup").map_err(|e| format!("/proc/self/cgroup: {e}"))?;
        let own = own_path(&own).ok_or("/proc/self/cgroup names no cgroup of version 2")?;
        match place(own) {
            Place::Within(path) => Self::at(mount.join(path), false),
            Place::Service(path) => Self::at(mount.join(path), true),
            Place::Elsewhere => {
                let slice = mount.join(SLICE);
                let leaf = slice.join(LEAF);
                fs::create_dir_all(&leaf).map_err(|e| format!("make {}: {e}", leaf.display()))?;
                join(&leaf).map_err(|e| format!("join {}: {e}", leaf.display()))?;
                Self::at(slice, false)
            }
        }
    }

    fn at(path: PathBuf, is_short_lived: bool) -> Result<Self, String> {
        let id = fs::metadata(&path).map_err(|e| format!("{}: {e}", path.display()))?.ino();
        Ok(Self { path, id, is_short_lived })
    }
}

fn join(leaf: &Path) -> io::Result<()> {
    fs::write(leaf.join("cgroup.procs"), "0")
}

/// The first mount of that type, by proc(5)'s mountinfo.
pub fn mount_of(mountinfo: &str, kind: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (fields, rest) = line.split_once(" - ")?;
        (rest.split(' ').next() == Some(kind)).then(|| fields.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// What follows `0::`, without the first slash.
fn own_path(cgroups: &str) -> Option<&str> {
    cgroups.lines().find_map(|line| line.strip_prefix("0::")).map(|path| path.trim_start_matches('/'))
}

#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    /// Below the slice, which has this path.
    Within(&'a str),
    Service(&'a str),
    Elsewhere,
}

fn place(own: &str) -> Place<'_> {
    let mut end = 0;
    for part in own.split('/') {
        end += part.len();
        if part == SLICE {
            return Place::Within(&own[..end]);
        }
        end += 1;
    }
    if own.ends_with(".service") { Place::Service(own) } else { Place::Elsewhere }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slice_comes_before_the_service_and_all_else_is_left() {
        assert_eq!(place("tlsplice.slice/tlsplice.service"), Place::Within("tlsplice.slice"));
        assert_eq!(place("machine/tlsplice.slice/run"), Place::Within("machine/tlsplice.slice"));
        assert_eq!(place("system.slice/tlsplice.service"), Place::Service("system.slice/tlsplice.service"));
        assert_eq!(place("user.slice/user-0.slice/session-1.scope"), Place::Elsewhere);
        assert_eq!(place(""), Place::Elsewhere);
    }

    #[test]
    fn mounts_and_cgroups_are_found_in_what_the_kernel_says() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n\
                      31 23 0:27 / /sys/fs/bpf rw - bpf bpf rw,mode=700\n";
        assert_eq!(mount_of(mounts, "cgroup2"), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(mount_of(mounts, "bpf"), Some(PathBuf::from("/sys/fs/bpf")));
        assert_eq!(mount_of(mounts, "tracefs"), None);
        assert_eq!(own_path("9:name=systemd:/\n0::/a/b.service\n"), Some("a/b.service"));
    }
}
