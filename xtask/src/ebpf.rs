//! The eBPF object that the program embeds: built once for each version of its sources and kept.
//!
//!   rust-src ─▶ bpf-linker (against the compiler's own LLVM) ─▶ cargo build -Zbuild-std ─▶ the cache ─▶ proxy/build.rs

use crate::first_process::{Crates, cargo, workspace};
use crate::process::{self, Ended};
use crate::{cache, setup};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

#[path = "../../ebpf/object.rs"]
mod object;

const TARGET: &str = "bpfel-unknown-none";
/// The version that is installed and kept. It knows the LLVM of the compilers named below.
const BPF_LINKER: &str = "0.13.0";
const LLVM_VERSIONS: [u32; 2] = [21, 22];
/// Far beyond what a slow machine takes.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

/// Builds the object unless these sources have been built already.
pub fn obtain() -> Result<PathBuf> {
    let place = object::place(&workspace()).context("read the sources of the eBPF program")?;
    let place = place.context("neither XDG_CACHE_HOME nor HOME is set: set one of them")?;
    if place.exists() {
        return Ok(place);
    }
    let _lock = cache::lock("ebpf")?;
    if place.exists() {
        return Ok(place);
    }
    cache::folder("ebpf")?;
    setup::rust_source()?;
    let toolchain = Toolchain::find()?;
    let linker = toolchain.linker()?;
    let built = cache::folder("tools")?.join("ebpf-build");
    let mut build = Command::new(cargo());
    build.args(["build", "--release", "-Zbuild-std=core", "--target", TARGET, "--package", "tlsplice-ebpf"]);
    // bpf-linker links it as a whole by itself. How the host's programs are linked shall not change what every kernel's
    // verifier has passed.
    build.env("CARGO_PROFILE_RELEASE_LTO", "false").env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    build.args(["--bin", "tlsplice-ebpf", "--features", "program", "--target-dir"]).arg(&built);
    build.current_dir(workspace()).env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("CARGO_TARGET_DIR");
    build.env("RUSTFLAGS", format!("-Cdebuginfo=2 -Clinker={} -Clink-arg=--btf", linker.display()));
    // A stable compiler builds its own library for a target that has none, if it is told so.
    build.env("RUSTC_BOOTSTRAP", "1").env("LD_LIBRARY_PATH", &toolchain.libraries);
    run(build, "building the eBPF program")?;
    let aside = cache::aside(&place);
    fs::copy(built.join(TARGET).join("release/tlsplice-ebpf"), &aside).context("keep the eBPF object")?;
    cache::put_in_place(&aside, &place)?;
    cache::remove(&built)?;
    Ok(place)
}

/// The compiler, and the LLVM that it brings.
struct Toolchain {
    release: String,
    llvm: u32,
    libraries: PathBuf,
}

impl Toolchain {
    fn find() -> Result<Self> {
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let about = process::text(Command::new(&rustc).arg("-vV"))?;
        let field = |name: &str| about.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let release = field("release:").context("rustc -vV names no release")?.to_owned();
        let llvm = field("LLVM version:").and_then(|v| v.split('.').next()?.parse().ok());
        let llvm: u32 = llvm.context("rustc -vV names no version of LLVM")?;
        if !LLVM_VERSIONS.contains(&llvm) {
            bail!("rustc {release} has LLVM {llvm}, and bpf-linker {BPF_LINKER} knows {LLVM_VERSIONS:?}");
        }
        let root = process::text(Command::new(&rustc).args(["--print", "sysroot"]))?;
        Ok(Self { release, llvm, libraries: Path::new(root.trim()).join("lib") })
    }

    /// Links bitcode of this compiler, so it has to be of the same LLVM: the compiler's own.
    fn linker(&self) -> Result<PathBuf> {
        let tools = cache::folder("tools")?;
        let root = tools.join(format!("bpf-linker-{BPF_LINKER}-rustc-{}", self.release));
        let program = root.join("bin/bpf-linker");
        if program.exists() {
            return Ok(program);
        }
        let prefix = tools.join(format!("llvm-{}", self.release));
        fs::create_dir_all(prefix.join("lib")).context("create a folder for LLVM")?;
        let link = prefix.join("lib/libLLVM.so");
        cache::remove(&link)?;
        symlink(self.library()?, &link).with_context(|| format!("link {}", link.display()))?;
        let build = tools.join("bpf-linker-build");
        let mut install = Command::new(cargo());
        install.args(["install", "bpf-linker", "--version", BPF_LINKER, "--no-default-features", "--features"]);
        install.arg(format!("llvm-{}", self.llvm)).args(["--locked", "--no-track", "--root"]).arg(&root);
        install.arg("--target-dir").arg(&build).current_dir(cache::root()?);
        install.env("LLVM_PREFIX", &prefix).env_remove("CARGO_TARGET_DIR").env_remove("RUSTFLAGS");
        run(install, "building bpf-linker (once, some minutes)")?;
        cache::remove(&build)?;
        Ok(program)
    }

    fn library(&self) -> Result<PathBuf> {
        let name = format!("libLLVM.so.{}", self.llvm);
        let entries = fs::read_dir(&self.libraries).with_context(|| format!("read {}", self.libraries.display()))?;
        let found = entries.flatten().find(|entry| entry.file_name().to_string_lossy().starts_with(&name));
        found
            .map(|entry| entry.path())
            .with_context(|| format!("{} holds no {name}: the compiler has to be rustup's", self.libraries.display()))
    }
}

fn run(mut command: Command, label: &str) -> Result<()> {
    let mut crates = Crates::new(label);
    let mut said = Vec::new();
    let ended = process::watch(&mut command, BUILD_LIMIT, |line| {
        if !crates.count(line) {
            said.push(line.to_owned());
        }
    })?;
    match ended {
        Ended::Exited(status) if status.success() => Ok(()),
        Ended::Exited(status) => bail!("{}: {status}\n{}", process::shown(&command), said.join("\n")),
        Ended::TimedOut => bail!("{}: not done after {} s", process::shown(&command), BUILD_LIMIT.as_secs()),
    }
}
