//! One thread, one ring, its own listeners: accepts connections and runs each to its end.

use crate::config::{Config, Listener};
use crate::observe::counters::Counters;
use crate::probe::Kernel;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What the data path needs of one configuration. Immutable; a reload sends a new one.
#[derive(Clone)]
pub struct Snapshot {
    pub config: Arc<Config>,
    pub tls: Arc<rustls::ServerConfig>,
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
    Drain { deadline: std::time::Instant },
}

/// A running worker.
pub struct Worker {
    pub counters: Arc<Counters>,
    commands: tokio::sync::mpsc::UnboundedSender<Command>,
    thread: std::thread::JoinHandle<()>,
}

impl Worker {
    /// Starts the thread. It inherits the caller's credentials, so privileges are dropped before.
    pub fn spawn(index: usize, snapshot: Snapshot, open: Vec<Bound>, kernel: Arc<Kernel>) -> io::Result<Self> {
        let _ = (index, snapshot, open, kernel);
        todo!()
    }

    pub fn send(&self, command: Command) {
        // A worker that is gone has nothing left to be told.
        let _ = self.commands.send(command);
    }

    /// Waits for the end of a drain.
    pub fn join(self) -> std::thread::Result<()> {
        self.thread.join()
    }
}
