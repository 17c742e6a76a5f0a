//! One thread, one ring, its own listeners: accepts connections and runs each to its end.
//!
//!   commands ─▶ reload: open, adjust, retire listeners        listener ─▶ accept until EAGAIN ─▶ serve (a task each)
//!            └▶ drain: retire all, wait, cut at the deadline

use crate::accept::{Listening, accept_loop, retire};
use crate::config::{Config, Listener, SpliceMode};
use crate::observe::counters::Counters;
use crate::observe::live::Connection;
use crate::observe::maps::Maps;
use crate::observe::sockets::Sockets;
use crate::pipes::{Pipes, Share};
use crate::probe::Kernel;
use crate::relay::flow::Splicer;
use crate::relay::{self, Scratch, Ways};
use crate::send_room::SendMemory;
use crate::tls::policy::Negotiation;
use crate::upstream::pool::Pool;
use crate::watch::{Clock, TICK_MS};
use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

/// Entries of the submission queue: one turn of a busy worker. A full one is flushed early, never refused.
const RING_ENTRIES: u32 = 1024;
/// How often a draining worker looks whether its last connection has ended.
const DRAIN_INTERVAL: Duration = Duration::from_millis(10);
/// What connections may take to end themselves once they were cut.
const CUT_GRACE: Duration = Duration::from_millis(500);

/// What the data path needs of one configuration. Immutable; a reload sends a new one.
#[derive(Clone)]
pub struct Snapshot {
    pub config: Arc<Config>,
    pub tls: Negotiation,
    /// The same for listeners of mode http: they speak HTTP/1.1, whatever other listeners offer.
    pub http_tls: Negotiation,
}

impl Snapshot {
    pub fn new(config: Arc<Config>, tls: Negotiation) -> Self {
        let mut http = rustls::ServerConfig::clone(&tls.config);
        http.alpn_protocols = vec![b"http/1.1".to_vec()];
        let http_tls = Negotiation { config: Arc::new(http), ..tls.clone() };
        Self { config, tls, http_tls }
    }
}

/// A bound, listening socket (SO_REUSEPORT, non-blocking) of one worker.
pub struct Bound {
    pub listener: Arc<Listener>,
    pub socket: OwnedFd,
}

/// What control tells a worker.
pub enum Command {
    /// New connections use this; `open` starts to accept; listeners whose address is not in the snapshot accept
    /// until EAGAIN and close; connections in flight keep what they started with.
    Reload { snapshot: Snapshot, open: Vec<Bound> },
    /// Accept until nothing is queued, close the listeners, end when the last connection has, or cut them at the deadline.
    Drain { deadline: Instant },
    /// Tell of at most so many connections.
    List { limit: usize, answer: oneshot::Sender<Vec<Connection>> },
}

/// A running worker.
pub struct Worker {
    pub counters: Arc<Counters>,
    commands: UnboundedSender<Command>,
    thread: std::thread::JoinHandle<()>,
}

impl Worker {
    /// Starts the thread. It inherits the caller's credentials, so privileges are dropped before.
    pub fn spawn(
        index: usize,
        snapshot: Snapshot,
        open: Vec<Bound>,
        kernel: Arc<Kernel>,
        maps: Option<Arc<Maps>>,
    ) -> io::Result<Self> {
        let counters = Arc::new(Counters::default());
        let (commands, receiver) = unbounded_channel();
        let (started, has_started) = std::sync::mpsc::channel();
        let counted = counters.clone();
        let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || match runtime() {
            Ok(runtime) => {
                let _ = started.send(Ok(()));
                runtime.block_on(run(snapshot, open, (kernel, maps), counted, receiver));
            }
            Err(e) => drop(started.send(Err(e))),
        })?;
        let dead = |_| Err(io::Error::other("the worker's thread ended before it began"));
        has_started.recv().unwrap_or_else(dead)?;
        Ok(Self { counters, commands, thread })
    }

    pub fn send(&self, command: Command) {
        // A worker that is gone has nothing left to be told.
        let _ = self.commands.send(command);
    }

    /// For others who ask the worker something.
    pub fn line(&self) -> UnboundedSender<Command> {
        self.commands.clone()
    }

    /// The thread has ended, which without a drain means that it has died.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the end of a drain.
    pub fn join(self) -> std::thread::Result<()> {
        self.thread.join()
    }
}

fn runtime() -> io::Result<tokio_uring::Runtime> {
    let mut ring = tokio_uring::uring_builder();
    // DEFER_TASKRUN would hang: the driver waits on the ring's descriptor, and nothing sends GETEVENTS.
    ring.setup_coop_taskrun().setup_single_issuer().setup_cqsize(RING_ENTRIES * 4);
    tokio_uring::Runtime::new(tokio_uring::builder().entries(RING_ENTRIES).uring_builder(&ring))
}

/// What the tasks of one worker share.
pub struct Core {
    pub relay: Rc<relay::Worker>,
    pub clock: Rc<Clock>,
    pub pipes: Rc<Pipes>,
    pub snapshot: RefCell<Rc<Snapshot>>,
    /// Connections of this worker.
    pub live: Cell<usize>,
}

