//! The folder that a fleet shares: who leads, what time it is, and the file of keys.
//!
//!   poll ─▶ clock of the file server ─▶ read ─▶ due? ─▶ lease (O_EXCL, expires) ─▶ still the same? ─▶ temp, fsync, rename
//!
//! One node leads at a time: it holds `leader`, which it created with O_EXCL and touches at every poll. A lease that has
//! not been touched for `LEASE_POLLS` polls is taken away by renaming it, which one node alone can do. Should two ever
//! lead, the generation in the file stops the second. One that cannot write leaves the lead to others. Blocks on the file
//! system: never called on a worker.

use super::Skew;
use super::file::{Epochs, FILE_BYTES};
use crate::sys::privilege;
use aws_lc_rs::rand;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const KEYS: &str = "tickets.keys";
const LEADER: &str = "leader";
/// A leader that has missed so many polls is gone.
const LEASE_POLLS: u32 = 4;
/// A leader whose writes have failed so often in a row leaves the lead to others, for as many polls as a lease has: the
/// next poll mends what passes, and a full quota is this node's alone.
const FAILED_WRITES: u32 = 2;
/// Clocks that agree so far are taken to agree.
const SKEW_IGNORED_MS: i64 = 100;
/// Polls within one lifetime: `next` is known everywhere long before it seals.
const POLLS_IN_LIFETIME: u32 = 8;
const POLL_MAX: Duration = Duration::from_secs(30);
/// Read or write by the group or by others.
const OTHERS_MODE: u32 = 0o077;

/// One node's view of the folder.
pub struct Shared {
    folder: PathBuf,
    length_ms: u64,
    poll: Duration,
    /// Names this node in its lease.
    node: String,
    leads: bool,
    failed_writes: u32,
    /// Polls in which it takes no lease.
    stands_back: u32,
}

/// What a poll has found.
pub struct Polled {
    pub epochs: Epochs,
    pub skew: Skew,
    pub generation: u64,
    pub leads: bool,
}

