//! Everything that is not the data path: start, signals, reload, drain, and the admin endpoint.
//!
//!   start ─▶ ready ─▶ wait ─SIGHUP─▶ reload ─▶ wait ... ─SIGTERM, SIGINT─▶ drain ─▶ end
//!
//! One thread, an ordinary tokio runtime. It talks to the workers by messages and never touches a connection.

pub mod admin;
mod drain;
pub mod notify;
mod reload;
mod staples;
pub mod start;
pub mod upkeep;

use crate::exit::Failure;
use crate::worker::Worker;
use admin::Admin;
use notify::{State, notify};
use reload::Fresh;
use start::Terminator;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::Interval;
use upkeep::Look;

/// How often is looked whether every worker lives and every staple lasts.
const LOOK_AFTER: Duration = Duration::from_secs(1);

/// The signals that end it.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// SIGTERM or SIGINT, by name.
    async fn end(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// The runtime of the control thread.
///
/// # Errors
/// The host gives no descriptors for it.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::Host(format!("start the control thread's runtime: {e}")))
}

impl Terminator {
    /// Serves until a signal ends it, or `until` does.
    ///
    /// # Errors
    /// Signals cannot be caught, or a worker has died.
    pub async fn run<T>(mut self, until: impl Future<Output = T>) -> Result<Option<T>, Failure> {
        let uncaught = |e| Failure::Host(format!("catch signals: {e}"));
        let mut hangup = signal(SignalKind::hangup()).map_err(uncaught)?;
        let mut signals = Signals::new().map_err(uncaught)?;
        let admin = Arc::new(Admin::new(self.metrics(), self.workers.iter().map(Worker::line).collect()));
        self.serve_admin(&admin);
        self.say_ready();
        tokio::pin!(until);
        let mut reading: Option<JoinHandle<Result<Fresh, Failure>>> = None;
        let mut again = false;
        let mut look_after = tokio::time::interval(LOOK_AFTER);
        if let Some(tickets) = self.tickets.take() {
            tokio::spawn(tickets.run());
        }
        let mut looking: Option<JoinHandle<Look>> = None;
        let mut stapling = None;
        let mut next_staples = Box::pin(tokio::time::sleep(Duration::ZERO));
        let mut next_look = Box::pin(tokio::time::sleep(self.next_look()));
        let reason = loop {
            tokio::select! {
                _ = hangup.recv() => {
                    if reading.is_some() {
                        again = true;
                    } else {
                        reading = self.read_again();
                    }
                }
                read = finished(&mut reading) => {
                    reading = None;
                    self.reload(read).await;
                    if std::mem::take(&mut again) {
                        reading = self.read_again();
                    }
                }
                () = &mut next_look, if self.file.is_some() => {
                    if looking.is_some() {
                        tracing::warn!("certificates: a look takes long, the share hangs");
                        next_look = Box::pin(tokio::time::sleep(upkeep::SLOW_LOOK));
                    } else {
                        looking = Some(self.look());
                        // If it is not back by then, that is said.
                        next_look = Box::pin(tokio::time::sleep(upkeep::SLOW_LOOK));
                    }
                }
                look = finished_of(&mut looking) => {
                    looking = None;
                    if let Some(look) = look {
                        self.looked(&look);
                    }
                    next_look = Box::pin(tokio::time::sleep(self.next_look()));
                }
                () = &mut next_staples, if self.file.is_some() && stapling.is_none() => {
                    stapling = Some(self.check_staples());
                }
                checked = finished_of(&mut stapling) => {
                    stapling = None;
                    self.checked_staples(checked.unwrap_or_default());
                    next_staples = Box::pin(tokio::time::sleep(upkeep::jittered(self.config.tls.poll)));
                }
                name = signals.end() => break Err(name),
                _ = look_after.tick() => {
                    admin.keep();
                    self.drop_ended_staples();
                    if self.has_lost_a_worker() {
                        // The others still have connections; whoever started this process starts it again.
                        break Err("a worker has died");
                    }
                }
                done = &mut until => break Ok(done),
            }
        };
        admin.drain();
        notify(State::Stopping);
        let (value, name) = match reason {
            Ok(value) => (Some(value), "done"),
            Err(name) => (None, name),
        };
        let drained = tokio::select! {
            drained = self.drain(name, &mut signals) => drained,
            never = keep_on(&admin, &mut look_after) => match never {},
        };
        admin.keep();
        drained?;
        Ok(value)
    }

    fn has_lost_a_worker(&self) -> bool {
        self.workers.iter().any(Worker::is_finished)
    }

    fn serve_admin(&mut self, admin: &Arc<Admin>) {
        let Some(listener) = self.admin.take() else { return };
        match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => drop(tokio::spawn(Arc::clone(admin).serve(listener))),
            Err(error) => tracing::error!(%error, "admin: the endpoint is not served"),
        }
    }

    fn say_ready(&self) {
        let listeners: Vec<String> = self.config.listeners.iter().map(|l| l.address.to_string()).collect();
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            listeners = listeners.join(" "),
            workers = self.workers.len(),
            kernel = self.kernel.release,
            ktls = self.kernel.no_ulp.as_deref().unwrap_or("yes"),
            "ready"
        );
        notify(State::Ready);
    }

    /// Reads the file on a thread of its own: a shared file system may take its time, and signals may not.
    fn read_again(&self) -> Option<JoinHandle<Result<Fresh, Failure>>> {
        let Some(file) = self.file.clone() else {
            tracing::warn!("reload: there is no file to read again");
            return None;
        };
        notify(State::Reloading);
        Some(tokio::task::spawn_blocking(move || Fresh::read(&file)))
    }
}

/// Who kills the process in its drain takes the counts of the last second from it, as at any other time.
async fn keep_on(admin: &Admin, each: &mut Interval) -> Infallible {
    loop {
        each.tick().await;
        admin.keep();
    }
}

/// The end of the task, if there is one.
async fn finished(task: &mut Option<JoinHandle<Result<Fresh, Failure>>>) -> Result<Fresh, Failure> {
    match task {
        Some(task) => task.await.unwrap_or_else(|e| Err(Failure::Host(format!("read the configuration: {e}")))),
        None => std::future::pending().await,
    }
}

/// The end of a task that may not have been started; `None` if it has died.
async fn finished_of<T>(task: &mut Option<JoinHandle<T>>) -> Option<T> {
    match task {
        Some(task) => task.await.ok(),
        None => std::future::pending().await,
    }
}
