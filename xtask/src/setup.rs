//! Installs what is missing, by the system's own package manager, and says what and why.
//!
//! Every command asks for the groups that it needs. Where all is there nothing is started: the check looks for files.

use crate::{cache, ebpf, first_process, judges, peers, process};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Install what is missing to build, test and demonstrate tlsplice.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Only what these need.
    #[arg(value_enum)]
    groups: Vec<Group>,
}

/// What it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Group {
    /// The program itself, and the eBPF object in it.
    Build,
    /// Guests under QEMU.
    Guests,
    /// Building user-mode Linux.
    Uml,
    /// Other people's clients and servers, which the tests talk to.
    Peers,
    /// Format, lints, licences.
    Lint,
}

/// One thing that has to be there.
#[derive(Debug)]
struct Need {
    group: Group,
    /// A program in PATH, or one of several files.
    present: Present,
    apt: &'static str,
    dnf: &'static str,
    why: &'static str,
}

#[derive(Debug)]
enum Present {
    Program(&'static str),
    AnyFile(&'static [&'static str]),
}

const fn need(group: Group, program: &'static str, apt: &'static str, dnf: &'static str, why: &'static str) -> Need {
    Need { group, present: Present::Program(program), apt, dnf, why }
}

const NEEDS: [Need; 29] = [
    need(Group::Build, "cc", "gcc libc6-dev", "gcc", "compiles the cryptography (aws-lc) and links"),
    Need {
        group: Group::Build,
        present: Present::AnyFile(&[
            "/usr/lib/x86_64-linux-gnu/libc.a",
            "/usr/lib/aarch64-linux-gnu/libc.a",
            "/usr/lib64/libc.a",
        ]),
        apt: "libc6-dev",
        dnf: "glibc-static",
        why: "links the static binaries that run in every guest",
    },
    need(Group::Build, "setpriv", "util-linux", "util-linux", "ends guests together with their command"),
    need(Group::Guests, "qemu-system-x86_64", "qemu-system-x86", "qemu-system-x86-core", "starts the kernels"),
    need(Group::Guests, "busybox", "busybox-static", "busybox", "is the guests' shell"),
    need(Group::Guests, "depmod", "kmod", "kmod", "puts kernel modules in order"),
    need(Group::Guests, "xz", "xz-utils", "xz", "decompresses kernel modules"),
    need(Group::Guests, "zstd", "zstd", "zstd", "decompresses kernels"),
    need(Group::Guests, "ldd", "libc-bin", "glibc-common", "finds the libraries of the guests' programs"),
    need(Group::Uml, "make", "make", "make", "builds user-mode Linux"),
    need(Group::Uml, "cc", "gcc libc6-dev", "gcc glibc-devel", "builds user-mode Linux"),
    need(Group::Uml, "ld", "binutils", "binutils", "builds user-mode Linux"),
    need(Group::Uml, "bc", "bc", "bc", "builds user-mode Linux"),
    need(Group::Uml, "bison", "bison", "bison", "builds user-mode Linux"),
    need(Group::Uml, "flex", "flex", "flex", "builds user-mode Linux"),
    need(Group::Uml, "perl", "perl", "perl", "builds user-mode Linux"),
    need(Group::Uml, "xz", "xz-utils", "xz", "unpacks the source of Linux"),
    need(Group::Uml, "taskset", "util-linux", "util-linux", "holds user-mode Linux to one CPU"),
    need(Group::Peers, "openssl", "openssl", "openssl", "is a client that the tests use"),
    need(Group::Peers, "curl", "curl", "curl-minimal", "is a client that the tests use"),
    need(Group::Peers, "wrk", "wrk", "wrk", "is a client that the tests use"),
    need(Group::Peers, "h2load", "nghttp2-client", "nghttp2", "is a client that the tests use"),
    Need {
        group: Group::Peers,
        present: Present::AnyFile(&[
            "/usr/lib/python3/dist-packages/websockets/__init__.py",
            "/usr/lib64/python3/site-packages/websockets/__init__.py",
        ]),
        apt: "python3-websockets",
        dnf: "python3-websockets",
        why: "is a WebSocket client and server that the tests use",
    },
    need(Group::Peers, "gnutls-cli", "gnutls-bin", "gnutls-utils", "is a client that the tests use"),
    need(Group::Peers, "hexdump", "bsdextrautils", "util-linux", "is what testssl.sh reads bytes with"),
    need(Group::Peers, "dig", "bind9-dnsutils", "bind-utils", "is what testssl.sh looks names up with"),
    need(Group::Peers, "ps", "procps", "procps-ng", "is what testssl.sh looks after its children with"),
    need(Group::Peers, "python3", "python3-venv python3-pip", "python3-pip", "runs sslyze"),
    need(
        Group::Peers,
        "javac",
        "default-jdk-headless",
        "java-21-amazon-corretto-devel",
        "is a client that the tests use",
    ),
];

/// The version that is installed and kept: any later one may ask for a newer compiler.
const CARGO_DENY: &str = "0.20.2";
const CARGO_FUZZ: &str = "0.13.2";

/// `cargo xtask setup`.
pub fn command(options: &Options) -> Result<i32> {
    let all = Group::value_variants();
    make_sure(if options.groups.is_empty() { all } else { &options.groups })?;
    println!("all is there");
    Ok(0)
}

