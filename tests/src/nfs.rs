//! A real NFS share, on a kernel that is ours alone: its own server, told by hand what exportfs and mountd would tell it, and a
//! mount of it over loopback.
//!
//!   tmpfs ─▶ nfsd ─▶ 127.0.0.1 ─▶ nfs4 mount      stale: every handle is refused │ stopped: nobody answers │ unmounted
//!
//! Formats: net/sunrpc/cache.c and fs/nfsd/export.c. Only for root of a kernel where nobody else exports anything.

use crate::process::free_port;
use anyhow::{Context as _, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const NFSD: &str = "/proc/fs/nfsd";
/// What the server is told holds for ever.
const EXPIRY: &str = "2147483647";
/// The smallest that the server takes: so long it lets nobody open a file after its start.
const GRACE_SECONDS: &str = "10";
/// Any port may ask; without looking at parents; by its number (include/uapi/linux/nfsd/export.h). Root stays root.
const FLAGS: u32 = 0x2 | 0x400 | 0x2000;
const MOUNT_LIMIT: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug)]
pub struct Nfs {
    /// The server's own view: what another node of a fleet writes.
    pub export: PathBuf,
    /// What is mounted.
    pub mounted: PathBuf,
    port: u16,
    is_mounted: bool,
}

impl Nfs {
    pub fn start(folder: &Path) -> Result<Self> {
        let (export, mounted) = (folder.join("export"), folder.join("mounted"));
        fs::create_dir_all(&export)?;
        fs::create_dir_all(&mounted)?;
        if !Path::new(NFSD).join("threads").exists() {
            mount("nfsd", NFSD, "nfsd", MountFlags::empty(), None).context("mount the server's own file system")?;
        }
        mount("tmpfs", &export, "tmpfs", MountFlags::empty(), None).context("mount what is exported")?;
        let mut nfs = Self { export, mounted, port: free_port()?, is_mounted: false };
        nfs.serve()?;
        nfs.mount()?;
        Ok(nfs)
    }

    /// Starts the server, which begins with a time in which it opens no file.
    pub fn serve(&self) -> Result<()> {
        let say = |file: &str, line: &str| write(&Path::new(NFSD).join(file), line);
        say("versions", "-3 +4 +4.1")?;
        say("nfsv4leasetime", GRACE_SECONDS)?;
        say("nfsv4gracetime", GRACE_SECONDS)?;
        say("portlist", &format!("tcp {}", self.port))?;
        say("threads", "2")?;
        // It forgets these when it stops.
        tell("auth.unix.ip", &format!("nfsd 127.0.0.1 {EXPIRY} local"))?;
        tell("nfsd.export", &format!("local {} {EXPIRY} {FLAGS} 65534 65534 0", self.export.display()))?;
        self.stale(false)
    }

    /// Nobody answers from now on.
    pub fn stop(&self) -> Result<()> {
        write(&Path::new(NFSD).join("threads"), "0")
    }

    /// Whether every handle is one that the server has forgotten (ESTALE).
    pub fn stale(&self, is_stale: bool) -> Result<()> {
        // A key without a path is one that leads nowhere.
        let path = if is_stale { String::new() } else { format!(" {}", self.export.display()) };
        tell("nfsd.fh", &format!("local 1 \\x00000000 {EXPIRY}{path}"))
    }

    /// Mounts it. `soft`, so that a server that is gone is an error and no endless wait; nothing is believed unasked, nor
    /// kept from a mount before.
    pub fn mount(&mut self) -> Result<()> {
        let options = format!(
            "vers=4.1,addr=127.0.0.1,clientaddr=127.0.0.1,proto=tcp,port={},soft,timeo=5,retrans=1,sec=sys,\
             actimeo=0,nosharecache",
            self.port
        );
        let options = CString::new(options).expect("no zero in it");
        let deadline = Instant::now() + MOUNT_LIMIT;
        while let Err(error) = mount("127.0.0.1:/", &self.mounted, "nfs4", MountFlags::empty(), options.as_c_str()) {
            ensure!(Instant::now() < deadline, "mount by NFS: {error}");
            std::thread::sleep(Duration::from_millis(100));
        }
        self.is_mounted = true;
        Ok(())
    }

    /// The folder is empty from now on, whoever has files open in it.
    pub fn unmount(&mut self) -> Result<()> {
        self.is_mounted = false;
        unmount(&self.mounted, UnmountFlags::DETACH).context("unmount by NFS")
    }
}

impl Drop for Nfs {
    fn drop(&mut self) {
        // The kernel ends with the tests, whatever is left.
        if self.is_mounted {
            let _ = self.unmount();
        }
        let _ = self.stop();
        let _ = unmount(&self.export, UnmountFlags::DETACH);
    }
}

/// One line into a cache that mountd would fill.
fn tell(cache: &str, line: &str) -> Result<()> {
    write(&Path::new("/proc/net/rpc").join(cache).join("channel"), line)
}

fn write(file: &Path, line: &str) -> Result<()> {
    // In one call: each is one command.
    fs::write(file, format!("{line}\n")).with_context(|| format!("{line} > {}", file.display()))
}
