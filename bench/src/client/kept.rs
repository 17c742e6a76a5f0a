//! A connection for many requests. Servers end such connections: after so many requests (nginx: `keepalive_requests`), after
//! some time, or as they like (RFC 9112 section 9.5). Then the next request opens another.

use super::{Closed, Session, Target};
use anyhow::Result;
use rustls::ClientConfig;
use std::sync::Arc;

/// See the module.
#[derive(Debug)]
pub struct Kept<'a> {
    target: &'a Target,
    config: Option<Arc<ClientConfig>>,
    /// `None`: the server has announced its end, or something has failed.
    session: Option<Session>,
    reopened: u64,
}

impl<'a> Kept<'a> {
    /// Opens the first.
    pub fn open(target: &'a Target, config: Option<Arc<ClientConfig>>) -> Result<Self> {
        let session = Some(Session::open(target, config.as_ref())?);
        Ok(Self { target, config, session, reopened: 0 })
    }

    /// Sends a request and takes the whole answer, which must not be a refusal. A connection on which nothing of it came is no
    /// failure, unless it is a new one: the server had ended it before it read the request.
    pub fn exchange(&mut self, request: &[u8]) -> Result<()> {
        if let Some(session) = self.session.take() {
            match self.asked(session, request) {
                Err(error) if error.is::<Closed>() => {}
                result => return result,
            }
        }
        let session = Session::open(self.target, self.config.as_ref())?;
        self.reopened += 1;
        self.asked(session, request)
    }

    fn asked(&mut self, mut session: Session, request: &[u8]) -> Result<()> {
        session.exchange(request)?;
        self.session = (!session.is_over()).then_some(session);
        Ok(())
    }

    /// The connection that the next request would go to.
    pub fn into_session(self) -> Result<Session> {
        self.session.map_or_else(|| Session::open(self.target, self.config.as_ref()), Ok)
    }

    /// How many connections followed the first.
    pub fn reopened(&self) -> u64 {
        self.reopened
    }
}
