//! Programs of others that the tests talk to, as far as they must not be installed: nginx and Prometheus would start
//! services.
//!
//! Their packages are unpacked into the cache instead. A machine that has nginx with its stream module anyway uses that.
//!
//! The bench measures against the newest that Debian has: those come from sid with every library they need, down to the
//! dynamic loader, so that they run on any machine and know the same groups and ciphers everywhere.

use crate::apt::Archive;
use crate::{cache, process, setup};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The stream module, inside the folder of modules.
pub const STREAM_MODULE: &str = "ngx_stream_module.so";
/// Where distributions keep nginx's modules.
const MODULE_FOLDERS: [&str; 3] = ["/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules"];

/// nginx as files.
#[derive(Clone, Debug)]
pub struct Nginx {
    pub program: PathBuf,
    /// The folder with [`STREAM_MODULE`].
    pub modules: PathBuf,
}

/// Finds nginx, or fetches it.
pub fn nginx() -> Result<Nginx> {
    let installed = MODULE_FOLDERS.map(PathBuf::from).into_iter().find(|folder| folder.join(STREAM_MODULE).exists());
    if let (Some(program), Some(modules)) = (process::find("nginx"), installed) {
        return Ok(Nginx { program, modules });
    }
    let place = cache::folder("peers")?.join("nginx");
    fetch(&place, &["nginx", "libnginx-mod-stream"], "dnf install nginx nginx-mod-stream")?;
    let nginx = Nginx { program: place.join("usr/sbin/nginx"), modules: place.join("usr/lib/nginx/modules") };
    if !nginx.program.exists() || !nginx.modules.join(STREAM_MODULE).exists() {
        bail!("{} does not hold nginx and its stream module: remove that folder and try again", place.display());
    }
    Ok(nginx)
}

/// Terminators that tlsplice is measured against.
const MEASURED: [&str; 4] = ["nginx", "libnginx-mod-stream", "haproxy", "hitch"];
const NEWEST_SUITE: &str = "sid";
/// When the newest are fetched again.
const NEWEST_FRESH: Duration = Duration::from_secs(30 * 24 * 3600);

/// A folder with the newest nginx, HAProxy and hitch, and all that they need to run.
pub fn newest() -> Result<PathBuf> {
    let place = cache::folder("peers")?.join("newest");
    let stamp = cache::folder("peers")?.join("newest.fetched");
    let whole = || place.join("usr/sbin/hitch").exists();
    if whole() && cache::is_fresh(&stamp, NEWEST_FRESH) {
        return Ok(place);
    }
    let _lock = cache::lock("newest-peers")?;
    if whole() && cache::is_fresh(&stamp, NEWEST_FRESH) {
        return Ok(place);
    }
    let fetched = fetch_newest(&place);
    match fetched {
        Ok(()) => cache::write(&stamp, b"")?,
        Err(error) if whole() => eprintln!("warning: {error:#}\n(going on with older peers)"),
        Err(error) => return Err(error.context("fetch the terminators to measure against")),
    }
    Ok(place)
}

fn fetch_newest(place: &Path) -> Result<()> {
    let aside = cache::aside(place);
    cache::remove(&aside)?;
    let packages = MEASURED.map(String::from);
    Archive::suite(NEWEST_SUITE)?.unpack_whole(
        &packages,
        "peers to measure against (unpacked, not installed)",
        &aside,
    )?;
    cache::put_in_place(&aside, place)
}

/// The folder that Prometheus and promtool are in.
pub fn prometheus() -> Result<PathBuf> {
    if let Some(program) = process::find("prometheus").filter(|_| process::find("promtool").is_some()) {
        return program.parent().map(PathBuf::from).context("prometheus is in no folder");
    }
    let place = cache::folder("peers")?.join("prometheus");
    fetch(&place, &["prometheus"], "install Prometheus and put it into PATH")?;
    let folder = place.join("usr/bin");
    if !folder.join("prometheus").exists() || !folder.join("promtool").exists() {
        bail!("{} does not hold prometheus and promtool: remove that folder and try again", place.display());
    }
    Ok(folder)
}

/// Unpacks packages, the first of which names them all.
fn fetch(place: &Path, packages: &[&str], otherwise: &str) -> Result<()> {
    let name = packages.first().copied().unwrap_or_default();
    if place.exists() {
        return Ok(());
    }
    let _lock = cache::lock(name)?;
    if place.exists() {
        return Ok(());
    }
    if process::find("apt-get").is_none() {
        bail!("{name} is missing: {otherwise}");
    }
    let archive = Archive::of_this_machine();
    if !archive.serves(name) {
        setup::refresh_lists()?;
    }
    let aside = cache::aside(place);
    cache::remove(&aside)?;
    archive
        .unpack(
            &packages.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>(),
            &format!("{name} (unpacked, not installed)"),
            &aside,
        )
        .with_context(|| format!("fetch {name}, which the tests talk to"))?;
    cache::put_in_place(&aside, place)
}
