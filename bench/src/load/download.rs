//! A download that goes on for as long as it is wanted.
//!
//!   our upstream's, which has no end: records are counted, not decrypted      a path of the server's own: read and asked for again
//!
//! How a file of the server's own ends is in the stream, so there the generator is an ordinary client.

use super::Load;
use crate::client::{Answer, Closed, Counted, Session, Sessions, Target};
use anyhow::{Context, Result};
use rustls::ClientConfig;
use std::sync::Arc;

/// What is read at once.
pub const SCRATCH_BYTES: usize = 256 << 10;

/// See the module.
#[derive(Debug)]
pub enum Download<'a> {
    Endless(Counted),
    Repeated(Box<Repeated<'a>>),
}

/// A file, again and again.
#[derive(Debug)]
pub struct Repeated<'a> {
    target: &'a Target,
    config: Option<Arc<ClientConfig>>,
    request: Vec<u8>,
    session: Session,
    answer: Answer,
    /// That came whole on this connection.
    answers: u64,
    reopened: u64,
}

impl<'a> Download<'a> {
    /// Opens a connection and asks.
    pub fn open(target: &'a Target, load: &Load) -> Result<Self> {
        let config = target.config(Sessions::Fresh)?;
        let request = load.request(target);
        let mut session = Session::open(target, config.as_ref())?;
        session.send(&request)?;
        if load.path.is_none() {
            return session.count_only().map(Self::Endless);
        }
        let answer = Answer::default();
        let mut repeated = Repeated { target, config, request, session, answer, answers: 0, reopened: 0 };
        // A refusal is known before the work begins.
        let mut scratch = vec![0; SCRATCH_BYTES];
        while repeated.reopened + repeated.answers == 0 && repeated.answer.head().is_none() {
            repeated.receive(&mut scratch)?;
        }
        Ok(Self::Repeated(Box::new(repeated)))
    }

    /// Receives at most `scratch` bytes; gives the payload in what came.
    pub fn receive(&mut self, scratch: &mut [u8]) -> Result<u64> {
        match self {
            Self::Endless(counted) => counted.receive(scratch)?.context("the download ended early"),
            Self::Repeated(repeated) => repeated.receive(scratch),
        }
    }

    /// What has come that can be told.
    pub fn payload(&self) -> Option<u64> {
        match self {
            Self::Endless(counted) => Some(counted.payload()),
            Self::Repeated(_) => None,
        }
    }

    /// How many connections followed the first.
    pub fn reopened(&self) -> u64 {
        match self {
            Self::Endless(_) => 0,
            Self::Repeated(repeated) => repeated.reopened,
        }
    }
}

impl Repeated<'_> {
    fn receive(&mut self, scratch: &mut [u8]) -> Result<u64> {
        let (bytes, is_whole) = match self.session.piece_of(&mut self.answer, scratch) {
            // Ended between two answers, which is no failure unless it was the first.
            Err(error) if error.is::<Closed>() && self.answers > 0 => return self.reopen().map(|()| 0),
            result => result?,
        };
        if is_whole {
            self.answer = Answer::default();
            self.answers += 1;
            if self.session.is_over() || self.session.send(&self.request).is_err() {
                self.reopen()?;
            }
        }
        Ok(bytes)
    }

    fn reopen(&mut self) -> Result<()> {
        self.session = Session::open(self.target, self.config.as_ref())?;
        (self.answers, self.reopened) = (0, self.reopened + 1);
        self.session.send(&self.request)
    }
}

#[cfg(test)]
mod tests {
    use super::super::fickle::{self, End};
    use super::*;
    use crate::load::{Count, Kind, run};
    use std::time::Duration;

    #[test]
    fn a_file_of_the_server_s_own_is_asked_for_again() {
        let load = Load { path: Some("/x".into()), ..Load::of(Kind::Down, Duration::from_millis(200)) };
        for end in [End::Announced, End::Silent] {
            let outcome = run(&fickle::start(3, end), &load, &mut |_| Ok(())).expect("answers");
            let Count { units, reopened, failure, .. } = outcome.count;
            assert!(units > 0 && reopened > 0, "{end:?}: {units} bytes, {reopened} opened anew");
            assert_eq!(failure, None, "{end:?}");
        }
        let refusing = run(&fickle::start(1, End::Refusal), &load, &mut |_| Ok(())).expect_err("a refusal");
        assert!(format!("{refusing:#}").contains("the answer's status is 503"), "{refusing:#}");
    }
}
