//! Loads the program that counts in the kernel, while the process may: before root ends and before the first bind.
//!
//!   object inside? ─▶ bpffs? ─▶ pins' folder, locked ─▶ cgroup ─▶ maps (pinned ones are taken up) ─▶ program ─▶ link
//!
//! The link is pinned too. One that lives is given the new program, one whose cgroup is gone or empty is replaced, so
//! that there are never two; what counts for the processes of another cgroup is left to them. Whatever is missing is
//! said in one line, and tlsplice serves on. eBPF only observes.

use super::cgroup::{Cgroup, mount_of};
use super::maps::{Locked, Maps, PROGRAM_PIN};
use crate::config::{KernelMetrics, Metrics};
use crate::sys::bpf;
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, SockOps};
use aya::{Ebpf, EbpfLoader};
use socket2::{Domain, Socket, Type};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, DirEntryExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tlsplice_ebpf::LAYOUT;

/// Where the pins are, unless the configuration says otherwise.
pub const PINS: &str = "/sys/fs/bpf/tlsplice";
const PROGRAM: &str = "tlsplice";
const LINK: &str = "LINK";
const MAPS: [&str; 8] =
    ["SOCKETS", "HANDSHAKES", "ENDPOINTS", "CLASSES", "ENDPOINT_NAMES", "CLASS_NAMES", "USER_WORDS", "USER_NAMES"];

/// What has come of it.
#[derive(Debug, Clone)]
pub enum Counting {
    On {
        maps: Arc<Maps>,
        /// What to know of it, in one line each.
        remarks: Vec<String>,
    },
    /// Why not, and what mends it.
    Off(String),
    /// The configuration wants none.
    Unwanted,
}

impl Counting {
    /// Loads and attaches, or says why not.
    pub fn start(wanted: &Metrics) -> Self {
        match wanted.kernel {
            KernelMetrics::Off => Self::Unwanted,
            KernelMetrics::Auto | KernelMetrics::Require => match load(&wanted.pins) {
                Ok((maps, remarks)) => Self::On { maps: Arc::new(maps), remarks },
                Err(why) => Self::Off(why),
            },
        }
    }

    pub fn maps(&self) -> Option<&Arc<Maps>> {
        match self {
            Self::On { maps, .. } => Some(maps),
            Self::Off(_) | Self::Unwanted => None,
        }
    }
}

/// The embedded object.
///
/// # Errors
/// There is none; how to get one.
pub fn object() -> Result<&'static [u8], String> {
    #[cfg(has_ebpf_object)]
    return Ok(aya::include_bytes_aligned!(env!("TLSPLICE_EBPF_OBJECT")));
    #[cfg(not(has_ebpf_object))]
    Err("this program was built without the eBPF object: `cargo xtask setup build`, then build it again".to_owned())
}

/// Opens the maps of the last process, without loading anything.
///
/// # Errors
/// One line: there are none, or they may not be opened.
pub fn open(pins: &Path) -> Result<Maps, String> {
    let folder = pins.join(LAYOUT);
    match fs::metadata(&folder) {
        Ok(_) => Maps::open(&folder).map_err(|e| format!("open the pinned maps: {e}")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let others = other_layouts(pins);
            let others = if others.is_empty() { String::new() } else { format!("; there is {}", others.join(", ")) };
            Err(format!("no tlsplice has counted here: {} is missing{others}", folder.display()))
        }
        Err(e) => Err(format!("{}: {e}", folder.display())),
    }
}

/// What is in the way of counting, and the line that mends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lack {
    pub found: String,
    pub mend: String,
}

