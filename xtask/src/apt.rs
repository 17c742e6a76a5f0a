//! Debian's packages as files: searched, downloaded and unpacked, never installed.
//!
//! A suite that the machine itself does not use (a kernel of another release, say) gets lists and a cache of its own inside
//! our cache folder, from the mirror that the machine uses already. The machine's own sources stay as they are.

use crate::progress::Progress;
use crate::{cache, process};
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long downloaded lists of packages are taken for true. Debian's archives change four times a day, kernels weekly.
pub const LISTS_FRESH: Duration = Duration::from_secs(7 * 24 * 3600);
/// Where Debian's keys lie, also on Ubuntu (package debian-archive-keyring).
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const PUBLIC_MIRROR: &str = "http://deb.debian.org/debian";

/// Lists of packages to take packages from.
#[derive(Debug)]
pub struct Archive {
    options: Vec<OsString>,
    name: String,
}

impl Archive {
    /// What the machine itself installs from.
    pub fn of_this_machine() -> Self {
        Self { options: Vec::new(), name: "this machine's".into() }
    }

    /// One suite of Debian's, such as `sid` or `bookworm-security`; its lists are fetched if they are missing or old.
    pub fn suite(suite: &str) -> Result<Self> {
        if process::find("apt-get").is_none() {
            bail!(
                "{suite}: kernels come from Debian's packages, which need apt and dpkg: use a Debian or Ubuntu machine"
            );
        }
        let folder = cache::folder("apt")?.join(suite);
        let (lists, packages) = (folder.join("lists"), folder.join("cache"));
        for made in [lists.join("partial"), packages.join("archives/partial")] {
            fs::create_dir_all(&made).with_context(|| format!("create {}", made.display()))?;
        }
        let sources = folder.join("sources.list");
        let keys = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
        let line = format!("deb {keys}{} {suite} main\n", mirror(suite.ends_with("-security")));
        fs::write(&sources, line).with_context(|| format!("write {}", sources.display()))?;
        let option = |key: &str, value: &Path| {
            let mut word = OsString::from(format!("{key}="));
            word.push(value);
            ["-o".into(), word]
        };
        let mut options: Vec<OsString> = Vec::new();
        options.extend(option("Dir::Etc::sourcelist", &sources));
        options.extend(option("Dir::Etc::sourceparts", Path::new("/dev/null")));
        options.extend(option("Dir::State::lists", &lists));
        options.extend(option("Dir::Cache", &packages));
        let archive = Self { options, name: suite.into() };
        archive.refresh(&folder.join("fetched"))?;
        Ok(archive)
    }

