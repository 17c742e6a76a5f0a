//! Non-blocking socket calls, one function each. None of them waits: readiness comes from the ring.

use super::cvt;
use socket2::SockRef;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{size_of, zeroed};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// accept4(2). `Ok(None)`: nothing is queued.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<(OwnedFd, SocketAddr)>> {
    // SAFETY: an all-zero sockaddr_storage is a valid value of that plain C struct.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: `storage` and `len` outlive the call and `len` is the size of `storage`; the fd is borrowed, so open.
    let fd = unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            (&raw mut storage).cast(),
            &mut len,
            libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
        )
    };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return if is_again(&error) { Ok(None) } else { Err(error) };
    }
    // SAFETY: accept4 returned this descriptor just now and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let peer = peer_address(&storage).unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)));
    Ok(Some((socket, peer)))
}

fn peer_address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that the kernel wrote a sockaddr_in, and the storage is larger and better aligned.
            let v4 = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in>() };
            Some(SocketAddr::from((v4.sin_addr.s_addr.to_ne_bytes(), u16::from_be(v4.sin_port))))
        }
        libc::AF_INET6 => {
            // SAFETY: as above, for sockaddr_in6.
            let v6 = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in6>() };
            let ip = std::net::Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Some(SocketAddr::new(ip.to_canonical(), u16::from_be(v6.sin6_port)))
        }
        _ => None,
    }
}

/// recv(2) without waiting. 0 is the end of the stream.
pub fn recv(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `into.len()` bytes into `into`, which is borrowed for the call.
    let n = unsafe { libc::recv(socket.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), libc::MSG_DONTWAIT) };
    cvt(n)
}

/// What comes behind the bytes of a send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// Nobody knows.
    Unknown,
    /// shutdown(2), at once: what does not fill a segment waits for the FIN and goes with it (MSG_MORE).
    Fin,
}

/// send(2) without waiting and without SIGPIPE. May take less than all.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], follow: Follow) -> io::Result<usize> {
    let more = match follow {
        Follow::Unknown => 0,
        Follow::Fin => libc::MSG_MORE,
    };
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | more;
    // SAFETY: the kernel reads `bytes.len()` bytes of `bytes`, which is borrowed for the call.
    let n = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    cvt(n)
}

/// Buffers of one vectored call: the full records that the largest read completes at most, and one.
pub const VECTORS: usize = 66;

/// recvmsg(2) without waiting, into at most `VECTORS` buffers in turn.
pub fn recv_vectored(socket: BorrowedFd<'_>, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    // SAFETY: an all-zero msghdr is a valid value of that plain C struct.
    let mut message: libc::msghdr = unsafe { zeroed() };
    // IoSliceMut is ABI compatible with iovec (std's own promise).
    message.msg_iov = into.as_mut_ptr().cast();
    message.msg_iovlen = into.len() as _;
    // SAFETY: the message points at `into`, whose buffers are borrowed for the call, with their true sizes.
    cvt(unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
}

/// sendmsg(2) without waiting and without SIGPIPE. May take less than all.
pub fn send_vectored(socket: BorrowedFd<'_>, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
    // SAFETY: as in `recv_vectored`.
    let mut message: libc::msghdr = unsafe { zeroed() };
    // IoSlice is ABI compatible with iovec (std's own promise), and the kernel only reads through it.
    message.msg_iov = buffers.as_ptr().cast_mut().cast();
    message.msg_iovlen = buffers.len() as _;
    // SAFETY: the message points at `buffers`, borrowed for the call, with their true sizes.
    cvt(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) })
}

/// Which half shutdown(2) closes.
#[derive(Debug, Clone, Copy)]
pub enum Half {
    Write,
    Both,
}

pub fn shutdown(socket: BorrowedFd<'_>, half: Half) -> io::Result<()> {
    let how = match half {
        Half::Write => libc::SHUT_WR,
        Half::Both => libc::SHUT_RDWR,
    };
    // SAFETY: no memory is passed.
    cvt(unsafe { libc::shutdown(socket.as_raw_fd(), how) }).map(drop)
}

/// Bytes that the peer has not acknowledged (SIOCOUTQ, tcp(7)); ENOTCONN when it never will, because it has reset the
/// connection: the queue's own count stays what it was then.
pub fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<usize> {
    SockRef::from(&socket).peer_addr()?;
    ioctl_int(socket, libc::TIOCOUTQ)
}

/// Bytes in the send queue that were never sent (SIOCOUTQNSD, linux/sockios.h).
pub fn unsent(socket: BorrowedFd<'_>) -> io::Result<usize> {
    const SIOCOUTQNSD: libc::c_ulong = 0x894b;
    ioctl_int(socket, SIOCOUTQNSD)
}

/// What TCP_INFO says of a connection, as far as it is looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// The largest packet on the way to the peer.
    pub path_mtu_bytes: u32,
    pub rtt_us: u32,
    pub retransmits: u32,
    /// Payload since the connection began.
    pub bytes_acked: u64,
    pub bytes_received: u64,
}

/// Places in `struct tcp_info` (include/uapi/linux/tcp.h) in words of 4 bytes; libc's own definition ends before.
const TCP_INFO_PMTU: usize = 15;
const TCP_INFO_RTT: usize = 17;
const TCP_INFO_RETRANSMITS: usize = 25;
const TCP_INFO_ACKED: usize = 30;
const TCP_INFO_RECEIVED: usize = 32;
const TCP_INFO_WORDS: usize = 34;

