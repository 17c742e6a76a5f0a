//! Readiness of sockets, and splices that the ring runs.
//!
//!   want bytes ──▶ arm POLL_ADD ──▶ (submitted when the thread parks) ──▶ completion ──▶ `readable`
//!             └──▶ after some of these: registered with the runtime's epoll, once ──▶ edge ──▶ `readable`
//!
//! An operation in flight holds the socket open, and dropping its future cancels nothing: so a `Sock` is cancelled
//! before it is dropped, or the descriptor outlives the connection.

use crate::observe::sockets::Tally;
use crate::send_room::{Room, SendMemory};
use crate::sys::pipe::Pipe;
use crate::sys::socket::{Follow, Half, poll_now, shutdown, watch_edges};
use io_uring::squeue::Flags;
use io_uring::types::{CancelBuilder, Fd};
use io_uring::{cqueue, opcode};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_uring::{InFlightOneshot, OneshotOutputTransform, UnsubmittedOneshot};

/// The completion's result; the data kept alive by the operation is dropped.
struct ResultOf<D>(std::marker::PhantomData<D>);

impl<D> OneshotOutputTransform for ResultOf<D> {
    type Output = io::Result<usize>;
    type StoredData = D;
    fn transform_oneshot_output(self, _: D, cqe: cqueue::Entry) -> io::Result<usize> {
        usize::try_from(cqe.result()).map_err(|_| io::Error::from_raw_os_error(-cqe.result()))
    }
}

type Op<D> = InFlightOneshot<D, ResultOf<D>>;

fn submit<D: Unpin + 'static>(keep: D, sqe: io_uring::squeue::Entry) -> Op<D> {
    UnsubmittedOneshot::new(keep, ResultOf(std::marker::PhantomData), sqe).submit()
}

/// A non-blocking socket and what is known of its readiness.
pub struct Sock {
    fd: Rc<OwnedFd>,
    reading: Option<Reading>,
    /// Waits for reading that went through the ring.
    ring_waits: u8,
    /// See `Reading`.
    by_level: bool,
    writing: Option<Writing>,
    /// The peer has sent its FIN, as a poll told.
    half_closed: bool,
    /// See `Reading` and `Writing`.
    epoll: Option<Box<AsyncFd<Rc<OwnedFd>>>>,
    /// What `arm_reset` waits for has come.
    is_reset: bool,
    watches_reset: bool,
    /// Something was armed since it was last taken up.
    newly_armed: bool,
    /// A read may give something. Cleared by whoever saw EAGAIN or a short read.
    pub readable: bool,
    /// A write may take something. Cleared by whoever saw EAGAIN.
    pub writable: bool,
    /// Behind what is sent from now on.
    pub follow: Follow,
    /// The FIN is out, or behind what is queued.
    is_finished: bool,
    /// A client's: where more room in the send queue comes from, and what it has of it.
    room: Option<Box<Room>>,
    /// Counts an upstream's bytes where the kernel does not.
    pub tally: Tally,
}

/// How a wake-up for reading comes.
///
/// The ring takes an operation for each wait, and nothing beside for a connection that waits twice. One that goes on, as
/// where request follows request, is registered with the runtime's own epoll for edges: two system calls once, and none
/// for a wait. An edge is taken off before the socket is read, and `readable` stays until a read finds the queue empty, so
/// none is lost. Kernel TLS reads records, not queues, and says nothing new of a record that was there before: `by_level`.
enum Reading {
    Ring(Op<Rc<OwnedFd>>),
    Epoll {
        /// The connection's task is the one to be woken, and has not been since.
        registered: bool,
    },
}

/// Where a poll of a connection looks for what has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// At all that is armed: the first time in this poll.
    All,
    /// At what was armed since. The thread takes up events between two polls, so within one nothing else can have come.
    New,
}

/// Waits through the ring before a socket is registered with epoll.
const RING_WAITS: u8 = 8;

/// How a wake-up for writing comes.
///
/// POLL_ADD adds POLLRDHUP to every mask (IO_POLL_UNMASK in io_uring/poll.c): on a socket whose peer has sent its FIN
/// it completes at once, for ever, full or not. There the runtime's own epoll waits instead, for edges: it is asked for
/// the next one before the socket is asked, so that none is lost.
enum Writing {
    Ring(Op<Rc<OwnedFd>>),
    Epoll,
}

