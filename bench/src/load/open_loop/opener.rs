//! Opens connections anew on a thread of its own, so that a handshake delays nobody's moment.

use super::super::requests::warm;
use crate::client::{Session, Sessions, Target};
use anyhow::{Context, Result, anyhow};
use rustix::event::{EventfdFlags, eventfd};
use rustls::ClientConfig;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// A connection's index and when it may be opened: pauses of many orders pass at the same time.
type Order = (usize, Instant);
type Opened = (usize, Result<Session>);

/// See the module. Its thread ends when this is dropped.
pub struct Opener {
    target: Target,
    config: Option<Arc<ClientConfig>>,
    request: Vec<u8>,
    orders: Sender<Order>,
    opened: Receiver<Opened>,
    bell: OwnedFd,
}

impl Opener {
    pub fn start(target: Target, request: Vec<u8>) -> Result<Self> {
        let config = target.config(Sessions::Fresh)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("eventfd")?;
        let (orders, ordered) = channel::<Order>();
        let (deliver, opened) = channel();
        let (ring, to, with) = (bell.try_clone().context("eventfd")?, target.clone(), config.clone());
        let work = move || {
            for (index, not_before) in ordered {
                std::thread::sleep(not_before.saturating_duration_since(Instant::now()));
                let session = Session::open(&to, with.as_ref());
                if deliver.send((index, session)).is_err() || rustix::io::write(&ring, &1_u64.to_ne_bytes()).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("opener".into())
            .spawn(work)
            .context("start a thread that opens connections")?;
        Ok(Self { target, config, request, orders, opened, bell })
    }

    /// One that has had some requests, at once and on this thread.
    pub fn first(&self) -> Result<Session> {
        warm(&self.target, self.config.clone(), &self.request)?.into_session()
    }

    /// Orders a new one.
    pub fn order(&self, index: usize, pause: Duration) -> Result<()> {
        self.orders
            .send((index, Instant::now() + pause))
            .map_err(|_| anyhow!("the thread that opens connections has ended"))
    }

    /// Readable when a connection has come.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// The next that has come.
    pub fn opened(&self) -> Result<Option<Opened>> {
        if let Ok(opened) = self.opened.try_recv() {
            return Ok(Some(opened));
        }
        match rustix::io::read(&self.bell, &mut [0; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(error).context("read the eventfd"),
        }
        // One that came before the bell was still.
        Ok(self.opened.try_recv().ok())
    }
}
