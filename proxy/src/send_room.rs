//! What a reader may make the kernel hold: a little for each client, more for those that take it, out of one budget.
//!
//!   the client has taken much ─▶ widen ─▶ both queues long, until the tick finds the client's short again
//!
//! A fast reader needs about a megabyte ready in its queue, or it waits for bytes that were there (a third more CPU on
//! bulk), and the upstream's receive buffer grows with it. A thousand that read nothing would hold gigabytes so, and past
//! `net.ipv4.tcp_mem` the kernel slows every connection of the host. So each has `OWN_BYTES` in the client's send queue, from
//! its first large answer on, and the kernel's first receive buffer at the upstream; what is beyond has to be earned by
//! reading, and comes out of `limits.send_memory`.

use crate::sys::socket;
use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::{Rc, Weak};

/// Bytes that may lie unsent in the send queue of any client, and as many packets if those are more.
const OWN_BYTES: usize = 32 << 10;
/// A splice marks all but its last record with MSG_MORE, and the kernel keeps less than a segment of such data back. The
/// socket is writable below half of the limit (tcp_stream_memory_free in net/ipv4/tcp.c), so the half has to be more than
/// a segment, or nothing moves any more. A packet is a segment and its headers; only those of loopback have 64 KiB.
const OWN_PACKETS: usize = 2;
/// The same for a client that reads, while the budget lasts.
const WIDE_BYTES: usize = 1 << 20;
/// Bytes that a client has to acknowledge before, and after which a direction looks whether it has.
pub const WIDE_AFTER_BYTES: u64 = 256 << 10;

/// One worker's budget.
pub struct SendMemory {
    cap_bytes: Cell<usize>,
    taken_bytes: Cell<usize>,
    wide: RefCell<Vec<Weak<Wide>>>,
}

/// Where one client's room comes from, and whose bytes it is for.
pub struct Room {
    memory: Rc<SendMemory>,
    /// What the queue may hold unsent; none: it has not been limited yet, as it never held much.
    own_bytes: Option<usize>,
    upstream: Weak<OwnedFd>,
    upstream_is_limited: bool,
    wide: Option<Rc<Wide>>,
}

/// Queues that may be long, until the client's was found short.
struct Wide {
    memory: Rc<SendMemory>,
    own_bytes: usize,
    client: Weak<OwnedFd>,
    upstream: Weak<OwnedFd>,
    over: Cell<bool>,
}

impl SendMemory {
    pub fn new(cap_bytes: usize) -> Rc<Self> {
        Rc::new(Self { cap_bytes: Cell::new(cap_bytes), taken_bytes: Cell::new(0), wide: RefCell::default() })
    }

    pub fn set_cap(&self, bytes: usize) {
        self.cap_bytes.set(bytes);
    }

    /// So many bytes more would still fit.
    pub fn has(&self, bytes: usize) -> bool {
        self.taken_bytes.get().saturating_add(bytes) <= self.cap_bytes.get()
    }

    /// Takes back what short queues do not need.
    pub fn tick(&self) {
        self.wide.borrow_mut().retain(|wide| wide.upgrade().is_some_and(|wide| !wide.narrow()));
    }
}

impl Room {
    /// Nothing is limited before `limit`: most clients never get more than a few records.
    pub fn new(memory: Rc<SendMemory>, upstream: &Rc<OwnedFd>) -> Self {
        Self { memory, own_bytes: None, upstream: Rc::downgrade(upstream), upstream_is_limited: false, wide: None }
    }

    /// The client gets its own, and the upstream's receive buffer stays as it is until the client takes more.
    pub fn limit(&mut self, client: &Rc<OwnedFd>) -> usize {
        if !self.upstream_is_limited && !self.is_wide() {
            self.upstream_is_limited = true;
            if let Some(upstream) = self.upstream.upgrade() {
                let _ = socket::lock_receive_buffer(upstream.as_fd());
            }
        }
        *self.own_bytes.get_or_insert_with(|| {
            let packet = socket::tcp_info(client.as_fd()).map_or(0, |info| info.path_mtu_bytes as usize);
            let own_bytes = OWN_BYTES.max(packet * OWN_PACKETS);
            let _ = socket::set_unsent_limit(client.as_fd(), own_bytes);
            own_bytes
        })
    }

    /// Goes on with another upstream, which `limit` limits when it says much.
    pub fn follow(&mut self, upstream: &Rc<OwnedFd>) {
        self.upstream = Rc::downgrade(upstream);
        self.upstream_is_limited = false;
    }

    /// The queues may be long.
    pub fn is_wide(&self) -> bool {
        self.wide.as_ref().is_some_and(|wide| !wide.over.get())
    }

