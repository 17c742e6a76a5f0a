//! The guests' first process as a file: `init.rs`, static, built once for each version of its source and kept.

use crate::cache;
use crate::process::{self, Ended};
use crate::progress::Progress;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Its source, and so what it is named after.
const SOURCE: [&[u8]; 2] = [include_bytes!("init.rs"), include_bytes!("request.rs")];

/// Far beyond what a slow machine takes.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

/// The static program, built if this version of it has not been built yet.
pub fn obtain() -> Result<PathBuf> {
    let place = cache::folder("init")?.join(cache::fingerprint(&SOURCE));
    if place.exists() {
        return Ok(place);
    }
    let _lock = cache::lock("init")?;
    if place.exists() {
        return Ok(place);
    }
    let what = ["--package", "xtask", "--bin", "tlsplice-init", "--no-default-features"];
    let built = static_build(Profile::Release, &what)?;
    let aside = cache::aside(&place);
    fs::copy(built.join("tlsplice-init"), &aside).context("keep the guests' first process")?;
    cache::put_in_place(&aside, &place)?;
    Ok(place)
}

/// How something is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// For tests: quicker to build, with every check on.
    Suite,
    /// As it is shipped, and measured.
    Release,
}

impl Profile {
    fn name(self) -> &'static str {
        match self {
            Self::Suite => "suite",
            Self::Release => "release",
        }
    }
}

/// A command of cargo's for what is linked statically against glibc. All that tests need is built by it, once.
pub fn static_cargo(command: &str, profile: Profile) -> Result<Command> {
    let mut cargo = Command::new(cargo());
    cargo.args([command, "--profile", profile.name(), "--target", &host_target()?]).current_dir(workspace());
    // An outer cargo's flags are for what it builds, not for this.
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static").env_remove("CARGO_ENCODED_RUSTFLAGS");
    Ok(cargo)
}

/// Builds something that is linked statically; gives the folder that it is in then.
pub fn static_build(profile: Profile, arguments: &[&str]) -> Result<PathBuf> {
    let mut cargo = static_cargo("build", profile)?;
    cargo.args(arguments);
    let mut crates = Crates::new(format!("building {}", arguments.join(" ")));
    let mut said = Vec::new();
    let ended = process::watch(&mut cargo, BUILD_LIMIT, |line| {
        if !crates.count(line) {
            said.push(line.to_owned());
        }
    })?;
    match ended {
        Ended::Exited(status) if status.success() => {}
        Ended::Exited(status) => bail!("{}: {status}\n{}", process::shown(&cargo), said.join("\n")),
        Ended::TimedOut => bail!("{}: not done after {} s", process::shown(&cargo), BUILD_LIMIT.as_secs()),
    }
    Ok(target_folder().join(host_target()?).join(profile.name()))
}

/// Shows how far cargo is, by the crates that it has begun to compile; silent where there is nothing to do.
#[derive(Debug)]
pub struct Crates {
    label: String,
    begun: u64,
    progress: Option<Progress>,
}

impl Crates {
    pub fn new(label: impl Into<String>) -> Self {
        Self { label: label.into(), begun: 0, progress: None }
    }

    /// Takes one of cargo's lines; false if it is about something else.
    pub fn count(&mut self, line: &str) -> bool {
        let word = line.split_whitespace().next().unwrap_or_default();
        match word {
            "Compiling" => {
                self.begun += 1;
                self.progress.get_or_insert_with(|| Progress::new(&self.label, 0, "crates begun")).at(self.begun);
            }
            "Finished" => {
                if let Some(progress) = self.progress.take() {
                    progress.finish();
                }
            }
            "Downloading" | "Downloaded" | "Updating" | "Locking" | "Blocking" => {}
            _ => return false,
        }
        true
    }
}

/// The cargo that runs us, else the one in PATH.
pub fn cargo() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

/// The workspace's folder: the parent of this package's.
pub fn workspace() -> PathBuf {
    let package =
        std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    package.parent().map_or_else(|| package.clone(), PathBuf::from)
}

/// Where cargo puts what it builds.
pub fn target_folder() -> PathBuf {
    let named = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    workspace().join(named.unwrap_or_else(|| "target".into()))
}

/// The triple of this machine, as rustc names it.
fn host_target() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let about = process::text(Command::new(rustc).arg("-vV"))?;
    match about.lines().find_map(|line| line.strip_prefix("host: ")) {
        Some(host) => Ok(host.to_owned()),
        None => bail!("rustc -vV names no host:\n{about}"),
    }
}
