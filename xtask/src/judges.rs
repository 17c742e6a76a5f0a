//! Outside judges of what tlsplice negotiates: testssl.sh, unpacked from Debian sid, and sslyze, in a venv of its own.
//!
//! Both live in the cache and nothing is installed. They judge on the machine's own files alone, never in a guest.

use crate::apt::Archive;
use crate::{cache, process};
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The version that the tests were written against.
const SSLYZE: &str = "6.3.1";

/// What tests on this machine's files are told about the judges.
pub fn variables() -> Result<Vec<(OsString, OsString)>> {
    let place = testssl()?;
    Ok(vec![
        ("TLSPLICE_TESTSSL".into(), place.join("usr/bin/testssl").into()),
        ("TESTSSL_INSTALL_DIR".into(), place.join("etc/testssl").into()),
        ("TLSPLICE_SSLYZE".into(), sslyze()?.into()),
    ])
}

/// testssl.sh 3.2 or newer, as files.
fn testssl() -> Result<PathBuf> {
    let place = cache::folder("peers")?.join("testssl");
    if place.join("usr/bin/testssl").exists() {
        return Ok(place);
    }
    let _lock = cache::lock("testssl")?;
    if !place.exists() {
        let aside = cache::aside(&place);
        cache::remove(&aside)?;
        let archive = Archive::suite("sid")?;
        archive
            .unpack(&["testssl.sh".into()], "testssl.sh (unpacked, not installed)", &aside)
            .context("fetch testssl.sh, which judges what tlsplice negotiates")?;
        cache::put_in_place(&aside, &place)?;
    }
    if !place.join("usr/bin/testssl").exists() {
        bail!("{} does not hold testssl: remove that folder and try again", place.display());
    }
    Ok(place)
}

/// sslyze from PyPI. A venv knows its own path, so it is made in its place, and its last file says that it is whole.
fn sslyze() -> Result<PathBuf> {
    let place = cache::folder("peers")?.join(format!("sslyze-{SSLYZE}"));
    let (program, whole) = (place.join("bin/sslyze"), place.join("whole"));
    if whole.exists() {
        return Ok(program);
    }
    let _lock = cache::lock("sslyze")?;
    if !whole.exists() {
        eprintln!("setup: sslyze {SSLYZE} into {} (from PyPI, once)", place.display());
        cache::remove(&place)?;
        make_venv(&place).context("fetch sslyze, which judges what tlsplice negotiates")?;
        cache::write(&whole, b"")?;
    }
    Ok(program)
}

fn make_venv(place: &Path) -> Result<()> {
    process::output(Command::new("python3").args(["-m", "venv"]).arg(place))?;
    let mut pip = Command::new(place.join("bin/pip"));
    process::output(pip.args(["install", "--quiet", "--disable-pip-version-check", &format!("sslyze=={SSLYZE}")]))?;
    Ok(())
}
