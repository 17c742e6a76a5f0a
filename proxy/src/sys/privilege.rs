//! The end of root: another user, one capability, nothing to get more by.
//!
//!   CapBnd emptied ─▶ groups ─▶ gid ─▶ uid (capabilities kept) ─▶ CAP_NET_BIND_SERVICE alone ─▶ no_new_privs
//!
//! Capabilities and no_new_privs belong to a thread, not to the process, so this runs while there is one thread; all
//! later ones inherit. `become_unprivileged` refuses otherwise.

use caps::{CapSet, Capability, CapsHashSet};
use std::io;

/// A local user, from /etc/passwd and /etc/group.
///
/// The files are read here and not by getpwnam(3), which a static binary cannot rely on. Users of a directory
/// service are not found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// Every group that names the user, and `gid`.
    pub groups: Vec<u32>,
}

/// Why root did not end.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    #[error("there is no user \"{0}\" in /etc/passwd: useradd --system --no-create-home --shell /usr/sbin/nologin {0}")]
    NoUser(String),
    #[error("drop privileges: {0} threads run already")]
    Threads(usize),
    #[error("drop privileges: {call}: {source}")]
    Call { call: &'static str, source: io::Error },
    #[error("drop privileges: {set}: {source}")]
    Capabilities { set: &'static str, source: caps::errors::CapsError },
}

impl User {
    /// `Ok(None)`: no such user.
    ///
    /// # Errors
    /// /etc/passwd or /etc/group cannot be read.
    pub fn find(name: &str) -> io::Result<Option<Self>> {
        let groups = std::fs::read_to_string("/etc/group").or_else(|e| {
            // A system without the file has no further groups.
            if e.kind() == io::ErrorKind::NotFound { Ok(String::new()) } else { Err(e) }
        })?;
        match std::fs::read_to_string("/etc/passwd") {
            Ok(passwd) => Ok(Self::from_files(name, &passwd, &groups)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn from_files(name: &str, passwd: &str, group: &str) -> Option<Self> {
        let fields =
            passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|f| f.first() == Some(&name))?;
        let uid = fields.get(2)?.parse().ok()?;
        let gid: u32 = fields.get(3)?.parse().ok()?;
        let mut groups = vec![gid];
        for fields in group.lines().map(|line| line.split(':').collect::<Vec<_>>()) {
            let Some(id) = fields.get(2).and_then(|id| id.parse().ok()) else { continue };
            let is_member = fields.get(3).is_some_and(|members| members.split(',').any(|member| member == name));
            if is_member && !groups.contains(&id) {
                groups.push(id);
            }
        }
        Some(Self { name: name.to_owned(), uid, gid, groups })
    }
}

/// The process runs as root, by its effective uid.
pub fn is_root() -> bool {
    // SAFETY: geteuid(2) takes nothing and always succeeds.
    unsafe { libc::geteuid() == 0 }
}

/// The effective uid.
pub fn effective_uid() -> u32 {
    // SAFETY: geteuid(2) takes nothing and always succeeds.
    unsafe { libc::geteuid() }
}

/// The capability that was kept is in force: ports below 1024 can be bound after a reload too.
pub fn can_bind_low_ports() -> bool {
    caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_BIND_SERVICE).unwrap_or(false)
}

/// Root ends here. Without a user the uid stays and the capabilities go.
///
/// # Errors
/// The step that failed. The process may be half way then, and has to end.
pub fn become_unprivileged(user: Option<&User>) -> Result<(), PrivilegeError> {
    let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count).unwrap_or(1);
    if threads != 1 {
        return Err(PrivilegeError::Threads(threads));
    }
    let may = |capability| caps::has_cap(None, CapSet::Permitted, capability).unwrap_or(false);
    let kept = may(Capability::CAP_NET_BIND_SERVICE);
    // A container's root may lack CAP_SETPCAP; no_new_privs then stands alone against execve(2).
    if may(Capability::CAP_SETPCAP) {
        clear(CapSet::Bounding, "bounding set")?;
    }
    if let Some(user) = user {
        change_user(user)?;
    }
    leave_nothing_to_programs()?;
    let mut only = CapsHashSet::new();
    if kept {
        only.insert(Capability::CAP_NET_BIND_SERVICE);
    }
    // Effective first: it may never hold what permitted lacks.
    set(CapSet::Effective, &only, "effective set")?;
    set(CapSet::Permitted, &only, "permitted set")?;
    // SAFETY: prctl(2) with PR_SET_NO_NEW_PRIVS takes four integers and no memory of ours.
    call("PR_SET_NO_NEW_PRIVS", unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}

/// What a process that was never root has been given for its start alone: the loader's capabilities, CAP_PERFMON beside
/// them, and that a program it executes would have any.
///
/// # Errors
/// As `become_unprivileged`.
pub fn give_back_loader_capabilities() -> Result<(), PrivilegeError> {
    leave_nothing_to_programs()?;
    for capability in [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON] {
        for (name, which) in [("effective set", CapSet::Effective), ("permitted set", CapSet::Permitted)] {
            if caps::has_cap(None, which, capability).unwrap_or(false) {
                caps::drop(None, which, capability)
                    .map_err(|source| PrivilegeError::Capabilities { set: name, source })?;
            }
        }
    }
    Ok(())
}

/// What a program that is executed would have.
fn leave_nothing_to_programs() -> Result<(), PrivilegeError> {
    // Old kernels have no ambient set to clear; the inheritable set is empty then all the same.
    let _ = caps::clear(None, CapSet::Ambient);
    // A filter of system calls may refuse capset(2): no reason to end if there is nothing to clear.
    match caps::read(None, CapSet::Inheritable) {
        Ok(inheritable) if inheritable.is_empty() => Ok(()),
        Ok(_) | Err(_) => clear(CapSet::Inheritable, "inheritable set"),
    }
}

fn change_user(user: &User) -> Result<(), PrivilegeError> {
    // SAFETY: prctl(2) with PR_SET_KEEPCAPS takes integers and no memory of ours.
    call("PR_SET_KEEPCAPS", unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) })?;
    // SAFETY: the pointer and the length are those of one vector, which the call only reads.
    call("setgroups", unsafe { libc::setgroups(user.groups.len(), user.groups.as_ptr()) })?;
    // SAFETY: setresgid(2) takes three integers. All three ids, so that none leads back.
    call("setresgid", unsafe { libc::setresgid(user.gid, user.gid, user.gid) })?;
    // SAFETY: as setresgid.
    call("setresuid", unsafe { libc::setresuid(user.uid, user.uid, user.uid) })
}

