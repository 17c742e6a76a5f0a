//! Limits of the process, and the clock that systemd counts by.

use std::io;

/// Soft and hard limit of open files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenFiles {
    pub soft: u64,
    pub hard: u64,
}

/// RLIMIT_NOFILE as it is.
///
/// # Errors
/// getrlimit(2) failed, which it does for no valid resource.
pub fn open_files() -> io::Result<OpenFiles> {
    let limit = get(libc::RLIMIT_NOFILE)?;
    Ok(OpenFiles { soft: limit.rlim_cur, hard: limit.rlim_max })
}

/// RLIMIT_MEMLOCK, soft, in bytes; `u64::MAX` is unlimited.
///
/// # Errors
/// As `open_files`.
pub fn locked_memory_bytes() -> io::Result<u64> {
    get(libc::RLIMIT_MEMLOCK).map(|limit| limit.rlim_cur)
}

/// Raises the soft limit of open files to the hard one, and says what it is then.
///
/// # Errors
/// setrlimit(2) failed.
pub fn raise_open_files() -> io::Result<OpenFiles> {
    let OpenFiles { hard, .. } = open_files()?;
    let limit = libc::rlimit { rlim_cur: hard, rlim_max: hard };
    // SAFETY: `limit` is a whole `rlimit` that lives across the call, which only reads it.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(OpenFiles { soft: hard, hard })
}

fn get(resource: libc::__rlimit_resource_t) -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a whole `rlimit` of this frame, and getrlimit(2) writes nothing beyond it.
    if unsafe { libc::getrlimit(resource, &mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit)
}

/// CLOCK_MONOTONIC in microseconds, as sd_notify(3) wants it in MONOTONIC_USEC.
pub fn monotonic_usec() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a whole `timespec` of this frame. The call fails only for an unknown clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raising_ends_at_the_hard_limit() {
        let raised = raise_open_files().expect("lowering nothing");
        assert_eq!(raised.soft, raised.hard);
        assert_eq!(open_files().expect("as before"), raised);
    }
}
