//! Pipes and splice(2): bytes move between sockets without passing through our memory.

use super::cvt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A pipe whose two ends do not block.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
}

impl Pipe {
    /// A pipe of `wanted` bytes, or of what the kernel gives when that is less: pipe(7) caps a user's pipes by
    /// `fs.pipe-user-pages-soft` and each by `fs.pipe-max-size`.
    pub fn new(wanted: usize) -> io::Result<Self> {
        let mut fds = [0; 2];
        // SAFETY: pipe2 writes two descriptors into the array.
        cvt(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) })?;
        // SAFETY: pipe2 returned both just now and nobody else knows them.
        let (read, write) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
        // SAFETY: F_SETPIPE_SZ takes an int and no memory.
        let set = unsafe { libc::fcntl(read.as_raw_fd(), libc::F_SETPIPE_SZ, wanted as libc::c_int) };
        let capacity = match cvt(set) {
            Ok(bytes) => bytes,
            // SAFETY: F_GETPIPE_SZ takes no argument.
            Err(_) => cvt(unsafe { libc::fcntl(read.as_raw_fd(), libc::F_GETPIPE_SZ) })?,
        };
        Ok(Self { read, write, capacity })
    }

    /// Bytes, in whole pages.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub fn reader(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }

    pub fn writer(&self) -> BorrowedFd<'_> {
        self.write.as_fd()
    }

    /// Moves up to `max` bytes from a socket into this pipe. 0 is what the socket's own read would call 0.
    pub fn fill_from(&self, socket: BorrowedFd<'_>, max: usize) -> io::Result<usize> {
        splice(socket, self.write.as_fd(), max)
    }

    /// Moves up to `max` bytes from this pipe into a socket.
    pub fn drain_into(&self, socket: BorrowedFd<'_>, max: usize) -> io::Result<usize> {
        splice(self.read.as_fd(), socket, max)
    }

    /// Copies what the pipe holds into memory, to give the pipe away.
    pub fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the kernel writes at most `into.len()` bytes into `into`, which is borrowed for the call.
        cvt(unsafe { libc::read(self.read.as_raw_fd(), into.as_mut_ptr().cast(), into.len()) })
    }

    /// Puts bytes of ours in. For the probe.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the kernel reads `bytes.len()` bytes of `bytes`, which is borrowed for the call.
        cvt(unsafe { libc::write(self.write.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) })
    }
}

/// splice(2) without waiting. Sockets obey their own O_NONBLOCK here, so they must have it.
///
/// No SPLICE_F_MORE: it leaves the tail of a record unsent, and a shutdown then loses it.
fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, max: usize) -> io::Result<usize> {
    // SAFETY: null offsets, as pipes and sockets ask; both descriptors are borrowed, so open.
    let n = unsafe {
        libc::splice(
            from.as_raw_fd(),
            std::ptr::null_mut(),
            to.as_raw_fd(),
            std::ptr::null_mut(),
            max,
            libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE,
        )
    };
    cvt(n)
}