fn call(name: &'static str, result: libc::c_int) -> Result<(), PrivilegeError> {
    if result == 0 { Ok(()) } else { Err(PrivilegeError::Call { call: name, source: io::Error::last_os_error() }) }
}

fn set(which: CapSet, capabilities: &CapsHashSet, name: &'static str) -> Result<(), PrivilegeError> {
    caps::set(None, which, capabilities).map_err(|source| PrivilegeError::Capabilities { set: name, source })
}

fn clear(which: CapSet, name: &'static str) -> Result<(), PrivilegeError> {
    caps::clear(None, which).map_err(|source| PrivilegeError::Capabilities { set: name, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_comes_with_every_group_that_names_it() {
        let passwd = "root:x:0:0::/root:/bin/sh\ntlsplice:x:990:991::/:/sbin/nologin\nbroken\n";
        let group = "root:x:0:\nssl:x:50:www,tlsplice\ntlsplice:x:991:tlsplice\nbroken\nother:x:51:tlsplicer\n";
        let user = User::from_files("tlsplice", passwd, group).expect("there");
        assert_eq!(user, User { name: "tlsplice".to_owned(), uid: 990, gid: 991, groups: vec![991, 50] });
        assert_eq!(User::from_files("nobody", passwd, group), None);
        assert_eq!(User::from_files("broken", passwd, group), None);
    }
}
