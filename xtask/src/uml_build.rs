//! Builds user-mode Linux from Debian's newest source, once, and keeps it outside the tree.
//!
//!   source package ─▶ tree, changed ─▶ configured ─▶ compiled ─▶ cache/uml/SERIES/linux
//!
//! Each stage leaves its result in a folder of its own, put in place by one rename, so a break costs the current stage only;
//! make goes on where it stood. A build is taken again as long as our configuration and changes are what it was made from.

use crate::apt::Archive;
use crate::process::{self, Ended};
use crate::progress::Progress;
use crate::setup::{self, Group};
use crate::{cache, side_by_side, uml_source};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const CONFIG: &str = include_str!("../uml/config");
/// Without these it is not worth running: a name that a later kernel has dropped shall be noticed.
const INSISTED_ON: [&str; 10] = [
    "TLS",
    "IO_URING",
    "SECCOMP_FILTER",
    "CRYPTO_CHACHA20POLY1305",
    "CRYPTO_LIB_GF128MUL",
    "TASK_IO_ACCOUNTING",
    "CGROUP_BPF",
    "HOSTFS",
    "NFS_V4",
    "NFSD_V4",
];
/// The first series whose user-mode Linux runs processes under seccomp, not ptrace: a system call costs a third of it.
const FIRST_SERIES: [u64; 2] = [6, 16];
/// Where the source is taken from.
const SUITE: &str = "sid";
/// About as many files as the source holds, and as many as are compiled: for the progress shown.
const SOURCE_FILES: u64 = 95_000;
const COMPILED_FILES: u64 = 1_110;
/// Far beyond what a slow machine takes.
const MAKE_LIMIT: Duration = Duration::from_secs(2 * 3600);

/// The kernel as a program, built if it has not been built from what we have now.
pub fn obtain() -> Result<PathBuf> {
    if let Some(linux) = built()? {
        return Ok(linux);
    }
    let _lock = cache::lock("uml")?;
    if let Some(linux) = built()? {
        return Ok(linux);
    }
    ensure!(cfg!(target_arch = "x86_64"), "user-mode Linux runs on x86_64 only");
    setup::make_sure(&[Group::Uml])?;
    let archive = Archive::suite(SUITE)?;
    let (series, package) = newest_source(&archive)?;
    let work = cache::folder("uml")?.join(format!("{series}.build"));
    fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
    let tree = source(&archive, &package, &work)?;
    configure(&tree)?;
    compile(&tree, &series)?;
    keep(&tree, &series)?;
    cache::remove(&work)?;
    built()?.context("user-mode Linux is not where it was put")
}

/// What a build depends on, beside the source.
fn fingerprint() -> String {
    let [head, tail, changes] = uml_source::parts();
    cache::fingerprint(&[CONFIG.as_bytes(), head, tail, changes])
}

/// The newest finished build that is up to date.
fn built() -> Result<Option<PathBuf>> {
    let folder = cache::folder("uml")?;
    let wanted = fingerprint();
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?.flatten() {
        let path = entry.path();
        if fs::read_to_string(path.join("made-from")).is_ok_and(|from| from == wanted) {
            found.push((numbers(&entry.file_name().to_string_lossy()), path.join("linux")));
        }
    }
    Ok(found.into_iter().max().map(|(_, linux)| linux))
}

fn numbers(series: &str) -> Vec<u64> {
    series.split('.').filter_map(|part| part.parse().ok()).collect()
}

fn newest_source(archive: &Archive) -> Result<(String, String)> {
    let names = archive.names("linux-source-")?;
    let series = names.iter().filter_map(|name| name.strip_prefix("linux-source-"));
    let plain = series.filter(|series| series.bytes().all(|b| b.is_ascii_digit() || b == b'.'));
    let newest = plain.filter(|series| archive.serves(&format!("linux-source-{series}"))).max_by_key(|s| numbers(s));
    let newest = newest.with_context(|| format!("Debian {SUITE} has no source of Linux"))?;
    ensure!(numbers(newest).as_slice() >= &FIRST_SERIES, "Debian's newest source is {newest}, it takes 6.16 or later");
    Ok((newest.to_owned(), format!("linux-source-{newest}")))
}