impl Sock {
    pub fn new(fd: OwnedFd, tally: Tally) -> Self {
        Self {
            fd: Rc::new(fd),
            reading: None,
            ring_waits: 0,
            by_level: false,
            writing: None,
            half_closed: false,
            epoll: None,
            is_reset: false,
            watches_reset: false,
            newly_armed: false,
            readable: true,
            writable: true,
            follow: Follow::Unknown,
            is_finished: false,
            room: None,
            tally,
        }
    }

    /// Lets the send queue of this client, and what it receives from the upstream, grow out of a budget.
    pub fn draw_on(&mut self, memory: Rc<SendMemory>, upstream: &Self) {
        match &mut self.room {
            Some(room) => room.follow(&upstream.fd),
            None => self.room = Some(Box::new(Room::new(memory, &upstream.fd))),
        }
    }

    /// There is much for this client: from now on its queue, and what is received for it, have limits.
    pub fn limit_room(&mut self) {
        if let Some(room) = &mut self.room {
            room.limit(&self.fd);
        }
    }

    /// Takes up an EAGAIN of a write: true when there is room now and it is worth trying again.
    pub fn is_full(&mut self) -> bool {
        self.writable = self.widen();
        !self.writable
    }

    /// Bytes that are worth having ready for this client; `None`: its queue has to become shorter first.
    pub fn room_bytes(&self) -> Option<usize> {
        self.room.as_ref().map_or(Some(usize::MAX), |room| room.left_bytes(&self.fd))
    }

    /// True when there is more room now than there was.
    pub fn widen(&mut self) -> bool {
        self.room.as_mut().is_some_and(|room| room.widen(&self.fd))
    }

    /// The send queue may be long: this client has read much.
    pub fn is_wide(&self) -> bool {
        self.room.as_ref().is_some_and(|room| room.is_wide())
    }

    /// The descriptor for as long as the socket is open, for those who look on.
    pub fn watched(&self) -> Weak<OwnedFd> {
        Rc::downgrade(&self.fd)
    }

    /// Sends the FIN behind everything, once.
    pub fn finish(&mut self) {
        if !std::mem::replace(&mut self.is_finished, true) {
            // A peer that is gone has no need of it.
            let _ = shutdown(self.fd(), Half::Write);
        }
    }

    /// To be told by whoever has read from an upstream.
    pub fn received(&self, bytes: usize) {
        self.tally.moved(bytes as u64, 0);
    }

