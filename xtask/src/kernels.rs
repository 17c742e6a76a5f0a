//! Debian's cloud kernels of the series that matter, taken from its packages and kept as files: an ELF kernel and its modules.
//!
//!   series ─▶ newest package in the suites that ship it ─▶ unpack ─▶ vmlinux, modules, modules.dep ─▶ cache/kernels/SERIES

use crate::apt::{Archive, LISTS_FRESH};
use crate::{bzimage, cache, process};
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where each series is looked for, and whether a run without it is worth anything. The newest of all is found by search.
const SERIES: [Source; 4] = [
    Source { series: Some("6.1"), suites: &["bookworm", "bookworm-security"], required: true },
    Source { series: Some("6.12"), suites: &["bookworm-security", "trixie-security"], required: true },
    Source { series: Some("6.18"), suites: &["trixie-backports"], required: false },
    Source { series: None, suites: &["sid"], required: false },
];

/// What the tests use, in the order in which it is loaded; what these need is loaded before them. A kernel has some of them
/// built in, and some series do not have all: only `tls` is insisted on.
const MODULES: [&str; 21] = [
    "virtio_pci",
    "virtio_rng",
    "tls",
    "gcm",
    "ccm",
    "aesni-intel",
    "ghash-clmulni-intel",
    "chacha",
    "chacha20_generic",
    "chacha20poly1305",
    "chacha20_x86_64",
    "chacha-x86_64",
    "poly1305_generic",
    "poly1305-x86_64",
    "af_packet",
    "tcp_diag",
    "unix_diag",
    "veth",
    "sch_netem",
    "sch_tbf",
    "loop",
];

#[derive(Clone, Copy, Debug)]
struct Source {
    series: Option<&'static str>,
    suites: &'static [&'static str],
    required: bool,
}

/// Which kernels a command is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    All,
    Newest,
    Series(String),
}

impl Choice {
    /// Reads `all`, `newest`, or a series such as `6.12`.
    ///
    /// # Errors
    /// Names what is allowed.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            "newest" => Ok(Self::Newest),
            series if version(series).len() == 2 && series.split('.').count() == 2 => Ok(Self::Series(series.into())),
            other => Err(format!("{other:?} is no kernel: it is all, newest, or a series such as 6.12")),
        }
    }
}

/// A kernel, ready to be started.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub series: String,
    folder: PathBuf,
}

/// What came of looking for the kernels.
#[derive(Debug, Default)]
pub struct Found {
    pub kernels: Vec<Kernel>,
    /// Series that Debian does not serve any more, with the reason.
    pub missing: Vec<(String, String)>,
}

/// Makes sure of the chosen kernels.
pub fn obtain(choice: &Choice) -> Result<Found> {
    let mut found = Found::default();
    for source in SERIES {
        let name = source.series.unwrap_or("newest");
        let wanted = match choice {
            Choice::All => true,
            Choice::Newest => source.series.is_none(),
            // One that is in no row may be the newest.
            Choice::Series(series) => source.series.map_or(!known_series().contains(&series.as_str()), |s| s == series),
        };
        if !wanted {
            continue;
        }
        match obtain_from(&source) {
            Ok(kernel) if found.kernels.iter().any(|k| k.series == kernel.series) => {}
            Ok(kernel) if matches!(choice, Choice::Series(s) if *s != kernel.series) => {}
            Ok(kernel) => found.kernels.push(kernel),
            Err(error) if source.required => {
                return Err(error.context(format!("kernel {name}, which no run goes without")));
            }
            Err(error) => {
                eprintln!("\n*** kernel {name} CANNOT BE TESTED: {error:#} ***\n");
                found.missing.push((name.to_owned(), format!("{error:#}")));
            }
        }
    }
    if let Choice::Series(series) = choice
        && found.kernels.is_empty()
    {
        bail!("no kernel {series}: the series are {}, and Debian's newest", known_series().join(", "));
    }
    Ok(found)
}

fn known_series() -> Vec<&'static str> {
    SERIES.iter().filter_map(|source| source.series).collect()
}