/// Installs what these groups miss.
pub fn make_sure(groups: &[Group]) -> Result<()> {
    let missing: Vec<&Need> = NEEDS.iter().filter(|n| groups.contains(&n.group) && !n.present.holds()).collect();
    if !missing.is_empty() {
        for need in &missing {
            let name = match need.present {
                Present::Program(name) => name.to_owned(),
                Present::AnyFile(files) => files.join(" or "),
            };
            eprintln!("setup: {name} is missing; it {}", need.why);
        }
        install(&missing)?;
        if let Some(still) = missing.iter().find(|need| !need.present.holds()) {
            bail!("{:?} is still missing after its package was installed", still.present);
        }
    }
    if groups.contains(&Group::Build) {
        ebpf::obtain()?;
    }
    if groups.contains(&Group::Peers) {
        peers::nginx()?;
        judges::variables()?;
        peers::prometheus()?;
    }
    if groups.contains(&Group::Lint) {
        rustup_component("rustfmt", "cargo-fmt")?;
        rustup_component("clippy", "cargo-clippy")?;
        cargo_deny()?;
    }
    Ok(())
}

impl Present {
    fn holds(&self) -> bool {
        match self {
            Self::Program(name) => process::find(name).is_some(),
            Self::AnyFile(files) => files.iter().any(|file| Path::new(file).exists()),
        }
    }
}

fn install(missing: &[&Need]) -> Result<()> {
    let packages = |of: fn(&Need) -> &'static str| {
        let mut names: Vec<&str> = missing.iter().flat_map(|need| of(need).split(' ')).collect();
        names.sort_unstable();
        names.dedup();
        names
    };
    if process::find("apt-get").is_some() {
        let packages = packages(|need| need.apt);
        if !Path::new("/var/cache/apt/pkgcache.bin").exists() {
            refresh_lists()?;
        }
        if apt_install(&packages).is_err() {
            // Lists that are too old name versions that the mirror has dropped.
            refresh_lists()?;
            apt_install(&packages)?;
        }
        Ok(())
    } else if process::find("dnf").is_some() {
        let packages = packages(|need| need.dnf);
        eprintln!("setup: dnf install {}", packages.join(" "));
        process::run(as_root("dnf").args(["install", "-y", "-q"]).args(packages))
    } else {
        bail!("neither apt-get nor dnf is here: install by hand what was named above");
    }
}

fn apt_install(packages: &[&str]) -> Result<()> {
    eprintln!("setup: apt-get install {}", packages.join(" "));
    // Another apt at work is waited for, not failed on.
    let options = ["-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=600", "-o", "Dpkg::Use-Pty=0"];
    let mut command = as_root("apt-get");
    command.arg("install").args(options).args(packages);
    process::output(&mut command).map(drop)
}

/// Fetches the machine's own lists of packages.
pub fn refresh_lists() -> Result<()> {
    eprintln!("setup: apt-get update");
    process::output(as_root("apt-get").args(["update", "-qq", "-o", "DPkg::Lock::Timeout=600"])).map(drop)
}

/// A command that may install: as it is for root, else by sudo.
fn as_root(program: &str) -> Command {
    use std::os::unix::fs::MetadataExt;
    let root = std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0);
    let mut command = if root { Command::new("env") } else { Command::new("sudo") };
    command.args(["DEBIAN_FRONTEND=noninteractive", program]);
    command
}

fn rustup_component(component: &str, program: &str) -> Result<()> {
    if process::find(program).is_some() && process::output(Command::new(program).arg("--version")).is_ok() {
        return Ok(());
    }
    eprintln!("setup: rustup component add {component}");
    process::run(Command::new("rustup").args(["component", "add", component])).with_context(|| {
        format!("{component} is missing and rustup cannot add it: install it by your distribution's package")
    })
}

/// The source of the compiler's own library, which is built for targets that have none.
pub fn rust_source() -> Result<()> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let root = process::text(Command::new(rustc).args(["--print", "sysroot"]))?;
    if Path::new(root.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").exists() {
        return Ok(());
    }
    eprintln!("setup: rustup component add rust-src");
    process::run(Command::new("rustup").args(["component", "add", "rust-src"]))
        .context("rust-src is missing and rustup cannot add it; the eBPF program cannot be built without")
}

/// cargo-deny, which checks licences and sources.
pub fn cargo_deny() -> Result<PathBuf> {
    cargo_tool("cargo-deny", CARGO_DENY, "checks licences and sources")
}

/// cargo-fuzz, which builds and runs the fuzz targets.
pub fn cargo_fuzz() -> Result<PathBuf> {
    cargo_tool("cargo-fuzz", CARGO_FUZZ, "builds and runs the fuzz targets")
}

/// A tool of cargo's, built once and kept: minutes on two cores. A break costs what was not finished, not all.
fn cargo_tool(name: &str, version: &str, what: &str) -> Result<PathBuf> {
    let tools = cache::folder("tools")?;
    let root = tools.join(format!("{name}-{version}"));
    let program = root.join("bin").join(name);
    if program.exists() {
        return Ok(program);
    }
    let _lock = cache::lock(name)?;
    if !program.exists() {
        eprintln!("setup: cargo install {name} {version} ({what}; once, some minutes)");
        let build = tools.join(format!("{name}-build"));
        let mut cargo = Command::new(first_process::cargo());
        cargo.args(["install", name, "--version", version, "--locked", "--no-track", "--root"]).arg(&root);
        cargo.arg("--target-dir").arg(&build).current_dir(cache::root()?).env_remove("CARGO_TARGET_DIR");
        process::run(&mut cargo)?;
        cache::remove(&build)?;
    }
    Ok(program)
}