/// What this host lacks, as far as can be seen without loading anything.
pub fn lacking() -> Option<Lack> {
    let lack = |found: String, mend: &str| Some(Lack { found, mend: mend.to_owned() });
    if let Err(found) = object() {
        return lack(found, "cargo xtask setup build && cargo build --release --bin tlsplice");
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if mount_of(&mounts, "cgroup2").is_none() {
        return lack("no cgroup2 is mounted".to_owned(), "mount -t cgroup2 none /sys/fs/cgroup");
    }
    if bpffs(Path::new(PINS)).is_err() {
        return lack("no bpf file system is mounted at /sys/fs/bpf".to_owned(), "mount -t bpf bpf /sys/fs/bpf");
    }
    let may = |c| caps::has_cap(None, caps::CapSet::Permitted, c).unwrap_or(false);
    if !(may(caps::Capability::CAP_BPF) && may(caps::Capability::CAP_NET_ADMIN)) {
        let mend = "start it as root, or with AmbientCapabilities=CAP_NET_BIND_SERVICE CAP_BPF CAP_NET_ADMIN CAP_PERFMON \
                    as in the unit";
        return lack("this process has no CAP_BPF and CAP_NET_ADMIN to load the program".to_owned(), mend);
    }
    None
}

fn load(pins: &Path) -> Result<(Maps, Vec<String>), String> {
    let object = object()?;
    let folder = pins.join(LAYOUT);
    bpffs(pins)?;
    let make = fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    make.map_err(|e| {
        // systemd mounts it for root alone.
        let mend =
            if e.kind() == io::ErrorKind::PermissionDenied { ": chmod 0711 /sys/fs/bpf, as the unit does" } else { "" };
        format!("make {}: {e}{mend}", folder.display())
    })?;
    let lock = File::open(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let locked = Locked::new(&lock).map_err(|e| format!("lock {}: {e}", folder.display()))?;
    let cgroup = Cgroup::enter()?;
    refuse_if_others_are_counted(&folder.join(LINK), &cgroup)?;
    let mut loader = EbpfLoader::new();
    for map in MAPS {
        loader.map_pin_path(map, folder.join(map));
    }
    let mut ebpf = loader.load(object).map_err(|e| refused("make the maps", &e))?;
    // Before the program is: maps of another shape must not be written to.
    let maps = Maps::open(&folder).map_err(|e| format!("open the pinned maps: {e}"))?;
    try_storage(&maps).map_err(|e| format!("label a socket: {e}: this kernel cannot keep anything with sockets"))?;
    attach(&mut ebpf, &cgroup, &folder)?;
    let maps = Maps::open(&folder).map_err(|e| format!("open the pinned maps: {e}"))?;
    drop(locked);
    maps.name_reserved_rows();
    Ok((maps, remarks(pins, &cgroup)))
}

/// A kernel may make the map and refuse its values: user-mode Linux 7.2 says ENOMEM. Then a listener is no place to find
/// out.
fn try_storage(maps: &Maps) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    maps.begin(socket.as_fd(), tlsplice_ebpf::Socket::new(0, false))
}

fn attach(ebpf: &mut Ebpf, cgroup: &Cgroup, folder: &Path) -> Result<(), String> {
    let program = ebpf.program_mut(PROGRAM).ok_or_else(|| format!("the eBPF object has no program {PROGRAM}"))?;
    let program: &mut SockOps = program.try_into().map_err(|e| refused("take the program", &e))?;
    program.load().map_err(|e| refused("load the program", &e))?;
    let pin = folder.join(PROGRAM_PIN);
    remove_pin(&pin)?;
    program.pin(&pin).map_err(|e| refused("pin the program", &e))?;
    let pin = &folder.join(LINK);
    if let Ok(link) = bpf::open_pin(pin)
        && bpf::cgroup_of_link(link.as_fd()).is_ok_and(|id| id == cgroup.id)
    {
        let fd = program.fd().map_err(|e| refused("take the program", &e))?;
        return bpf::replace_program(link.as_fd(), fd.as_fd())
            .map_err(|e| format!("put the new program into the pinned link: {e}"));
    }
    remove_pin(pin)?;
    let folder = File::open(&cgroup.path).map_err(|e| format!("{}: {e}", cgroup.path.display()))?;
    let attached = program.attach(folder, CgroupAttachMode::Single);
    let id = attached.map_err(|e| refused(&format!("attach to {}", cgroup.path.display()), &e))?;
    let link = program.take_link(id).map_err(|e| refused("take the link", &e))?;
    let link: FdLink = link.try_into().map_err(|e| refused("take the link", &e))?;
    link.pin(pin).map_err(|e| refused("pin the link", &e)).map(drop)
}

/// The pin is the link's only reference: without it another tlsplice would be counted no more, and not notice.
fn refuse_if_others_are_counted(pin: &Path, own: &Cgroup) -> Result<(), String> {
    let Ok(link) = bpf::open_pin(pin) else { return Ok(()) };
    // 0: its cgroup is gone.
    let id = bpf::cgroup_of_link(link.as_fd()).unwrap_or(0);
    if id == 0 || id == own.id {
        return Ok(());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| format!("/proc/self/mountinfo: {e}"))?;
    // One that is being removed has no folder any more.
    let other = mount_of(&mounts, "cgroup2").and_then(|mount| folder_with(mount, id));
    match other {
        // Of a cgroup above our own this process is a part.
        Some(other) if !own.path.starts_with(&other) && is_populated(&other) => Err(format!(
            "{} counts sockets of {}, which has processes: if another tlsplice is among them, give this one a \
             metrics.pins of its own; if not, rm {0}",
            pin.display(),
            other.display()
        )),
        Some(_) | None => Ok(()),
    }
}

/// The folder at any depth below `top` that has this inode, which is the number of a cgroup.
fn folder_with(top: PathBuf, inode: u64) -> Option<PathBuf> {
    let mut unread = vec![top];
    while let Some(folder) = unread.pop() {
        // It may be gone by now.
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if entry.ino() == inode {
                return Some(entry.path());
            }
            unread.push(entry.path());
        }
    }
    None
}