/// The kernel of one row: the cached one as long as it is fresh, or when nothing can be fetched.
fn obtain_from(source: &Source) -> Result<Kernel> {
    let name = source.series.unwrap_or("newest");
    let folder = cache::folder("kernels")?;
    let place = folder.join(name);
    let kernel = || {
        let version = fs::read_to_string(place.join("version")).context("read a kernel's version")?;
        let series = series_of(version.trim()).with_context(|| format!("{version:?} is no kernel's version"))?;
        anyhow::Ok(Kernel { series, folder: place.clone() })
    };
    let checked = folder.join(format!("{name}.checked"));
    if place.exists() && cache::is_fresh(&checked, LISTS_FRESH) {
        return kernel();
    }
    let _lock = cache::lock(&format!("kernel-{name}"))?;
    if place.exists() && cache::is_fresh(&checked, LISTS_FRESH) {
        return kernel();
    }
    match newest_package(source).and_then(|(archive, package)| fetch(&archive, &package, name, &place)) {
        Ok(()) => cache::write(&checked, b"")?,
        Err(error) if place.exists() => eprintln!("warning: {error:#}\n(going on with the kernel that is here)"),
        Err(error) => return Err(error),
    }
    kernel()
}

/// The newest kernel package of a series over all suites that may have it.
fn newest_package(source: &Source) -> Result<(Archive, String)> {
    let mut best: Option<(Vec<u64>, Archive, String)> = None;
    let mut reasons = Vec::new();
    for suite in source.suites {
        let archive = match Archive::suite(suite) {
            Ok(archive) => archive,
            Err(error) => {
                reasons.push(format!("{error:#}"));
                continue;
            }
        };
        let prefix = source.series.map_or(String::new(), |series| format!("{series}."));
        let mut names = archive.names(&format!("linux-image-{prefix}"))?;
        names.extend(archive.names(&format!("linux-binary-{prefix}"))?);
        names.retain(|name| is_cloud_kernel(name));
        // Of one version: the half with the kernel rather than a package that only names both; unsigned as it is built.
        names.sort_by_key(|name| (version(name), name.starts_with("linux-binary-"), name.ends_with("-unsigned")));
        let served = names.into_iter().rev().find(|name| archive.serves(name));
        match served {
            Some(name) if best.as_ref().is_none_or(|(v, ..)| *v < version(&name)) => {
                best = Some((version(&name), archive, name));
            }
            Some(_) => {}
            None => reasons.push(format!("Debian {suite} has no such kernel")),
        }
    }
    let (_, archive, name) = best.with_context(|| reasons.join("; "))?;
    Ok((archive, name))
}

/// Whether a package's name is that of a cloud kernel for this processor.
fn is_cloud_kernel(package: &str) -> bool {
    let Some(rest) = package.strip_prefix("linux-image-").or_else(|| package.strip_prefix("linux-binary-")) else {
        return false;
    };
    let rest = rest.strip_suffix("-unsigned").unwrap_or(rest);
    rest.starts_with(|c: char| c.is_ascii_digit()) && rest.ends_with("-cloud-amd64") && !rest.contains("~rc")
}