    fn refresh(&self, stamp: &Path) -> Result<()> {
        if cache::is_fresh(stamp, LISTS_FRESH) {
            return Ok(());
        }
        let _lock = cache::lock(&format!("apt-{}", self.name))?;
        if cache::is_fresh(stamp, LISTS_FRESH) {
            return Ok(());
        }
        let progress = Progress::new(format!("Debian {}: fetching the list of packages", self.name), 0, "");
        match process::output(self.apt("apt-get").args(["update", "-qq"])) {
            Ok(_) => cache::write(stamp, b"")?,
            // Old lists do as long as what they name can still be had.
            Err(error) if stamp.exists() => eprintln!("warning: {error:#}\n(going on with older lists)"),
            Err(error) => return Err(error.context(format!("fetch the lists of Debian {}", self.name))),
        }
        progress.finish();
        Ok(())
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // apt's own download user may not write into our folders.
        command.args(["-o", "APT::Sandbox::User=root"]).args(&self.options).env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    /// The names of packages that begin like this.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = process::text(self.apt("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Whether the packages can be downloaded, not merely are named by others.
    pub fn serves(&self, package: &str) -> bool {
        self.download_size(&[package.to_owned()]).is_some_and(|size| size > 0)
    }

    fn download_size(&self, packages: &[String]) -> Option<u64> {
        let about = process::text(self.apt("apt-cache").args(["show", "--no-all-versions"]).args(packages)).ok()?;
        Some(about.lines().filter_map(|l| l.strip_prefix("Size: ")?.trim().parse::<u64>().ok()).sum())
    }

    /// Downloads packages (going on where a break left it) and unpacks them into a folder.
    pub fn unpack(&self, packages: &[String], label: &str, into: &Path) -> Result<()> {
        let kept = cache::folder("apt")?.join(format!("packages-{}", cache::fingerprint(&[label.as_bytes()])));
        fs::create_dir_all(&kept).with_context(|| format!("create {}", kept.display()))?;
        self.download(packages, label, &kept)?;
        unpack_all(&kept, into)?;
        cache::remove(&kept)
    }

    /// Downloads packages with everything that they depend on, as if nothing were installed, and unpacks all of it.
    pub fn unpack_whole(&self, packages: &[String], label: &str, into: &Path) -> Result<()> {
        let kept = cache::folder("apt")?.join(format!("packages-{}", cache::fingerprint(&[label.as_bytes()])));
        fs::create_dir_all(kept.join("partial")).with_context(|| format!("create {}", kept.display()))?;
        let nothing = kept.join("nothing-installed");
        fs::write(&nothing, b"").with_context(|| format!("write {}", nothing.display()))?;
        let progress = Progress::new(format!("{label}: downloading"), 0, "");
        let option = |key: &str, value: &Path| [OsString::from("-o"), [key, "="].concat().into(), value.into()];
        let mut apt = self.apt("apt-get");
        for [flag, mut key, value] in [option("Dir::State::status", &nothing), option("Dir::Cache::archives", &kept)] {
            key.push(value);
            apt.args([flag, key]);
        }
        apt.args(["install", "--yes", "-qq", "--download-only", "--no-install-recommends"]).args(packages);
        process::output(&mut apt)?;
        unpack_all(&kept, into)?;
        progress.finish();
        cache::remove(&kept)
    }

    fn download(&self, packages: &[String], label: &str, kept: &Path) -> Result<()> {
        let size = self.download_size(packages).unwrap_or(0);
        let mut progress = Progress::new(format!("{label}: downloading"), size >> 20, "MiB");
        let mut command = self.apt("apt-get");
        // Parts live in the folder itself, so the next try finds them whatever the apt cache is.
        command.args(["download", "-qq"]).args(packages).current_dir(kept);
        let mut child =
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().context("start apt-get download")?;
        let mut stderr = child.stderr.take().context("its stderr is a pipe")?;
        let reader = std::thread::spawn(move || std::io::read_to_string(&mut stderr).unwrap_or_default());
        let status = loop {
            if let Some(status) = child.try_wait().context("wait for apt-get download")? {
                break status;
            }
            progress.at(bytes_in(kept) >> 20);
            std::thread::sleep(Duration::from_millis(300));
        };
        let said = reader.join().unwrap_or_default();
        if !status.success() {
            bail!("{label}: apt-get download {}: {status}\n{}", packages.join(" "), process::tail(said.trim_end()));
        }
        progress.finish();
        Ok(())
    }
}

fn unpack_all(packages: &Path, into: &Path) -> Result<()> {
    fs::create_dir_all(into).with_context(|| format!("create {}", into.display()))?;
    for file in fs::read_dir(packages).with_context(|| format!("read {}", packages.display()))?.flatten() {
        if file.path().extension().is_some_and(|e| e == "deb") {
            process::output(Command::new("dpkg-deb").arg("--extract").arg(file.path()).arg(into))?;
        }
    }
    Ok(())
}

fn bytes_in(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes_in(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

/// The mirror that this machine uses for Debian, or the public one.
fn mirror(security: bool) -> String {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(more) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(more.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let text: String = files.iter().filter_map(|file| fs::read_to_string(file).ok()).collect();
    let main = mirror_in(&text, "/debian").unwrap_or_else(|| PUBLIC_MIRROR.into());
    if security { mirror_in(&text, "/debian-security").unwrap_or_else(|| format!("{main}-security")) } else { main }
}

/// The first address in lists of sources, in either format, whose path ends like this.
fn mirror_in(sources: &str, end: &str) -> Option<String> {
    let lines = sources.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let addresses = lines.filter(|line| line.starts_with("deb ") || line.starts_with("URIs:"));
    let mut words = addresses.flat_map(str::split_whitespace).map(|word| word.trim_end_matches('/'));
    words.find(|word| word.contains("://") && word.ends_with(end)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_found_in_both_formats() {
        let old = "# deb http://no/debian x\ndeb-src http://src/debian x\ndeb [arch=amd64] https://mirror.example/debian/ bookworm main\n";
        assert_eq!(mirror_in(old, "/debian").as_deref(), Some("https://mirror.example/debian"));
        let new =
            "Types: deb\nURIs: http://a.example/debian\nSuites: bookworm\n\nURIs: http://a.example/debian-security\n";
        assert_eq!(mirror_in(new, "/debian").as_deref(), Some("http://a.example/debian"));
        assert_eq!(mirror_in(new, "/debian-security").as_deref(), Some("http://a.example/debian-security"));
        assert_eq!(mirror_in("URIs: http://a.example/ubuntu\n", "/debian"), None);
    }
}
