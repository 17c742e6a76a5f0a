//! Shakes hands with a client.
//!
//!   Accepted ─▶ read records ─▶ rustls ─▶ write ─▶ … ─▶ Handshaken (session, and what the client sent behind it)
//!
//! If the connection goes to the kernel at once, every read is exact, so that what lies behind Finished stays in the
//! socket for the kernel. Otherwise reads are large, and what is left over goes to the userspace relay; it has an answer to
//! come, and the tickets go with that: a send and a wake-up less for each connection.

use crate::close::writable;
use crate::observe::alerts::Alert;
use crate::observe::counters::End;
use crate::protect::missing_bytes;
use crate::relay::Spare;
use crate::ring::Sock;
use crate::session::Session;
use crate::sys::socket;
use crate::watch::{Verdict, Watch};
use std::future::poll_fn;
use std::task::Poll;

/// First read of a connection that stays in userspace for a while: a ClientHello with X25519MLKEM768 is 1.8 KiB.
const READ_BYTES: usize = 4096;
/// The longest handshake that a client may send before it is complete; ours takes at most 4 KiB of it.
const HANDSHAKE_BYTES: usize = 64 << 10;

/// A session that is established.
pub struct Handshaken {
    pub session: Session,
    /// Ciphertext that came behind the handshake.
    pub leftover: Vec<u8>,
    /// Tickets that have not been sent: the client has asked something already, and they go with the answer.
    pub tickets: Spare,
}

/// A handshake that did not come to its end.
pub struct Failure {
    pub how: End,
    pub reason: String,
    /// The alert, as far as it has not been sent.
    pub alert: Spare,
    /// The same, for those who count, or the client's.
    pub told: Option<Alert>,
}

/// Runs the handshake. `exact`: read no byte beyond it.
pub async fn handshake(client: &mut Sock, watch: &Watch, session: Session, exact: bool) -> Result<Handshaken, Failure> {
    let mut state = State { session, wire: Vec::new(), has_heard: false, out: Spare::default() };
    loop {
        let missing = missing_bytes(&state.wire);
        let wanted = if exact { missing } else { missing.max(READ_BYTES) };
        if state.wire.len() + wanted > HANDSHAKE_BYTES {
            return Err(state.failed(End::HandshakeFailed, "the client's handshake is longer than 64 KiB"));
        }
        state.read(client, watch, wanted).await?;
        state.step(client, watch).await?;
        if state.session.is_established() {
            // The connection keeps it, and most have nothing in it.
            state.wire.shrink_to_fit();
            return Ok(Handshaken { session: state.session, leftover: state.wire, tickets: state.out });
        }
    }
}

struct State {
    session: Session,
    wire: Vec<u8>,
    /// A byte of the client's has come.
    has_heard: bool,
    out: Spare,
}

impl State {
    fn failed(&mut self, how: End, reason: impl Into<String>) -> Failure {
        Failure { how, reason: reason.into(), alert: std::mem::take(&mut self.out), told: None }
    }

    fn out_of_time(&mut self, verdict: Verdict) -> Failure {
        match verdict {
            Verdict::TimedOut => self.failed(End::HandshakeTimeout, "limits.handshake_timeout is over"),
            Verdict::Cut => self.failed(End::Drained, "the drain is over"),
        }
    }

    async fn read(&mut self, client: &mut Sock, watch: &Watch, wanted: usize) -> Result<(), Failure> {
        let at = self.wire.len();
        loop {
            if client.readable {
                self.wire.resize(at + wanted, 0);
                let result = socket::recv(client.fd(), &mut self.wire[at..]);
                self.wire.truncate(at + result.as_ref().map_or(0, |n| *n));
                match result {
                    Ok(0) if !self.has_heard => return Err(self.failed(End::NoHello, "the client left without a word")),
                    Ok(0) => return Err(self.failed(End::ClientTruncated, "the client's stream ends in the handshake")),
                    Ok(n) => {
                        self.has_heard = true;
                        client.readable = n == wanted;
                        return Ok(());
                    }
                    Err(e) if socket::is_again(&e) => client.readable = false,
                    Err(e) => {
                        let how = if self.has_heard { End::ClientReset } else { End::NoHello };
                        return Err(self.failed(how, format!("recv: {e}")));
                    }
                }
            }
            if let Err(verdict) = readable(client, watch).await {
                return Err(self.out_of_time(verdict));
            }
        }
    }

    /// Gives rustls what is there and sends what it says.
    async fn step(&mut self, client: &mut Sock, watch: &Watch) -> Result<(), Failure> {
        let mut out = Vec::new();
        let fed = self.session.feed(&mut self.wire, &mut out);
        self.wire.drain(..fed.consumed);
        self.out.push(&out);
        if let Some(error) = fed.error {
            let told = Alert::of(&error, &out);
            return Err(Failure { told, ..self.failed(End::HandshakeFailed, error.to_string()) });
        }
        if self.session.sends_only_tickets() && !self.wire.is_empty() {
            return Ok(());
        }
        loop {
            match self.out.flush(client) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(e) => return Err(self.failed(End::ClientReset, format!("send: {e}"))),
            }
            if !writable(client, watch).await {
                return Err(self.out_of_time(watch.verdict().unwrap_or(Verdict::TimedOut)));
            }
        }
    }
}

async fn readable(client: &mut Sock, watch: &Watch) -> Result<(), Verdict> {
    poll_fn(|cx| {
        client.arm_read();
        if client.take_up(cx) && client.readable {
            return Poll::Ready(Ok(()));
        }
        if let Some(verdict) = watch.verdict() {
            return Poll::Ready(Err(verdict));
        }
        watch.register(cx.waker());
        Poll::Pending
    })
    .await
}