/// The numbers in a name, for comparing: `linux-image-6.1.0-44-cloud-amd64` is 6, 1, 0, 44.
fn version(name: &str) -> Vec<u64> {
    let numbers = name.trim_end_matches("-unsigned").trim_end_matches("-cloud-amd64");
    numbers.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

fn series_of(version: &str) -> Option<String> {
    let mut parts = version.split('.');
    Some(format!("{}.{}", parts.next()?, parts.next()?.split(['-', '+']).next()?))
}

/// Downloads a kernel, makes ready what a start needs, and puts it in its place.
fn fetch(archive: &Archive, package: &str, name: &str, place: &Path) -> Result<()> {
    if fs::read_to_string(place.join("package")).is_ok_and(|have| have == package) {
        return Ok(());
    }
    let mut packages = vec![package.to_owned()];
    // Newer ones come in two halves.
    let modules = package.replacen("linux-binary-", "linux-modules-", 1);
    if modules != package {
        packages.push(modules);
    }
    let aside = cache::aside(place);
    cache::remove(&aside)?;
    let unpacked = aside.join("unpacked");
    archive.unpack(&packages, &format!("kernel {name} ({package})"), &unpacked)?;
    let tree = ["usr/lib/modules", "lib/modules"].map(|path| unpacked.join(path));
    let tree = tree.iter().find_map(|path| fs::read_dir(path).ok()?.flatten().next()).context("it has no modules")?;
    let release = tree.file_name().to_string_lossy().into_owned();
    let images = [unpacked.join(format!("boot/vmlinuz-{release}")), tree.path().join("vmlinuz")];
    let image = images.iter().find(|image| image.exists()).with_context(|| format!("{package} has no vmlinuz"))?;
    bzimage::extract(image, &aside.join("vmlinux"))?;
    let kept = aside.join("root/lib/modules").join(&release);
    fs::create_dir_all(aside.join("root/lib/modules")).context("create the folder for modules")?;
    fs::rename(tree.path(), &kept).context("keep the modules")?;
    process::output(tool("depmod")?.arg("-b").arg(aside.join("root")).arg(&release))?;
    fs::write(aside.join("version"), &release).context("write the kernel's version")?;
    fs::write(aside.join("package"), package).context("write the kernel's package")?;
    cache::remove(&unpacked)?;
    cache::put_in_place(&aside, place)
}

fn tool(name: &str) -> Result<Command> {
    Ok(Command::new(process::find(name).with_context(|| format!("{name} is missing: run cargo xtask setup"))?))
}

impl Kernel {
    pub fn vmlinux(&self) -> PathBuf {
        self.folder.join("vmlinux")
    }

    /// The version in full, such as `6.12.117+deb12-cloud-amd64`.
    pub fn version(&self) -> Result<String> {
        let path = self.folder.join("version");
        Ok(fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?.trim().to_owned())
    }

    /// The modules to load, in order, as file name and content.
    pub fn modules(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let (root, version) = (self.folder.join("root"), self.version()?);
        let mut seen = HashSet::new();
        let mut modules = Vec::new();
        for name in MODULES {
            let mut modprobe = tool("modprobe")?;
            modprobe.arg("-d").arg(&root).args(["-S", &version, "--show-depends", name]);
            // A name that this series does not have, or has built in, adds nothing.
            let Ok(lines) = process::text(&mut modprobe) else { continue };
            for path in lines.lines().filter_map(|line| line.strip_prefix("insmod ")) {
                let path = PathBuf::from(path.trim());
                if seen.insert(path.clone()) {
                    modules.push(module(&path)?);
                }
            }
        }
        ensure!(modules.iter().any(|(name, _)| name == "tls.ko"), "kernel {version} has no module tls");
        Ok(modules)
    }
}

/// A module's plain name and content.
fn module(path: &Path) -> Result<(String, Vec<u8>)> {
    let name = path.file_name().context("a module has a name")?.to_string_lossy().into_owned();
    let (plain, content) = match name.rsplit_once('.') {
        Some((plain, "xz")) => (plain, process::output(Command::new("xz").arg("-dc").arg(path))?),
        Some((plain, "zst")) => (plain, process::output(Command::new("zstd").arg("-dcq").arg(path))?),
        _ => (name.as_str(), fs::read(path).with_context(|| format!("read {}", path.display()))?),
    };
    Ok((plain.to_owned(), content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cloud_kernels_are_told_from_what_is_named_alike() {
        for name in [
            "linux-image-6.1.0-44-cloud-amd64-unsigned",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-binary-7.2.13+deb14-cloud-amd64",
        ] {
            assert!(is_cloud_kernel(name), "{name}");
        }
        for name in [
            "linux-image-cloud-amd64",
            "linux-image-6.1.0-44-cloud-amd64-dbg",
            "linux-image-6.1.0-44-rt-amd64",
            "linux-image-6.1.0-44-amd64",
            "linux-modules-7.2.13+deb14-cloud-amd64",
        ] {
            assert!(!is_cloud_kernel(name), "{name}");
        }
    }

    #[test]
    fn kernels_are_compared_by_number() {
        assert!(version("linux-image-6.12.99+deb12-cloud-amd64") < version("linux-image-6.12.117+deb12-cloud-amd64"));
        assert!(version("linux-image-6.1.0-9-cloud-amd64-unsigned") < version("linux-image-6.1.0-44-cloud-amd64"));
        assert_eq!(series_of("6.12.117+deb12-cloud-amd64").as_deref(), Some("6.12"));
        assert_eq!(series_of("6.1.0-44-cloud-amd64").as_deref(), Some("6.1"));
    }

    #[test]
    fn a_choice_of_kernels_is_read_or_refused() {
        assert_eq!(Choice::parse("6.12"), Ok(Choice::Series("6.12".into())));
        assert_eq!(Choice::parse("newest"), Ok(Choice::Newest));
        assert!(Choice::parse("six").is_err());
        assert!(Choice::parse("6.12.3").is_err());
    }
}
