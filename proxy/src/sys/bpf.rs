//! bpf(2), as far as it is needed beside loading: pinned objects, values of maps, and the link to a cgroup.
//!
//! The kernel's structures are those of include/uapi/linux/bpf.h, cut behind the last field that a command reads.

use super::cvt;
use std::ffi::CString;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use tlsplice_ebpf::{ClassName, ClassSums, EndpointName, Handshake, Socket, Sums, WordName};

const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const OBJ_GET: libc::c_int = 7;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const LINK_UPDATE: libc::c_int = 29;

/// Plain words and bytes without padding, any pattern of which is valid: what a map's value may be read as.
///
/// # Safety
/// `repr(C)`, no padding, no pointer, no invalid pattern, and a size that is a multiple of eight bytes.
pub unsafe trait Plain: Copy {}

// SAFETY: u64 is such a type.
unsafe impl Plain for u64 {}
// SAFETY: two u32.
unsafe impl Plain for Handshake {}
// SAFETY: nine u64 and six u32.
unsafe impl Plain for Socket {}
// SAFETY: u64 and arrays of u64.
unsafe impl Plain for Sums {}
// SAFETY: u64.
unsafe impl Plain for ClassSums {}
// SAFETY: byte arrays, 272 bytes.
unsafe impl Plain for EndpointName {}
// SAFETY: byte arrays, 256 bytes.
unsafe impl Plain for ClassName {}
// SAFETY: a byte array, 192 bytes.
unsafe impl Plain for WordName {}

#[repr(C)]
#[derive(Default)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct Info {
    fd: u32,
    len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct Update {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// `struct bpf_link_info` of a cgroup's link.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    cgroup: u64,
    attach: u32,
    more: u32,
}

/// The front of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<usize> {
    let attributes: *const T = attributes;
    // SAFETY: the kernel reads size_of::<T>() bytes of a structure that outlives the call; what it points at is borrowed
    // by the callers for as long.
    cvt(unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) })
}

fn fd_word(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Opens what is pinned there.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let fd = bpf(OBJ_GET, &Object { path: path.as_ptr() as u64, ..Object::default() })?;
    let fd = libc::c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel returned this descriptor just now and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The value at an index of an array.
pub fn lookup<T: Plain>(map: BorrowedFd<'_>, index: u32) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::uninit();
    look_up(map, &index, value.as_mut_ptr().cast())?;
    // SAFETY: the kernel has written the whole value, and every pattern of a Plain type is one.
    Ok(unsafe { value.assume_init() })
}

/// The values at an index of a per-CPU array, for as many CPUs as are possible here.
pub fn lookup_each_cpu<T: Plain>(map: BorrowedFd<'_>, index: u32, cpus: usize) -> io::Result<Vec<T>> {
    let mut values = Vec::<T>::with_capacity(cpus);
    look_up(map, &index, values.as_mut_ptr().cast())?;
    // SAFETY: the kernel has written one value for each possible CPU, whose number the caller has from the kernel.
    unsafe { values.set_len(cpus) };
    Ok(values)
}

fn look_up(map: BorrowedFd<'_>, key: &u32, value: *mut u8) -> io::Result<()> {
    let key: *const u32 = key;
    let element = Element { map: fd_word(map), key: key as u64, value: value as u64, ..Element::default() };
    bpf(MAP_LOOKUP_ELEM, &element).map(drop)
}

/// Sets the value at an index of an array, or of a socket where the map is a storage and `key` its descriptor.
pub fn update<T: Plain>(map: BorrowedFd<'_>, key: u32, value: &T) -> io::Result<()> {
    let (key, value): (*const u32, *const T) = (&key, value);
    let element = Element { map: fd_word(map), key: key as u64, value: value as u64, ..Element::default() };
    bpf(MAP_UPDATE_ELEM, &element).map(drop)
}

/// Sets a socket's own value.
pub fn update_socket<T: Plain>(map: BorrowedFd<'_>, socket: BorrowedFd<'_>, value: &T) -> io::Result<()> {
    update(map, fd_word(socket), value)
}

/// What a map holds: kind and flags are those of the program's own definition, which the loader has checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    value_bytes: u32,
    entries: u32,
}

impl Shape {
    pub fn of<T: Plain>(entries: usize) -> Self {
        let value_bytes = u32::try_from(size_of::<T>()).unwrap_or(u32::MAX);
        Self { value_bytes, entries: u32::try_from(entries).unwrap_or(u32::MAX) }
    }
}

/// What a map holds.
pub fn shape(map: BorrowedFd<'_>) -> io::Result<Shape> {
    let mut found = MapInfo::default();
    let len = u32::try_from(size_of::<MapInfo>()).unwrap_or(0);
    bpf(OBJ_GET_INFO_BY_FD, &Info { fd: fd_word(map), len, info: (&raw mut found) as u64 })?;
    Ok(Shape { value_bytes: found.value_bytes, entries: found.entries })
}

/// How often a program has run, and for how long: counted only while kernel.bpf_stats_enabled is 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Runs {
    pub count: u64,
    pub nanoseconds: u64,
}

/// Words of `struct bpf_prog_info` up to `run_cnt`, and the places of the two that are read.
const PROGRAM_INFO_WORDS: usize = 26;
const RUN_TIME_WORD: usize = 24;
const RUN_COUNT_WORD: usize = 25;

/// What the kernel says of a program's runs.
pub fn runs(program: BorrowedFd<'_>) -> io::Result<Runs> {
    let mut found = [0_u64; PROGRAM_INFO_WORDS];
    let len = u32::try_from(size_of_val(&found)).unwrap_or(0);
    bpf(OBJ_GET_INFO_BY_FD, &Info { fd: fd_word(program), len, info: found.as_mut_ptr() as u64 })?;
    Ok(Runs { count: found[RUN_COUNT_WORD], nanoseconds: found[RUN_TIME_WORD] })
}

/// Puts another program in the place of the link's, without a moment in between.
pub fn replace_program(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf(LINK_UPDATE, &Update { link: fd_word(link), program: fd_word(program), ..Update::default() }).map(drop)
}

/// The cgroup that a link is attached to; 0 when that is gone.
pub fn cgroup_of_link(link: BorrowedFd<'_>) -> io::Result<u64> {
    let mut found = LinkInfo::default();
    let len = u32::try_from(size_of::<LinkInfo>()).unwrap_or(0);
    bpf(OBJ_GET_INFO_BY_FD, &Info { fd: fd_word(link), len, info: (&raw mut found) as u64 })?;
    Ok(found.cgroup)
}