    /// What the client's queue still takes, or nothing until the kernel calls it writable again, which is below half of
    /// its limit. One that is empty has no measure: how much goes out at once only the kernel knows.
    pub fn left_bytes(&self, client: &Rc<OwnedFd>) -> Option<usize> {
        let limit = if self.is_wide() { WIDE_BYTES } else { self.own_bytes.unwrap_or(OWN_BYTES) };
        match socket::unsent(client.as_fd()) {
            Ok(0) | Err(_) => Some(usize::MAX),
            Ok(unsent) if unsent < limit / 2 => Some(limit - unsent),
            Ok(_) => None,
        }
    }

    /// Lets the queues become longer, and tells whether they did. No: they are already, the client has not read enough
    /// for that, or the budget is used up.
    pub fn widen(&mut self, client: &Rc<OwnedFd>) -> bool {
        if self.is_wide() {
            return false;
        }
        let own_bytes = self.limit(client);
        let memory = &self.memory;
        if !memory.has(WIDE_BYTES)
            || socket::tcp_info(client.as_fd()).is_ok_and(|info| info.bytes_acked < WIDE_AFTER_BYTES)
            || socket::set_unsent_limit(client.as_fd(), WIDE_BYTES).is_err()
        {
            return false;
        }
        if let Some(upstream) = self.upstream.upgrade() {
            let _ = socket::unlock_receive_buffer(upstream.as_fd(), WIDE_BYTES);
        }
        memory.taken_bytes.set(memory.taken_bytes.get() + WIDE_BYTES);
        let (client, upstream) = (Rc::downgrade(client), self.upstream.clone());
        let memory = memory.clone();
        let wide = Rc::new(Wide { memory, own_bytes, client, upstream, over: Cell::new(false) });
        self.memory.wide.borrow_mut().push(Rc::downgrade(&wide));
        self.wide = Some(wide);
        true
    }
}

impl Wide {
    /// True when both are as they were.
    fn narrow(&self) -> bool {
        let Some(client) = self.client.upgrade() else { return true };
        let short = socket::unsent(client.as_fd()).is_ok_and(|bytes| bytes < self.own_bytes);
        if short && socket::set_unsent_limit(client.as_fd(), self.own_bytes).is_ok() {
            if let Some(upstream) = self.upstream.upgrade() {
                let _ = socket::lock_receive_buffer(upstream.as_fd());
            }
            self.give_back();
        }
        self.over.get()
    }

    fn give_back(&self) {
        if !self.over.replace(true) {
            self.memory.taken_bytes.set(self.memory.taken_bytes.get() - WIDE_BYTES);
        }
    }
}

impl Drop for Wide {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
        (listener.accept().expect("accepts").0, client)
    }

    /// A sender and its reader, who has taken this much.
    fn reading(bytes: u64) -> (Rc<OwnedFd>, TcpStream) {
        let (mut sender, mut reader) = pair();
        let mut into = vec![0; 1 << 16];
        for _ in 0..bytes.div_ceil(1 << 16) {
            sender.write_all(&into).expect("room for one chunk");
            reader.read_exact(&mut into).expect("the chunk");
        }
        sender.set_nonblocking(true).expect("a socket");
        (Rc::new(OwnedFd::from(sender)), reader)
    }

    #[test]
    fn a_client_that_has_read_nothing_gets_nothing() {
        let memory = SendMemory::new(WIDE_BYTES);
        let (upstream, _server) = pair();
        let (client, _reader) = reading(0);
        let mut room = Room::new(memory, &Rc::new(OwnedFd::from(upstream)));
        assert!(!room.widen(&client));
    }

    #[test]
    fn the_budget_ends_and_comes_back_with_the_socket_or_by_the_tick() {
        let memory = SendMemory::new(2 * WIDE_BYTES);
        let (upstream, _server) = pair();
        let upstream = Rc::new(OwnedFd::from(upstream));
        let (full, mut reader) = reading(2 * WIDE_AFTER_BYTES);
        let (other, _peer) = reading(2 * WIDE_AFTER_BYTES);
        let [mut first, mut second, mut third] = [(); 3].map(|()| Room::new(memory.clone(), &upstream));
        assert!(first.widen(&full), "room for one");
        assert!(!first.widen(&full), "once");
        assert!(second.widen(&other), "room for two");
        assert!(!third.widen(&other), "and no third");
        drop(second);
        assert_eq!(memory.taken_bytes.get(), WIDE_BYTES);

        let mut sender = TcpStream::from(full.try_clone().expect("a descriptor"));
        let chunk = [0; 1 << 16];
        while sender.write(&chunk).is_ok() {}
        memory.tick();
        assert!(first.is_wide(), "a long queue stays wide");

        reader.set_nonblocking(true).expect("a socket");
        let mut into = vec![0; 1 << 20];
        while socket::unsent(full.as_fd()).expect("a socket") >= OWN_BYTES {
            let _ = reader.read(&mut into);
        }
        memory.tick();
        assert!(!first.is_wide());
        assert_eq!((memory.taken_bytes.get(), memory.wide.borrow().len()), (0, 0));
        drop(first);
        assert_eq!(memory.taken_bytes.get(), 0, "given back once");
    }
}