impl Shared {
    pub fn new(folder: PathBuf, lifetime: Duration) -> io::Result<Self> {
        let mut random = [0; 8];
        rand::fill(&mut random).map_err(io::Error::other)?;
        let random = random.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let node = format!("{} {} {random}", host.trim(), std::process::id());
        let length_ms = u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX);
        let poll = (lifetime / POLLS_IN_LIFETIME).min(POLL_MAX);
        Ok(Self { folder, length_ms, poll, node, leads: false, failed_writes: 0, stands_back: 0 })
    }

    /// How long to wait between polls.
    pub fn poll_interval(&self) -> Duration {
        self.poll
    }

    /// Reads the keys, and rotates them if that is due and this node leads.
    ///
    /// # Errors
    /// The folder cannot be used, and why; or there is no file yet and another node is about to write it.
    pub fn poll(&mut self) -> Result<Polled, String> {
        let skew = self.skew()?;
        let now = skew.now();
        self.stands_back = self.stands_back.saturating_sub(1);
        self.leads = self.lead(now)?;
        let found = self.read()?;
        let epochs = match found {
            None if self.leads => Some(Epochs::begin(now, self.length_ms).ok_or("the random source failed")?),
            None => return Err(format!("{}: not there yet; another node leads", self.folder.join(KEYS).display())),
            Some(old) if self.leads && old.is_due(now) => {
                let mut new = old.rotate(now).ok_or("the random source failed")?;
                // A lifetime that was configured anew holds from the next epoch on.
                new.length = self.length_ms;
                Some(new)
            }
            Some(old) => {
                let generation = old.generation;
                return Ok(Polled { epochs: old, skew, generation, leads: self.leads });
            }
        };
        let new = epochs.ok_or("no keys")?;
        self.write(&new).inspect_err(|_| self.write_failed())?;
        self.failed_writes = 0;
        let generation = new.generation;
        Ok(Polled { epochs: new, skew, generation, leads: true })
    }

    /// Gives the lease back, so that another node need not wait for its end.
    pub fn resign(&mut self) {
        if std::mem::take(&mut self.leads) && self.holds_lease() {
            let _ = fs::remove_file(self.folder.join(LEADER));
        }
    }

    /// Once may pass; more is a reason to give the lease back.
    fn write_failed(&mut self) {
        self.failed_writes += 1;
        if self.failed_writes >= FAILED_WRITES {
            (self.failed_writes, self.stands_back) = (0, LEASE_POLLS + 1);
            self.resign();
        }
    }

    fn said(path: &Path, e: &io::Error) -> String {
        format!("{}: {e}", path.display())
    }

    /// The file server's clock less ours, from the time it gives to a new file.
    fn skew(&self) -> Result<Skew, String> {
        let path = self.temporary("clock");
        let before = SystemTime::now();
        let file = create_anew(&path).map_err(|e| Self::said(&path, &e))?;
        let modified = file.metadata().and_then(|metadata| metadata.modified());
        let after = SystemTime::now();
        let _ = fs::remove_file(&path);
        let ms = |time: SystemTime| {
            i64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(i64::MAX)
        };
        let (before, after) = (ms(before), ms(after));
        let modified = ms(modified.map_err(|e| Self::said(&path, &e))?);
        let skew = modified - i64::midpoint(before, after);
        // Within the call's own time and a tick of the clock they agree.
        let agree = skew.abs() <= SKEW_IGNORED_MS + (after - before);
        Ok(Skew { milliseconds: if agree { 0 } else { skew } })
    }

    fn temporary(&self, what: &str) -> PathBuf {
        let node = self.node.rsplit(' ').next().unwrap_or_default();
        self.folder.join(format!(".{what}-{}-{node}", std::process::id()))
    }

    fn read(&self) -> Result<Option<Epochs>, String> {
        let path = self.folder.join(KEYS);
        let opened = File::open(&path)
            .or_else(|e| if e.raw_os_error() == Some(libc::ESTALE) { File::open(&path) } else { Err(e) });
        let file = match opened {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Self::said(&path, &e)),
        };
        let metadata = file.metadata().map_err(|e| Self::said(&path, &e))?;
        if metadata.mode() & OTHERS_MODE != 0 {
            let mode = metadata.mode() & 0o7777;
            return Err(format!(
                "{0}: has mode {mode:04o}: others may read or write it: chmod 600 {0}",
                path.display()
            ));
        }
        if metadata.uid() != privilege::effective_uid() && !privilege::is_root() {
            return Err(format!("{}: belongs to uid {}, another user", path.display(), metadata.uid()));
        }
        let mut bytes = zeroize::Zeroizing::new(Vec::with_capacity(FILE_BYTES + 1));
        file.take(FILE_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(|e| Self::said(&path, &e))?;
        Epochs::parse(&bytes).map(Some).map_err(|why| {
            format!("{}: {why}: remove it, and the leader writes a new one (every ticket is lost then)", path.display())
        })
    }

    fn write(&self, epochs: &Epochs) -> Result<(), String> {
        let temporary = self.temporary("keys");
        self.put(&temporary, epochs).inspect_err(|_| drop(fs::remove_file(&temporary)))?;
        // So that the new name survives a crash of the file server.
        File::open(&self.folder).and_then(|folder| folder.sync_all()).map_err(|e| Self::said(&self.folder, &e))
    }

    /// Only what follows on what is there is put in its place.
    fn put(&self, temporary: &Path, epochs: &Epochs) -> Result<(), String> {
        let path = self.folder.join(KEYS);
        let written = create_anew(temporary).and_then(|mut file| {
            file.write_all(&epochs.to_bytes())?;
            file.sync_all()
        });
        written.map_err(|e| Self::said(temporary, &e))?;
        let there = self.read()?.map_or(0, |there| there.generation);
        if !self.holds_lease() || there.saturating_add(1) != epochs.generation {
            return Err("another node has taken the lead".to_owned());
        }
        fs::rename(temporary, &path).map_err(|e| Self::said(&path, &e))
    }

    fn holds_lease(&self) -> bool {
        fs::read_to_string(self.folder.join(LEADER)).is_ok_and(|holder| holder == self.node)
    }

    /// Whether this node leads, from now until the lease ends.
    fn lead(&self, now: u64) -> Result<bool, String> {
        let path = self.folder.join(LEADER);
        if self.holds_lease() {
            // The write gives it the file server's time.
            let touched = OpenOptions::new().write(true).open(&path).and_then(|mut file| {
                file.write_all(self.node.as_bytes())?;
                file.sync_all()
            });
            return Ok(touched.is_ok() && self.holds_lease());
        }
        if self.stands_back > 0 {
            return Ok(false);
        }
        match create(&path) {
            Ok(mut file) => {
                file.write_all(self.node.as_bytes())
                    .and_then(|()| file.sync_all())
                    .map_err(|e| Self::said(&path, &e))?;
                return Ok(true);
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Self::said(&path, &e)),
        }
        if self.is_expired(&path, now) {
            let aside = self.temporary("lease");
            if fs::rename(&path, &aside).is_ok() {
                // Between the look and the rename somebody else may have done the same and leads now.
                if !self.is_expired(&aside, now) {
                    let _ = fs::hard_link(&aside, &path);
                }
                let _ = fs::remove_file(&aside);
            }
        }
        Ok(false)
    }

    fn is_expired(&self, lease: &Path, now: u64) -> bool {
        let lease_ms = u64::try_from((self.poll * LEASE_POLLS).as_millis()).unwrap_or(u64::MAX);
        let touched = fs::metadata(lease).and_then(|metadata| metadata.modified()).ok();
        let touched = touched.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        touched.is_some_and(|time| u64::try_from(time.as_millis()).unwrap_or(0).saturating_add(lease_ms) < now)
    }
}

