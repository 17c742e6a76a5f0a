//! The findings about the kernel: its version against the floor, its tls module, and what that can do.

use super::{Finding, Host};
use crate::probe::Kernel;

/// Series, and the first patch level without the losses of data that were found in earlier ones.
const FLOORS: [(Version, u32); 2] = [(Version(6, 1), 192), (Version(6, 12), 117)];
/// The oldest series that was tried.
const OLDEST: Version = Version(6, 1);
/// Here a splice that the pipe cuts short lost bytes, up to this patch level at least; the probe finds out.
const EMPTY_PIPE_SERIES: Version = Version(6, 18);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

pub(super) fn version(host: &Host, kernel: &Kernel) -> Finding {
    const NAME: &str = "kernel";
    let Some((series, patch)) = parse_version(&host.version, &kernel.release) else {
        return Finding::note(NAME, format!("{}: no version that could be compared", kernel.release));
    };
    let Version(major, minor) = series;
    let found = format!("{} ({major}.{minor}.{patch})", kernel.release);
    if series < OLDEST {
        return Finding::gap(
            NAME,
            format!("{found}: older than 6.1, the oldest that was tried"),
            "install Linux 6.12 or later",
        );
    }
    if let Some((_, floor)) = FLOORS.iter().find(|(floor_series, floor)| *floor_series == series && patch < *floor) {
        return Finding::gap(
            NAME,
            format!("{found}: below {major}.{minor}.{floor}, the floor of its series"),
            format!(
                "install {major}.{minor}.{floor} or later (apt-get upgrade, dnf upgrade --releasever=latest; on Amazon \
                 Linux kernel6.18 where that has no newer one) and reboot"
            ),
        );
    }
    if series == EMPTY_PIPE_SERIES && !kernel.short_splice_safe && kernel.no_ulp.is_none() {
        return Finding::note(NAME, format!("{found}: the empty-pipe rule holds, records are not gathered in pipes"));
    }
    Finding::ok(NAME, found)
}

/// Debian's `uname -r` may carry an ABI number instead of the patch level; `/proc/version` ends in `Debian 6.1.192-1`.
/// That line names Debian's compiler too, so the series has to be the same.
fn parse_version(proc_version: &str, release: &str) -> Option<(Version, u32)> {
    let of_release = parse_triple(release)?;
    let of_debian = proc_version.rsplit_once("Debian ").and_then(|(_, rest)| parse_triple(rest));
    Some(of_debian.filter(|(series, _)| *series == of_release.0).unwrap_or(of_release))
}

fn parse_triple(text: &str) -> Option<(Version, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some((Version(major, minor), numbers.next().and_then(Result::ok).unwrap_or(0)))
}

pub(super) fn tls(host: &Host, kernel: &Kernel) -> Finding {
    const NAME: &str = "kernel TLS";
    let Some(why) = &kernel.no_ulp else { return Finding::ok(NAME, "TCP_ULP \"tls\" works") };
    if let Some(line) = &host.tls_module_forbidden_by {
        return Finding::gap(
            NAME,
            format!("{why}: the module is forbidden ({line})"),
            format!("delete that line: {line}"),
        );
    }
    match host.tls_module_built {
        Some(false) => Finding::gap(
            NAME,
            format!("{why}: this kernel was built without CONFIG_TLS"),
            "boot a kernel with CONFIG_TLS=m, as Debian's, Ubuntu's and Amazon Linux' own are",
        ),
        Some(true) | None if !host.is_root => {
            Finding::gap(NAME, why.clone(), "sudo modprobe tls && echo tls | sudo tee /etc/modules-load.d/tls.conf")
        }
        Some(true) => Finding::gap(NAME, why.clone(), "modprobe tls && echo tls > /etc/modules-load.d/tls.conf"),
        None => Finding::gap(
            NAME,
            format!("{why}; no file here says how this kernel was built"),
            "modprobe tls; if there is no such module, boot a kernel with CONFIG_TLS=m",
        ),
    }
}

pub(super) fn suites(kernel: &Kernel) -> Finding {
    const NAME: &str = "suites";
    let missing = crate::control::start::missing_directions(kernel);
    if missing.is_empty() {
        let names: Vec<&str> = kernel.suites.iter().map(|suite| suite.name).collect();
        return Finding::ok(NAME, format!("both directions of {}", names.join(", ")));
    }
    let mend = if missing.iter().all(|name| name.contains("CHACHA20")) {
        "modprobe -a chacha20poly1305 chacha"
    } else {
        "modprobe -a gcm aesni-intel ghash-clmulni-intel chacha20poly1305 chacha"
    };
    Finding::gap(NAME, format!("these stay in userspace: {}", missing.join(", ")), mend)
}

