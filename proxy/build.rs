//! Picks the eBPF object that `cargo xtask setup` has built from these sources, to be embedded.
//!
//! Without one the program is built all the same: it serves, counts in user space alone, and says why.

use std::path::{Path, PathBuf};

#[path = "../ebpf/object.rs"]
mod object;

/// Names a built object, for whoever builds it elsewhere.
const VARIABLE: &str = "TLSPLICE_EBPF";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(has_ebpf_object)");
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    println!("cargo::rerun-if-changed=build.rs");
    match find() {
        Ok(object) => {
            println!("cargo::rerun-if-changed={}", object.display());
            println!("cargo::rustc-env=TLSPLICE_EBPF_OBJECT={}", object.display());
            println!("cargo::rustc-cfg=has_ebpf_object");
        }
        Err(why) => println!("cargo::warning=built without connection metrics from the kernel: {why}"),
    }
}

fn find() -> Result<PathBuf, String> {
    if let Some(named) = std::env::var_os(VARIABLE).map(PathBuf::from) {
        return if named.is_file() { Ok(named) } else { Err(format!("{VARIABLE}={} is no file", named.display())) };
    }
    let workspace = Path::new("..").canonicalize().map_err(|e| e.to_string())?;
    for source in object::sources(&workspace).map_err(|e| format!("ebpf/: {e}"))? {
        println!("cargo::rerun-if-changed={}", source.display());
    }
    println!("cargo::rerun-if-changed={}", workspace.join("ebpf/object.rs").display());
    let place = object::place(&workspace).map_err(|e| format!("ebpf/: {e}"))?;
    let place = place.ok_or_else(|| "neither XDG_CACHE_HOME nor HOME is set".to_owned())?;
    if place.is_file() {
        return Ok(place);
    }
    // The folder and not the file: a path that is not there would start this anew at every build.
    if let Some(folder) = place.parent()
        && std::fs::create_dir_all(folder).is_ok()
    {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    Err(format!(
        "no eBPF object has been built from these sources ({}): run `cargo xtask setup build`",
        place.display()
    ))
}
