//! Reads what the doctor judges by. What cannot be read is `None`, never a guess.

use crate::observe::ebpf::{self, Lack};
use crate::sys::{limits, privilege};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Where `modprobe` takes its rules from, modprobe.d(5).
const MODPROBE_FOLDERS: [&str; 4] =
    ["/etc/modprobe.d", "/run/modprobe.d", "/usr/local/lib/modprobe.d", "/usr/lib/modprobe.d"];

/// This host, as far as the data path cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// `/proc/version`, which has the real version where `uname -r` has an ABI number.
    pub version: String,
    pub is_root: bool,
    /// Why a ring cannot be made.
    pub io_uring_error: Option<String>,
    pub io_uring_disabled: Option<u64>,
    pub open_files_hard: u64,
    pub locked_memory_bytes: u64,
    pub somaxconn: Option<u64>,
    /// The first and the last that connect(2) takes.
    pub local_ports: Option<(u16, u16)>,
    pub pipe_max_size_bytes: Option<u64>,
    pub pipe_user_pages_soft: Option<u64>,
    /// File and line that keep `tls` from being loaded.
    pub tls_module_forbidden_by: Option<String>,
    /// The kernel was built with CONFIG_TLS. `None`: nothing here says so or denies it.
    pub tls_module_built: Option<bool>,
    /// The driver that gcm(aes) would use.
    pub gcm_driver: Option<String>,
    /// What keeps connections from being counted in the kernel.
    pub uncounted: Option<Lack>,
}

impl Host {
    pub fn read() -> Self {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            version: fs::read_to_string("/proc/version").unwrap_or_default().trim().to_owned(),
            is_root: privilege::is_root(),
            io_uring_error: io_uring::IoUring::new(8).err().map(|e| e.to_string()),
            io_uring_disabled: sysctl("kernel/io_uring_disabled"),
            open_files_hard: limits::open_files().map_or(0, |limit| limit.hard),
            locked_memory_bytes: limits::locked_memory_bytes().unwrap_or(0),
            somaxconn: sysctl("net/core/somaxconn"),
            local_ports: local_ports(),
            pipe_max_size_bytes: sysctl("fs/pipe-max-size"),
            pipe_user_pages_soft: sysctl("fs/pipe-user-pages-soft"),
            tls_module_forbidden_by: MODPROBE_FOLDERS.iter().find_map(|folder| forbidding_line(Path::new(folder))),
            tls_module_built: tls_module_built(release.trim()),
            gcm_driver: fs::read_to_string("/proc/crypto").ok().and_then(|text| best_driver(&text, "gcm(aes)")),
            uncounted: ebpf::lacking(),
        }
    }
}

fn sysctl(path: &str) -> Option<u64> {
    fs::read_to_string(Path::new("/proc/sys").join(path)).ok()?.trim().parse().ok()
}

fn local_ports() -> Option<(u16, u16)> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let mut numbers = text.split_whitespace().map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The first line of the folder's `.conf` files that forbids the module, with its place.
fn forbidding_line(folder: &Path) -> Option<String> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.iter().filter(|file| file.extension().is_some_and(|e| e == "conf")).find_map(|file| {
        let text = fs::read_to_string(file).ok()?;
        let (number, line) = text.lines().enumerate().find(|(_, line)| forbids_tls(line))?;
        Some(format!("{}:{}: {}", file.display(), number + 1, line.trim()))
    })
}

/// `install tls /bin/false` and its like, or `blacklist tls`, which stops the kernel's own request by alias.
fn forbids_tls(line: &str) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["blacklist", "tls"] => true,
        ["install", "tls", command, ..] => {
            ["/bin/false", "/bin/true", "/usr/bin/false", "/usr/bin/true", "/sbin/nologin"].contains(command)
        }
        _ => false,
    }
}

/// From the kernel's configuration, or from its modules.
fn tls_module_built(release: &str) -> Option<bool> {
    if Path::new("/sys/module/tls").exists() {
        return Some(true);
    }
    let modules = Path::new("/lib/modules").join(release);
    let configs =
        [PathBuf::from(format!("/boot/config-{release}")), modules.join("config"), modules.join("build/.config")];
    if let Some(config) = running_config().or_else(|| configs.iter().find_map(|file| fs::read_to_string(file).ok())) {
        return Some(config.lines().any(|line| matches!(line, "CONFIG_TLS=y" | "CONFIG_TLS=m")));
    }
    let listed = |file| fs::read_to_string(modules.join(file)).ok();
    let (dep, builtin) = (listed("modules.dep"), listed("modules.builtin"));
    let lists = [dep, builtin].into_iter().flatten().collect::<Vec<_>>();
    if lists.is_empty() { None } else { Some(lists.iter().any(|list| list.contains("net/tls/tls.ko"))) }
}

/// `/proc/config.gz`, of kernels built with CONFIG_IKCONFIG_PROC.
fn running_config() -> Option<String> {
    let mut config = String::new();
    flate2::read::GzDecoder::new(fs::File::open("/proc/config.gz").ok()?).read_to_string(&mut config).ok()?;
    Some(config)
}

/// The driver of the highest priority for `algorithm`, as the kernel itself would choose.
fn best_driver(proc_crypto: &str, algorithm: &str) -> Option<String> {
    let field = |entry: &str, name: &str| {
        entry
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| key.trim() == name)
            .map(|(_, v)| v.trim().to_owned())
    };
    proc_crypto
        .split("\n\n")
        .filter(|entry| {
            field(entry, "name").as_deref() == Some(algorithm) && field(entry, "internal").as_deref() != Some("yes")
        })
        .filter_map(|entry| Some((field(entry, "priority")?.parse::<i64>().ok()?, field(entry, "driver")?)))
        .max_by_key(|(priority, _)| *priority)
        .map(|(_, driver)| driver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_forbidden_by_install_and_by_blacklist() {
        for line in ["install tls /bin/false", "  install  tls /usr/bin/true # hardening", "blacklist tls"] {
            assert!(forbids_tls(line), "{line}");
        }
        for line in [
            "# install tls /bin/false",
            "install tls_foo /bin/false",
            "options tls x=1",
            "install tls /sbin/modprobe tls",
            "",
        ] {
            assert!(!forbids_tls(line), "{line}");
        }
    }

    #[test]
    fn the_driver_of_the_highest_priority_counts() {
        let text = "name         : gcm(aes)\ndriver       : gcm_base(ctr(aes-lib),ghash-lib)\npriority     : 100\n\n\
                    name         : gcm(aes)\ndriver       : generic-gcm-aesni\npriority     : 400\ninternal     : no\n\n\
                    name         : rfc4106(gcm(aes))\ndriver       : rfc4106-gcm-aesni\npriority     : 500\n";
        assert_eq!(best_driver(text, "gcm(aes)").as_deref(), Some("generic-gcm-aesni"));
        assert_eq!(best_driver("", "gcm(aes)"), None);
    }
}