pub(super) fn rekey(kernel: &Kernel) -> Finding {
    const NAME: &str = "rekeying";
    if kernel.rekey {
        Finding::ok(NAME, "keys can be renewed (TLS 1.3 KeyUpdate)")
    } else {
        Finding::note(
            NAME,
            "this kernel takes no new keys (6.14 and later do): a client that rekeys past the door is closed cleanly",
        )
    }
}

pub(super) fn splice(kernel: &Kernel) -> Finding {
    const NAME: &str = "splice";
    match (kernel.short_splice_safe, kernel.partial_record_wakes) {
        (true, false) => Finding::ok(NAME, "short splices lose nothing, partial records are quiet"),
        (true, true) => Finding::note(NAME, "partial records wake the reader: SO_RCVLOWAT stands in"),
        (false, false) => Finding::note(NAME, "short splices lose bytes: only empty pipes are filled"),
        (false, true) => {
            Finding::note(NAME, "short splices lose bytes and partial records wake the reader: both are worked around")
        }
    }
}

pub(super) fn receive(kernel: &Kernel) -> Finding {
    const NAME: &str = "receiving records";
    if kernel.opens_in_place {
        Finding::ok(NAME, "records are opened where they are wanted, padded ones too")
    } else {
        Finding::note(
            NAME,
            "records are not opened where they are wanted, or padded ones are wrong then: uploads past the door are spliced",
        )
    }
}

pub(super) fn gcm(host: &Host) -> Finding {
    const NAME: &str = "AES-GCM driver";
    match &host.gcm_driver {
        None => Finding::note(NAME, "none is loaded yet"),
        Some(driver) if is_portable(driver) => Finding::gap(
            NAME,
            format!("{driver}, which is portable code and several times slower"),
            "modprobe -a aesni-intel ghash-clmulni-intel   (aarch64: modprobe ghash-ce), and see /proc/cpuinfo for the flag aes",
        ),
        Some(driver) => Finding::ok(NAME, driver.clone()),
    }
}

fn is_portable(driver: &str) -> bool {
    ["generic)", "aes-lib", "aes-fixed-time", "ghash-generic"].iter().any(|part| driver.contains(part))
}

#[cfg(test)]
mod tests {
    use super::super::Standing;
    use super::super::tests::{good_host, good_kernel};
    use super::*;

    #[test]
    fn debian_hides_the_patch_level_in_proc_version() {
        let version = "Linux version 6.1.0-41-cloud-amd64 (debian-kernel@lists.debian.org) #1 SMP PREEMPT_DYNAMIC Debian 6.1.158-1 (2025-11-09)";
        assert_eq!(parse_version(version, "6.1.0-41-cloud-amd64"), Some((Version(6, 1), 158)));
        assert_eq!(
            parse_version("Linux version 6.1.94-99.amzn2023", "6.1.94-99.176.amzn2023.x86_64"),
            Some((Version(6, 1), 94))
        );
        let version = "Linux version 7.2.13 (root@host) (gcc (Debian 12.2.0-14) 12.2.0, GNU ld 2.40) #1";
        assert_eq!(parse_version(version, "7.2.13"), Some((Version(7, 2), 13)));
        assert_eq!(parse_version("", "7.2-rc1"), Some((Version(7, 2), 0)));
        assert_eq!(parse_version("", "none"), None);
    }

    fn of(release: &str, short_splice_safe: bool) -> Standing {
        let host = Host { version: String::new(), ..good_host() };
        version(&host, &Kernel { release: release.to_owned(), short_splice_safe, ..good_kernel() }).standing
    }

    #[test]
    fn floors_are_by_series() {
        assert_eq!(of("5.15.100", true), Standing::Gap);
        assert_eq!(of("6.1.191-cloud", true), Standing::Gap);
        assert_eq!(of("6.1.192-cloud", true), Standing::Ok);
        assert_eq!(of("6.12.116+deb12", true), Standing::Gap);
        assert_eq!(of("6.12.117+deb12", true), Standing::Ok);
        assert_eq!(of("6.18.15+deb13", false), Standing::Note);
        assert_eq!(of("6.18.40", true), Standing::Ok);
        assert_eq!(of("7.2.13", true), Standing::Ok);
    }

    #[test]
    fn a_forbidden_module_is_said_with_its_line() {
        let kernel = Kernel { no_ulp: Some("no".to_owned()), ..good_kernel() };
        let line = "/etc/modprobe.d/hardening.conf:3: install tls /bin/false".to_owned();
        let host = Host { tls_module_forbidden_by: Some(line.clone()), ..good_host() };
        let finding = tls(&host, &kernel);
        assert!(finding.standing == Standing::Gap && finding.mend.is_some_and(|mend| mend.contains(&line)));
        let without = tls(&Host { tls_module_built: Some(false), ..good_host() }, &kernel);
        assert!(without.found.contains("CONFIG_TLS"), "{without:?}");
    }
}