/// The unpacked and changed source.
fn source(archive: &Archive, package: &str, work: &Path) -> Result<PathBuf> {
    let tree = work.join("tree");
    let changed_by = fingerprint_of_changes();
    if fs::read_to_string(tree.join(".changed-by")).is_ok_and(|by| by == changed_by) {
        return Ok(tree);
    }
    cache::remove(&tree)?;
    let tarball = work.join("source.tar.xz");
    if !tarball.exists() {
        let unpacked = work.join("package");
        cache::remove(&unpacked)?;
        archive.unpack(&[package.to_owned()], &format!("user-mode Linux: {package}"), &unpacked)?;
        let inside = unpacked.join("usr/src").join(format!("{package}.tar.xz"));
        cache::put_in_place(&inside, &tarball)?;
        cache::remove(&unpacked)?;
    }
    let aside = work.join("unpacking");
    cache::remove(&aside)?;
    fs::create_dir_all(&aside).with_context(|| format!("create {}", aside.display()))?;
    let mut progress = Progress::new("user-mode Linux: unpacking the source", SOURCE_FILES, "files");
    let mut count = 0;
    let mut last = String::new();
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--verbose", "--strip-components=1", "--file"]).arg(&tarball).arg("--directory").arg(&aside);
    let ended = process::watch(&mut tar, MAKE_LIMIT, |line| {
        count += 1;
        progress.at(count);
        line.clone_into(&mut last);
    })?;
    ensure!(
        matches!(ended, Ended::Exited(status) if status.success()),
        "tar cannot unpack {}: {last}",
        tarball.display()
    );
    progress.finish();
    uml_source::change(&aside)?;
    fs::write(aside.join(".changed-by"), changed_by).context("mark the source as changed")?;
    cache::put_in_place(&aside, &tree)?;
    cache::remove(&tarball)?;
    Ok(tree)
}

fn fingerprint_of_changes() -> String {
    cache::fingerprint(&uml_source::parts())
}

/// Everything off but what the file names, once for each version of the file.
fn configure(tree: &Path) -> Result<()> {
    let (wanted, used) = (tree.join(".wanted-config"), tree.join(".config"));
    if used.exists() && fs::read_to_string(&wanted).is_ok_and(|text| text == CONFIG) {
        return Ok(());
    }
    fs::write(&wanted, CONFIG).with_context(|| format!("write {}", wanted.display()))?;
    cache::remove(&used)?;
    process::output(make(tree).arg("allnoconfig").env("KCONFIG_ALLCONFIG", &wanted))
        .context("configure user-mode Linux")?;
    let config = fs::read_to_string(&used).with_context(|| format!("read {}", used.display()))?;
    let missing: Vec<_> =
        INSISTED_ON.iter().filter(|name| !config.contains(&format!("\nCONFIG_{name}=y\n"))).copied().collect();
    if !missing.is_empty() {
        cache::remove(&used)?;
        bail!("this source of Linux no longer takes CONFIG_{}: mend xtask/uml/config", missing.join(", CONFIG_"));
    }
    Ok(())
}

fn compile(tree: &Path, series: &str) -> Result<()> {
    let cores = side_by_side::processors();
    let label = format!("user-mode Linux {series}: compiling (once, some minutes)");
    let mut progress = Progress::new(label, COMPILED_FILES, "files");
    let already = count_objects(tree);
    let mut compiled = 0;
    let mut said = Vec::new();
    let ended = process::watch(make(tree).arg(format!("-j{}", cores + 1)).arg("linux"), MAKE_LIMIT, |line| {
        if line.starts_with("  CC ") || line.starts_with("  AS ") {
            compiled += 1;
            progress.at(already + compiled);
        } else if !line.starts_with("  ") {
            said.push(line.to_owned());
        }
    })?;
    match ended {
        Ended::Exited(status) if status.success() => progress.finish(),
        Ended::Exited(status) => {
            bail!("user-mode Linux does not build ({status}):\n{}", process::tail(&said.join("\n")));
        }
        Ended::TimedOut => {
            bail!("user-mode Linux was not built after {} s; start again to go on", MAKE_LIMIT.as_secs())
        }
    }
    Ok(())
}

/// Files that an earlier, broken-off make has compiled.
fn count_objects(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let count = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => count_objects(&entry.path()),
        Ok(_) => u64::from(entry.path().extension().is_some_and(|e| e == "o")),
        Err(_) => 0,
    };
    entries.flatten().map(count).sum()
}

/// make in that tree. All its children inherit the lock, so a make that outlives a command which was killed is waited for:
/// two of them in one tree would spoil it.
fn make(tree: &Path) -> Command {
    let mut make = process::bound_to_us("flock");
    make.arg("--no-fork").arg(tree.join(".make-lock")).args(["make", "ARCH=um"]).current_dir(tree);
    make.env("LC_ALL", "C").env_remove("MAKEFLAGS").env_remove("CFLAGS");
    make
}

/// Keeps the program and what it was made from.
fn keep(tree: &Path, series: &str) -> Result<()> {
    let place = cache::folder("uml")?.join(series);
    let aside = cache::aside(&place);
    cache::remove(&aside)?;
    fs::create_dir_all(&aside).with_context(|| format!("create {}", aside.display()))?;
    process::output(Command::new("strip").arg("-o").arg(aside.join("linux")).arg(tree.join("linux")))?;
    fs::copy(tree.join(".config"), aside.join("config")).context("keep the configuration")?;
    fs::write(aside.join("made-from"), fingerprint()).context("say what it was made from")?;
    cache::put_in_place(&aside, &place)
}