/// Whether there are processes in a cgroup or in any below it.
fn is_populated(cgroup: &Path) -> bool {
    fs::read_to_string(cgroup.join("cgroup.events"))
        .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}

fn remove_pin(pin: &Path) -> Result<(), String> {
    match fs::remove_file(pin) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(format!("remove the pin {}: {e}", pin.display())),
    }
}

/// One line for an error of aya's, whose causes are nested.
fn refused(step: &str, error: &dyn std::error::Error) -> String {
    let mut said = format!("{step}: {error}");
    let mut cause = error.source();
    let mut denied = false;
    while let Some(inner) = cause {
        let text = inner.to_string();
        if !said.contains(&text) {
            said.push_str(": ");
            said.push_str(text.lines().next().unwrap_or_default());
        }
        denied |= inner.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied);
        cause = inner.source();
    }
    if denied {
        said.push_str(": it takes CAP_BPF, CAP_NET_ADMIN and, on 6.1, CAP_PERFMON at the start");
    }
    said
}

/// Whether pins can be made there at all.
///
/// # Errors
/// One line with the mend.
pub fn bpffs(pins: &Path) -> Result<(), String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| format!("/proc/self/mountinfo: {e}"))?;
    let is_below = |mount: &PathBuf| pins.starts_with(mount);
    let below = mounts.lines().filter_map(|line| mount_of(line, "bpf")).any(|mount| is_below(&mount));
    if below {
        return Ok(());
    }
    let parent = pins.parent().unwrap_or(pins);
    Err(format!("no bpf file system is mounted at {0}: mount -t bpf bpf {0}", parent.display()))
}

/// Layouts of other versions, which are left alone.
fn other_layouts(pins: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(pins) else { return Vec::new() };
    let paths = entries.flatten().filter(|entry| entry.file_name() != LAYOUT).map(|entry| entry.path());
    paths.map(|path| path.display().to_string()).collect()
}

fn remarks(pins: &Path, cgroup: &Cgroup) -> Vec<String> {
    let mut remarks = Vec::new();
    for other in other_layouts(pins) {
        remarks
            .push(format!("{other} holds counts of another version's layout: left alone; rm -r {other} forgets them"));
    }
    if cgroup.is_short_lived {
        remarks.push(format!(
            "counts sockets of {}, which ends with the service: Slice={} in the unit lets it outlive a restart",
            cgroup.path.display(),
            super::cgroup::SLICE
        ));
    }
    remarks
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_cgroup_is_found_by_its_number_at_any_depth() {
        let top = tempfile::tempdir().expect("a folder");
        let service = top.path().join("system.slice/tlsplice.service");
        fs::create_dir_all(&service).expect("folders");
        fs::create_dir_all(top.path().join("user.slice/session-1.scope")).expect("folders");
        fs::write(service.join("cgroup.events"), "populated 0\nfrozen 0\n").expect("written");
        let inode = |path: &Path| fs::metadata(path).expect("it is there").ino();
        let found = folder_with(top.path().to_owned(), inode(&service)).expect("found");
        assert_eq!((found.as_path(), is_populated(&found)), (service.as_path(), false));
        fs::write(service.join("cgroup.events"), "populated 1\nfrozen 0\n").expect("written");
        assert!(is_populated(&service));
        let file = inode(&service.join("cgroup.events"));
        assert_eq!(folder_with(top.path().to_owned(), file), None);
    }
}
