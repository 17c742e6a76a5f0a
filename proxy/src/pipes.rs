//! One worker's pipes: taken only while bytes are in flight, capped, shared out among the listeners.
//!
//! A transfer that gets none copies through a bounded buffer instead; that is counted, and costs speed, never bytes.

use crate::observe::counters::Counters;
use crate::sys::pipe::Pipe;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

/// Capacity of a pipe while less than three quarters of the cap are taken: 256 slots hold 128 KiB of records with
/// their fragments. A 64 KiB pipe costs about a tenth more CPU per byte.
const LARGE_BYTES: usize = 1 << 20;
/// Capacity after that, and the least into which anything is spliced: a whole record fits.
const SMALL_BYTES: usize = 64 << 10;

/// The pool of one worker.
pub struct Pipes {
    cap_bytes: Cell<usize>,
    made_bytes: Cell<usize>,
    large: RefCell<Vec<Pipe>>,
    small: RefCell<Vec<Pipe>>,
    counters: Arc<Counters>,
}

/// What one listener may hold of a pool.
pub struct Share {
    pool: Rc<Pipes>,
    cap_bytes: Cell<usize>,
    held_bytes: Cell<usize>,
}

impl Pipes {
    pub fn new(cap_bytes: usize, counters: Arc<Counters>) -> Rc<Self> {
        Rc::new(Self {
            cap_bytes: Cell::new(cap_bytes),
            made_bytes: Cell::new(0),
            large: RefCell::default(),
            small: RefCell::default(),
            counters,
        })
    }

    pub fn set_cap(&self, bytes: usize) {
        self.cap_bytes.set(bytes);
    }

    fn take(&self) -> Option<Pipe> {
        if let Some(pipe) = self.large.borrow_mut().pop() {
            return Some(pipe);
        }
        let (cap, made) = (self.cap_bytes.get(), self.made_bytes.get());
        if made + LARGE_BYTES <= cap / 4 * 3
            && let Some(pipe) = self.make(LARGE_BYTES)
        {
            return Some(pipe);
        }
        if let Some(pipe) = self.small.borrow_mut().pop() {
            return Some(pipe);
        }
        if made + SMALL_BYTES <= cap { self.make(SMALL_BYTES) } else { None }
    }

    /// `None`: the kernel gives less than a record needs (pipe(7), `fs.pipe-user-pages-soft`).
    fn make(&self, bytes: usize) -> Option<Pipe> {
        let pipe = Pipe::new(bytes).ok().filter(|p| p.capacity() >= SMALL_BYTES)?;
        self.made_bytes.set(self.made_bytes.get() + pipe.capacity());
        self.counters.pipe_bytes.add(pipe.capacity() as u64);
        Some(pipe)
    }

    fn put(&self, pipe: Pipe) {
        if self.made_bytes.get() > self.cap_bytes.get() {
            return self.lose(pipe.capacity());
        }
        let list = if pipe.capacity() >= LARGE_BYTES { &self.large } else { &self.small };
        list.borrow_mut().push(pipe);
    }

    fn lose(&self, capacity: usize) {
        self.made_bytes.set(self.made_bytes.get() - capacity);
        self.counters.pipe_bytes.sub(capacity as u64);
    }
}

impl Share {
    pub fn new(pool: Rc<Pipes>, cap_bytes: usize) -> Rc<Self> {
        Rc::new(Self { pool, cap_bytes: Cell::new(cap_bytes), held_bytes: Cell::new(0) })
    }

    pub fn set_cap(&self, bytes: usize) {
        self.cap_bytes.set(bytes);
    }

    /// An empty pipe, unless the cap, the share or the kernel say no.
    pub fn take(self: &Rc<Self>) -> Option<Taken> {
        let pipe = if self.held_bytes.get() < self.cap_bytes.get() { self.pool.take() } else { None };
        let Some(pipe) = pipe else {
            self.pool.counters.pipe_denied.add(1);
            return None;
        };
        self.held_bytes.set(self.held_bytes.get() + pipe.capacity());
        Some(Taken { pipe: Some(Rc::new(pipe)), share: self.clone(), bytes: 0 })
    }
}

/// A pipe in use, with what it holds. Dropped empty it goes back to the pool; otherwise it is closed.
pub struct Taken {
    /// Present until dropped; shared with a splice that is in flight on the ring.
    pipe: Option<Rc<Pipe>>,
    share: Rc<Share>,
    /// In the pipe now.
    pub bytes: usize,
}

impl Taken {
    pub fn pipe(&self) -> &Rc<Pipe> {
        self.pipe.as_ref().expect("present until dropped")
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Some(pipe) = self.pipe.take() else { return };
        let capacity = pipe.capacity();
        self.share.held_bytes.set(self.share.held_bytes.get() - capacity);
        match Rc::try_unwrap(pipe) {
            Ok(pipe) if self.bytes == 0 => self.share.pool.put(pipe),
            // Closed here, or by the splice in flight when it ends.
            Ok(_) | Err(_) => self.share.pool.lose(capacity),
        }
    }
}