pub fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<TcpInfo> {
    let mut words = [0_u32; TCP_INFO_WORDS];
    let mut len = size_of_val(&words) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of the array, which outlives the call.
    let r = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, words.as_mut_ptr().cast(), &mut len)
    };
    cvt(r)?;
    let long = |at: usize| u64::from(words[at]) | u64::from(words[at + 1]) << 32;
    Ok(TcpInfo {
        path_mtu_bytes: words[TCP_INFO_PMTU],
        rtt_us: words[TCP_INFO_RTT],
        retransmits: words[TCP_INFO_RETRANSMITS],
        bytes_acked: long(TCP_INFO_ACKED),
        bytes_received: long(TCP_INFO_RECEIVED),
    })
}

/// Bytes in the receive queue (FIONREAD).
pub fn readable_bytes(socket: BorrowedFd<'_>) -> io::Result<usize> {
    ioctl_int(socket, libc::FIONREAD)
}

fn ioctl_int(socket: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<usize> {
    let mut value: libc::c_int = 0;
    // SAFETY: these requests write one int (tcp(7)), and `value` outlives the call.
    cvt(unsafe { libc::ioctl(socket.as_raw_fd(), request as _, &mut value) })?;
    Ok(usize::try_from(value).unwrap_or(0))
}

/// Takes and clears the pending error (SO_ERROR): after it an alert can still be sent on a TLS socket.
pub fn take_error(socket: BorrowedFd<'_>) -> io::Result<Option<io::Error>> {
    let code = get_int(socket, libc::SOL_SOCKET, libc::SO_ERROR)?;
    Ok((code != 0).then(|| io::Error::from_raw_os_error(code)))
}

/// SO_RCVLOWAT: a poll reports the socket readable from this many bytes on.
pub fn set_receive_low_water(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    set_int(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, i32::try_from(bytes).unwrap_or(i32::MAX))
}

/// TCP_NOTSENT_LOWAT: caps what lies unsent in the send queue, so that a stalled reader holds no more.
pub fn set_unsent_limit(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    set_int(socket, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, i32::try_from(bytes).unwrap_or(i32::MAX))
}

const SO_BUF_LOCK: i32 = 72;

/// Keeps the receive buffer at its size, whatever is read (SO_BUF_LOCK, Linux 5.14).
pub fn lock_receive_buffer(socket: BorrowedFd<'_>) -> io::Result<()> {
    const SOCK_RCVBUF_LOCK: i32 = 2;
    set_int(socket, libc::SOL_SOCKET, SO_BUF_LOCK, SOCK_RCVBUF_LOCK)
}

/// Lets the kernel adapt the receive buffer to what is read again, from at least this many bytes on, as far as
/// net.core.rmem_max allows.
///
/// While it was locked the kernel went on to measure, and it grows a buffer only when a round trip brings more than any
/// before (tcp_rcv_space_adjust in net/ipv4/tcp_input.c): more than the locked window never comes. So unlocking pushes
/// the window open, once.
pub fn unlock_receive_buffer(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let wanted = i32::try_from(bytes).unwrap_or(i32::MAX);
    // The kernel doubles what is asked for, for its own structures, and tells the double.
    if get_int(socket, libc::SOL_SOCKET, libc::SO_RCVBUF)? < wanted {
        set_int(socket, libc::SOL_SOCKET, libc::SO_RCVBUF, wanted)?;
        // A unix socket has no window.
        let _ = set_int(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, wanted);
    }
    set_int(socket, libc::SOL_SOCKET, SO_BUF_LOCK, 0)
}

pub fn set_nodelay(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_int(socket, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)
}

/// SO_LINGER 0: the close that follows is a reset.
pub fn reset_on_close(socket: BorrowedFd<'_>) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    set_option(socket, libc::SOL_SOCKET, libc::SO_LINGER, &linger)
}

/// Drops every SYN that reaches this listener from now on; handshakes that it has answered go on.
///
/// The filter (classic BPF, socket(7)) sees the segment from the TCP header on; byte 13 holds the flags.
pub fn refuse_new_connections(listener: BorrowedFd<'_>) -> io::Result<()> {
    const SYN: u32 = 0x02;
    const SYN_ACK: u32 = 0x12;
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 13),
        op(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, SYN_ACK),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, SYN),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    set_option(listener, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)
}

fn set_int(socket: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_option(socket, level, name, &value)
}

pub(super) fn set_option<T>(socket: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads size_of::<T>() bytes of `value`; every caller passes the plain C type of that option.
    let r = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const *value).cast(), size_of::<T>() as libc::socklen_t)
    };
    cvt(r).map(drop)
}

fn get_int(socket: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` and `len` outlive the call and `len` is the size of `value`.
    let r = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &mut len) };
    cvt(r)?;
    Ok(value)
}

/// poll(2) without waiting: the events that are there now.
pub fn poll_now(socket: BorrowedFd<'_>, events: i16) -> io::Result<i16> {
    let mut entry = libc::pollfd { fd: socket.as_raw_fd(), events, revents: 0 };
    // SAFETY: one entry, which outlives the call.
    cvt(unsafe { libc::poll(&mut entry, 1, 0) })?;
    Ok(entry.revents)
}

/// Watches a socket with the runtime's epoll, for edges.
pub fn watch_edges(socket: Rc<OwnedFd>) -> io::Result<AsyncFd<Rc<OwnedFd>>> {
    // SAFETY: the descriptor stays open and the same as long as the AsyncFd lives, which holds its owner.
    let watch = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE | Interest::WRITABLE) };
    watch.map_err(io::Error::from)
}

pub fn is_again(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