    /// To be told by whoever has written.
    pub fn sent(&self, bytes: usize) {
        self.tally.moved(0, bytes as u64);
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Asks for a wake-up when the socket is readable, unless one is asked for already.
    pub fn arm_read(&mut self) {
        if self.reading.is_none() {
            self.reading = Some(self.wait_to_read());
            self.newly_armed = true;
        }
    }

    /// Whoever reads from now on may leave something unread and clear `readable` all the same.
    pub fn read_by_level(&mut self) {
        self.by_level = true;
        if let Some(Reading::Epoll { .. }) = self.reading {
            self.reading = None;
        }
        if !matches!(self.writing, Some(Writing::Epoll)) && !self.watches_reset {
            self.epoll = None;
        }
    }

    /// Asks for a wake-up when the socket is writable, unless one is asked for already.
    pub fn arm_write(&mut self) {
        if self.writing.is_none() {
            self.writing = Some(self.wait_to_write());
            self.newly_armed = true;
        }
    }

    /// Asks for a wake-up when a peer that has sent its FIN resets the connection after all; see `is_reset`. What was
    /// shut down both ways looks the same.
    pub fn arm_reset(&mut self) {
        self.watches_reset = !self.is_reset && self.has_epoll();
        self.newly_armed = true;
    }

    pub fn is_reset(&self) -> bool {
        self.is_reset
    }

    fn wait_to_read(&mut self) -> Reading {
        if self.ring_waits == RING_WAITS && !self.by_level && self.has_epoll() {
            return Reading::Epoll { registered: false };
        }
        self.ring_waits = RING_WAITS.min(self.ring_waits + 1);
        Reading::Ring(self.poll_add(libc::POLLIN | libc::POLLRDHUP))
    }

    fn wait_to_write(&mut self) -> Writing {
        if self.half_closed && self.has_epoll() { Writing::Epoll } else { Writing::Ring(self.poll_add(libc::POLLOUT)) }
    }

    fn has_epoll(&mut self) -> bool {
        if self.epoll.is_none() {
            self.epoll = watch_edges(self.fd.clone()).ok().map(Box::new);
        }
        self.epoll.is_some()
    }

    /// Whether one of these events is there, or an error; if not, epoll wakes when something changes.
    fn poll_epoll(&self, cx: &mut Context<'_>, events: i16) -> bool {
        let Some(epoll) = &self.epoll else { return false };
        while let Poll::Ready(Ok(mut edge)) = epoll.poll_write_ready(cx) {
            if edge.ready().is_write_closed() {
                // It stays so, and there is no further edge to wait for.
                return true;
            }
            edge.clear_ready();
        }
        poll_now(self.fd(), events).is_ok_and(|now| now != 0)
    }

    /// Another task goes on with it, and is the one to be woken.
    pub fn changes_task(&mut self) {
        if let Some(Reading::Epoll { registered }) = &mut self.reading {
            *registered = false;
        }
    }

    /// Whether epoll watches this socket and has told of nothing since all was read from it: without a system call, and so
    /// blind for what has come since the thread last took up events.
    pub fn seems_silent(&self) -> bool {
        let has_edge = |epoll: &AsyncFd<_>| epoll.try_io(Interest::READABLE, |_| Ok(())).is_ok();
        !self.readable && self.epoll.as_ref().is_some_and(|epoll| !has_edge(epoll))
    }

    pub fn read_armed(&self) -> bool {
        self.reading.is_some()
    }

    fn poll_add(&self, events: i16) -> Op<Rc<OwnedFd>> {
        let sqe = opcode::PollAdd::new(Fd(self.fd.as_raw_fd()), events as u16 as u32).build();
        submit(self.fd.clone(), sqe)
    }

    /// Takes up what has completed: true if `readable` or `writable` became true.
    pub fn take_up(&mut self, cx: &mut Context<'_>) -> bool {
        self.newly_armed = false;
        let read = self.take_up_read(cx);
        let written = self.take_up_write(cx);
        self.readable |= read;
        self.writable |= written;
        if self.watches_reset && self.poll_epoll(cx, 0) {
            (self.is_reset, self.watches_reset) = (true, false);
            return true;
        }
        read | written
    }

    /// The same, where it is worth looking.
    pub fn look_up(&mut self, cx: &mut Context<'_>, look: Look) -> bool {
        (look == Look::All || self.newly_armed) && self.take_up(cx)
    }

    fn take_up_read(&mut self, cx: &mut Context<'_>) -> bool {
        // An error of the wait itself is found again, with its name, by the read that follows.
        let done = match (&mut self.reading, &self.epoll) {
            (None, _) => return false,
            (Some(Reading::Ring(op)), _) => Pin::new(op).poll(cx).is_ready(),
            (Some(Reading::Epoll { registered }), Some(epoll)) => take_read_edge(epoll, registered, cx),
            (Some(Reading::Epoll { .. }), None) => true,
        };
        if done {
            self.reading = None;
        }
        done
    }

    fn take_up_write(&mut self, cx: &mut Context<'_>) -> bool {
        loop {
            match &mut self.writing {
                None => return false,
                Some(Writing::Epoll) => {
                    let done = self.poll_epoll(cx, libc::POLLOUT);
                    if done {
                        self.writing = None;
                    }
                    return done;
                }
                Some(Writing::Ring(op)) => {
                    let Poll::Ready(events) = Pin::new(op).poll(cx) else { return false };
                    self.writing = None;
                    let only_half_closed = events.is_ok_and(|events| events == libc::POLLRDHUP as u16 as usize);
                    if !only_half_closed {
                        return true;
                    }
                    self.half_closed = true;
                    self.writing = Some(self.wait_to_write());
                }
            }
        }
    }

    /// Ends what is in flight, so that dropping this closes the socket.
    pub async fn cancel(&mut self) {
        if let Some(Writing::Epoll) = self.writing {
            self.writing = None;
        }
        if let Some(Reading::Epoll { .. }) = self.reading {
            self.reading = None;
        }
        self.epoll = None;
        // Every operation in flight holds the descriptor, those of `RingSplice` included.
        if Rc::strong_count(&self.fd) == 1 {
            return;
        }
        let all = CancelBuilder::fd(Fd(self.fd.as_raw_fd())).all();
        // ENOENT: they completed by themselves meanwhile. Either way each ends, and is waited for here.
        let _ = submit(self.fd.clone(), opcode::AsyncCancel2::new(all).build()).await;
        if let Some(Reading::Ring(op)) = self.reading.take() {
            let _ = op.await;
        }
        if let Some(Writing::Ring(op)) = self.writing.take() {
            let _ = op.await;
        }
    }
}

/// Whether something has come since this was last true; if not, epoll wakes when it does. A registered task is not
/// registered again: that costs more than to see that nothing has come.
fn take_read_edge(epoll: &AsyncFd<Rc<OwnedFd>>, registered: &mut bool, cx: &mut Context<'_>) -> bool {
    let mut has_come = false;
    // The error is how an edge is taken off.
    let _ = epoll.try_io(Interest::READABLE, |_| {
        has_come = true;
        Err::<(), _>(io::ErrorKind::WouldBlock.into())
    });
    if has_come || std::mem::replace(registered, true) {
        return has_come;
    }
    let Poll::Ready(edge) = epoll.poll_read_ready(cx) else { return false };
    if let Ok(mut edge) = edge {
        edge.clear_ready();
    }
    true
}

/// A splice that runs on the ring's worker threads. It never waits: with data or room lacking it says EAGAIN.
pub struct RingSplice(Op<(Rc<OwnedFd>, Rc<Pipe>)>);

impl RingSplice {
    /// Socket to pipe, at once.
    pub fn fill(socket: &Sock, pipe: &Rc<Pipe>, max: usize) -> Self {
        let sqe = splice(socket.fd().as_raw_fd(), pipe.writer().as_raw_fd(), max);
        Self(submit((socket.fd.clone(), pipe.clone()), sqe))
    }

