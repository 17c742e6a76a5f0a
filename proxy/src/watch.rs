//! Time on one worker: a coarse clock, and one deadline for each connection.
//!
//! A timer for each connection and each byte would cost more than the byte. So activity only notes the time of a
//! clock that ticks every `TICK_MS`, and the tick looks through the connections for deadlines that have passed.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::task::Waker;
use std::time::{Duration, Instant};

/// Resolution of every timeout of the data path, in milliseconds: half a second late on 10 s harms nobody, and a
/// pass over 100,000 connections takes about a millisecond.
pub const TICK_MS: u64 = 250;

/// Why a watch woke its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    TimedOut,
    /// The drain is over.
    Cut,
}

/// What a connection knows of the clock's next tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tick {
    Unasked,
    Asked,
    Come,
}

/// One connection's deadline.
pub struct Watch {
    clock: Rc<Clock>,
    deadline_ms: Cell<u64>,
    allowance_ms: Cell<u64>,
    verdict: Cell<Option<Verdict>>,
    tick: Cell<Tick>,
    waker: RefCell<Option<Waker>>,
    /// Where the clock keeps it.
    slot: Cell<u32>,
}

impl Watch {
    /// From now on, `touch` allows this much time.
    pub fn allow(&self, time: Duration) {
        self.allowance_ms.set(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        self.touch();
    }

    /// As `allow`, unless less is allowed already.
    pub fn allow_at_most(&self, time: Duration) {
        let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        if ms < self.allowance_ms.get() {
            self.allow(time);
        }
    }

    /// Something moved: the time starts again. The clock may be a tick behind, and nobody's time is cut short by it.
    pub fn touch(&self) {
        let allowed = self.allowance_ms.get().saturating_add(TICK_MS);
        self.deadline_ms.set(self.clock.now_ms.get().saturating_add(allowed));
    }

    pub fn verdict(&self) -> Option<Verdict> {
        self.verdict.get()
    }

    /// Whether the clock has ticked since this was first asked; the tick wakes who has asked. For what is not worth its
    /// cost to a wait that is over soon.
    pub fn has_ticked(&self) -> bool {
        if self.tick.get() == Tick::Unasked {
            self.tick.set(Tick::Asked);
        }
        self.tick.get() == Tick::Come
    }

    /// The process drains: who waits for something new to begin need not.
    pub fn is_draining(&self) -> bool {
        self.clock.draining.get()
    }

    /// Wakes this task when there is a verdict.
    pub fn register(&self, waker: &Waker) {
        let mut slot = self.waker.borrow_mut();
        if !slot.as_ref().is_some_and(|w| w.will_wake(waker)) {
            *slot = Some(waker.clone());
        }
    }

    /// The time was used up in one stage and a later one has its own.
    pub fn forgive(&self) {
        if self.verdict.get() == Some(Verdict::TimedOut) {
            self.verdict.set(None);
        }
    }

    fn pronounce(&self, verdict: Verdict) {
        self.verdict.set(Some(verdict));
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.clock.remove(self.slot.get() as usize);
    }
}

/// The worker's clock and its watches.
pub struct Clock {
    started: Instant,
    now_ms: Cell<u64>,
    slots: RefCell<Slots>,
    draining: Cell<bool>,
    cut: Cell<bool>,
}

#[derive(Default)]
struct Slots {
    watches: Vec<Option<Weak<Watch>>>,
    free: Vec<usize>,
}

impl Clock {
    pub fn new() -> Rc<Self> {
        Rc::new(Self {
            started: Instant::now(),
            now_ms: Cell::new(0),
            slots: RefCell::default(),
            draining: Cell::new(false),
            cut: Cell::new(false),
        })
    }

    pub fn watch(self: &Rc<Self>, time: Duration) -> Rc<Watch> {
        let watch = Rc::new(Watch {
            clock: self.clone(),
            deadline_ms: Cell::new(0),
            allowance_ms: Cell::new(0),
            tick: Cell::new(Tick::Unasked),
            verdict: Cell::new(self.cut.get().then_some(Verdict::Cut)),
            waker: RefCell::default(),
            slot: Cell::new(0),
        });
        let mut slots = self.slots.borrow_mut();
        let slot = match slots.free.pop() {
            Some(slot) => slot,
            None => {
                slots.watches.push(None);
                slots.watches.len() - 1
            }
        };
        slots.watches[slot] = Some(Rc::downgrade(&watch));
        // Far more connections than descriptors.
        watch.slot.set(u32::try_from(slot).expect("fewer than 2^32 connections"));
        watch.allow(time);
        watch
    }

    fn remove(&self, slot: usize) {
        let mut slots = self.slots.borrow_mut();
        slots.watches[slot] = None;
        slots.free.push(slot);
    }

    /// Notes the time and wakes those whose deadline has passed.
    pub fn tick(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.now_ms.set(now);
        self.each(|watch| {
            if watch.verdict.get().is_none() && watch.deadline_ms.get() <= now {
                watch.pronounce(Verdict::TimedOut);
            }
            if watch.tick.get() == Tick::Asked {
                watch.tick.set(Tick::Come);
                watch.wake();
            }
        });
    }

    /// Tells every connection that the process drains.
    pub fn drain(&self) {
        self.draining.set(true);
        self.each(Watch::wake);
    }

    /// Ends every connection, those to come included.
    pub fn cut_all(&self) {
        self.cut.set(true);
        self.each(|watch| watch.pronounce(Verdict::Cut));
    }

    fn each(&self, f: impl Fn(&Watch)) {
        // A waker only queues its task, so no connection runs, and none is removed, while the slots are borrowed.
        for watch in self.slots.borrow().watches.iter().flatten() {
            if let Some(watch) = watch.upgrade() {
                f(&watch);
            }
        }
    }
}