/// A file that was not there, for its owner alone.
fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// The same in place of what this node itself has left behind, when a call failed or the folder was away.
fn create_anew(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        Ok(()) | Err(_) => {}
    }
    create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(folder: &tempfile::TempDir, lifetime_ms: u64) -> Shared {
        Shared::new(folder.path().to_path_buf(), Duration::from_millis(lifetime_ms)).expect("random")
    }

    #[test]
    fn one_leads_the_others_read_the_same_keys() {
        let folder = tempfile::tempdir().expect("a folder");
        let (mut one, mut two) = (node(&folder, 60_000), node(&folder, 60_000));
        let first = one.poll().expect("keys");
        let second = two.poll().expect("keys");
        assert!(first.leads && !second.leads);
        assert_eq!(*first.epochs.to_bytes(), *second.epochs.to_bytes());
        assert_eq!(one.poll().expect("keys").generation, 1);
        assert_eq!(left(&folder).len(), 2, "{:?}", left(&folder));
    }

    #[test]
    fn a_leader_that_is_gone_is_replaced_and_one_that_resigns_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let (mut one, mut two) = (node(&folder, 200), node(&folder, 200));
        one.poll().expect("keys");
        assert!(!two.poll().expect("keys").leads);
        std::thread::sleep(Duration::from_millis(250));
        let takes_over = (0..3).any(|_| two.poll().expect("keys").leads);
        assert!(takes_over && !one.poll().expect("keys").leads);
        assert!(two.poll().expect("keys").generation >= 2);
        two.resign();
        assert!(one.poll().expect("keys").leads);
    }

    fn left(folder: &tempfile::TempDir) -> Vec<std::ffi::OsString> {
        fs::read_dir(folder.path()).expect("there").flatten().map(|entry| entry.file_name()).collect()
    }

    #[test]
    fn what_a_failed_call_has_left_stops_neither_the_clock_nor_the_rotation() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut one = node(&folder, 200);
        one.poll().expect("keys");
        for what in ["keys", "clock"] {
            fs::write(one.temporary(what), b"half").expect("written");
        }
        std::thread::sleep(Duration::from_millis(250));
        assert_eq!(one.poll().expect("keys").generation, 2);
        assert_eq!(left(&folder).len(), 2, "{:?}", left(&folder));
    }

    #[test]
    fn a_leader_that_cannot_write_leaves_the_lead_to_another() {
        let folder = tempfile::tempdir().expect("a folder");
        let (mut one, mut two) = (node(&folder, 400), node(&folder, 400));
        one.poll().expect("keys");
        std::thread::sleep(Duration::from_millis(450));
        // Nothing that a node may remove, and so nothing that it can write.
        let in_the_way = one.temporary("keys");
        fs::create_dir(&in_the_way).expect("made");
        let failed = (0..FAILED_WRITES).all(|_| one.poll().is_err() && !two.holds_lease());
        assert!(failed && !one.holds_lease());
        assert!(!one.poll().expect("the keys are there").leads, "it takes the lead again at once");
        let polled = two.poll().expect("keys");
        assert!(polled.leads && polled.generation == 2);
        // Without another it leads again.
        two.resign();
        fs::remove_dir(&in_the_way).expect("empty");
        assert!((0..=LEASE_POLLS).any(|_| one.poll().expect("keys").leads));
    }

    #[test]
    fn a_damaged_or_open_file_is_refused_with_its_mend() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let mut one = node(&folder, 60_000);
        one.poll().expect("keys");
        let path = folder.path().join(KEYS);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("owned");
        assert!(one.poll().err().expect("refused").contains("chmod 600"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("owned");
        fs::write(&path, b"half").expect("written");
        assert!(one.poll().err().expect("refused").contains("remove it"));
        fs::remove_file(&path).expect("removed");
        assert!(one.poll().is_ok());
    }
}
