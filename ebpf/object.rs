// Where the built eBPF object is kept: a module that `proxy/build.rs` and xtask share.
//
// The name tells the sources that it was built from, so that an object of other sources is never embedded.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// `$XDG_CACHE_HOME/tlsplice/ebpf/OBJECT`, or below `~/.cache`. `None`: neither variable says where.
pub fn place(workspace: &Path) -> io::Result<Option<PathBuf>> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    let name = format!("tlsplice-{}.o", fingerprint(workspace)?);
    Ok(cache.map(|cache| cache.join("tlsplice/ebpf").join(name)))
}

/// What the object is built from.
pub fn sources(workspace: &Path) -> io::Result<Vec<PathBuf>> {
    let folder = workspace.join("ebpf");
    let mut sources = vec![folder.join("Cargo.toml")];
    for entry in fs::read_dir(folder.join("src"))? {
        sources.push(entry?.path());
    }
    sources.sort();
    Ok(sources)
}

/// FNV-1a over all sources: it guards against stale builds, not against malice.
fn fingerprint(workspace: &Path) -> io::Result<String> {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for source in sources(workspace)? {
        for byte in fs::read(source)? {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    Ok(format!("{hash:016x}"))
}