    /// Pipe to socket: at once, or linked behind a POLL_ADD when the socket is not known to be writable.
    pub fn drain(pipe: &Rc<Pipe>, socket: &Sock, max: usize) -> Self {
        if !socket.writable {
            let poll = opcode::PollAdd::new(Fd(socket.fd.as_raw_fd()), libc::POLLOUT as u32).build();
            // Nobody waits for it: its completion starts the splice, its failure cancels it. Should the queue be
            // flushed between the two, the splice runs unlinked and says EAGAIN, which is as good.
            drop(submit(socket.fd.clone(), poll.flags(Flags::IO_LINK)));
        }
        let sqe = splice(pipe.reader().as_raw_fd(), socket.fd.as_raw_fd(), max);
        Self(submit((socket.fd.clone(), pipe.clone()), sqe))
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll(cx)
    }
}

fn splice(from: i32, to: i32, max: usize) -> io_uring::squeue::Entry {
    let max = u32::try_from(max).unwrap_or(u32::MAX);
    opcode::Splice::new(Fd(from), -1, Fd(to), -1, max).flags(libc::SPLICE_F_NONBLOCK).build()
}

/// The worker's next turn, after everything that is ready now and after the ring was looked at.
///
/// Waking oneself would not do: what is queued for the ring goes out when the thread parks, and a connection that
/// always has more would keep it from that. So this is an operation on the ring itself.
pub struct NextTurn(Op<()>);

impl NextTurn {
    pub fn new() -> Self {
        Self(submit((), opcode::Nop::new().build()))
    }
}

impl Default for NextTurn {
    fn default() -> Self {
        Self::new()
    }
}

impl Future for NextTurn {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.0).poll(cx).map(drop)
    }
}