impl Core {
    fn new(snapshot: Snapshot, kernel: Arc<Kernel>, counters: Arc<Counters>, maps: Option<Arc<Maps>>) -> Rc<Self> {
        let pipes = Pipes::new(pipe_cap(&snapshot.config), counters.clone());
        Rc::new(Self {
            relay: Rc::new(relay::Worker {
                sockets: Sockets::new(maps, counters.user_endpoints.clone()),
                counters,
                ways: ways(snapshot.config.server.splice, &kernel),
                kernel,
                scratch: RefCell::new(Scratch::new()),
                send_memory: SendMemory::new(send_cap(&snapshot.config)),
                pool: Pool::default(),
            }),
            clock: Clock::new(),
            pipes,
            snapshot: RefCell::new(Rc::new(snapshot)),
            live: Cell::new(0),
        })
    }

    /// What one listener may hold of this worker's pipes: an equal share, so that none can starve another.
    fn share_cap(&self) -> usize {
        let config = &self.snapshot.borrow().config;
        pipe_cap(config) / config.listeners.len().max(1)
    }
}

fn send_cap(config: &Config) -> usize {
    config.limits.send_memory_bytes / config.server.workers.get()
}

/// As the configuration says, or as it costs less on this kernel.
fn ways(mode: SpliceMode, kernel: &Kernel) -> Ways {
    let costs = kernel.costs;
    let copies_up = costs.copies_up && kernel.opens_in_place;
    let splices = |splicer| Ways { splicer, copies_up: false, copies_short: false };
    match mode {
        SpliceMode::Auto if costs.splices_on_ring => splices(Splicer::Ring),
        SpliceMode::Auto => Ways { splicer: Splicer::Inline, copies_up, copies_short: true },
        SpliceMode::Inline => splices(Splicer::Inline),
        SpliceMode::Ring => splices(Splicer::Ring),
    }
}

fn pipe_cap(config: &Config) -> usize {
    config.limits.pipe_memory_bytes / config.server.workers.get()
}

async fn run(
    snapshot: Snapshot,
    open: Vec<Bound>,
    (kernel, maps): (Arc<Kernel>, Option<Arc<Maps>>),
    counters: Arc<Counters>,
    mut commands: UnboundedReceiver<Command>,
) {
    let core = Core::new(snapshot, kernel, counters, maps);
    tokio_uring::spawn(tick(core.clone()));
    let mut listeners: Vec<(SocketAddr, Rc<Listening>)> = Vec::new();
    start(&core, &mut listeners, open);
    while let Some(command) = commands.recv().await {
        match command {
            Command::Reload { snapshot, open } => {
                *core.snapshot.borrow_mut() = Rc::new(snapshot);
                reload(&core, &mut listeners, open);
            }
            Command::List { limit, answer } => {
                // Whoever asked may have gone.
                let _ = answer.send(core.relay.sockets.live.list(limit));
            }
            Command::Drain { deadline } => return drain(&core, listeners, deadline).await,
        }
    }
}

async fn tick(core: Rc<Core>) {
    let mut interval = tokio::time::interval(Duration::from_millis(TICK_MS));
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        interval.tick().await;
        core.clock.tick();
        core.relay.send_memory.tick();
        core.relay.pool.sweep();
    }
}

fn start(core: &Rc<Core>, listeners: &mut Vec<(SocketAddr, Rc<Listening>)>, open: Vec<Bound>) {
    for Bound { listener, socket } in open {
        let address = listener.address;
        let share = Share::new(core.pipes.clone(), core.share_cap());
        let listening = Listening::new(listener, socket, share);
        tokio_uring::spawn(accept_loop(listening.clone(), core.clone()));
        listeners.push((address, listening));
    }
}

fn reload(core: &Rc<Core>, listeners: &mut Vec<(SocketAddr, Rc<Listening>)>, open: Vec<Bound>) {
    let config = core.snapshot.borrow().config.clone();
    core.pipes.set_cap(pipe_cap(&config));
    core.relay.send_memory.set_cap(send_cap(&config));
    listeners.retain(|(address, listening)| {
        let kept = config.listeners.iter().find(|l| l.address == *address);
        match kept {
            Some(listener) => {
                listening.adjust(listener.clone(), core.share_cap());
                true
            }
            None => {
                tokio_uring::spawn(retire(listening.clone()));
                false
            }
        }
    });
    start(core, listeners, open);
}

async fn drain(core: &Rc<Core>, listeners: Vec<(SocketAddr, Rc<Listening>)>, deadline: Instant) {
    core.clock.drain();
    let retiring: Vec<_> = listeners.into_iter().map(|(_, l)| tokio_uring::spawn(retire(l))).collect();
    for one in retiring {
        let _ = one.await;
    }
    while core.live.get() > 0 && Instant::now() < deadline {
        tokio::time::sleep(DRAIN_INTERVAL).await;
    }
    if core.live.get() > 0 {
        tracing::warn!(connections = core.live.get(), "the drain is over: cutting what is left");
        core.clock.cut_all();
        let cut = Instant::now();
        while core.live.get() > 0 && cut.elapsed() < CUT_GRACE {
            tokio::time::sleep(DRAIN_INTERVAL).await;
        }
    }
}
