//! The client of mode "http" and "redirect" as plaintext: protected by userspace, by the kernel, or not at all.
//!
//!   receive ─▶ pieces in the worker's scratch        send, forward ─▶ records ─▶ flush ─▶ client
//!
//! What differs between the three is here and nowhere else in `http`. Nothing is held while nothing moves.

use crate::observe::counters::End;
use crate::offload::{Offloaded, through_the_door};
use crate::relay::flow::Flow;
use crate::relay::kernel_tls::KernelTls;
use crate::relay::user_tls::{Received, Sealed, Then, UserTls};
use crate::relay::{COPY_RECORDS, Client, ClientEnd, Ended, RECEIVE_BYTES, Scratch, Spare, UpstreamEnd, Want};
use crate::ring::{Look, Sock};
use crate::sys::socket;
use crate::watch::Verdict;
use std::task::{Context, Poll};

/// Of a key that has no next, one part in so many must be left for the client to be told that the connection goes on.
pub const PROMISED_PARTS: u64 = 2;
/// And for that to be true behind the response: more than one that is short takes lies between the two.
pub const KEPT_PARTS: u64 = 4;

/// See the module.
pub enum Downstream {
    User(Box<UserTls>),
    Kernel(Box<Behind>),
    Plain(Box<Plain>),
}

/// Behind the door: what is on its way to the client is plaintext, in memory or in a pipe.
pub struct Behind {
    pub tls: KernelTls,
    down: Flow,
}

/// A client without TLS.
pub struct Plain {
    pub client: Client,
    to_client: Spare,
}

impl Downstream {
    pub fn user(tls: UserTls) -> Self {
        Self::User(Box::new(tls))
    }

    pub fn plain(client: Client) -> Self {
        Self::Plain(Box::new(Plain { client, to_client: Spare::default() }))
    }

    pub fn client(&self) -> &Client {
        match self {
            Self::User(tls) => &tls.client,
            Self::Kernel(behind) => &behind.tls.client,
            Self::Plain(plain) => &plain.client,
        }
    }

    pub fn client_mut(&mut self) -> &mut Client {
        match self {
            Self::User(tls) => &mut tls.client,
            Self::Kernel(behind) => &mut behind.tls.client,
            Self::Plain(plain) => &mut plain.client,
        }
    }

    /// The kernel could take over here: nothing of the stream is in userspace, either way.
    pub fn is_at_boundary(&self) -> bool {
        match self {
            Self::User(tls) => tls.is_at_boundary(),
            Self::Kernel(_) | Self::Plain(_) => false,
        }
    }

    /// Goes through the door, or stays with a reason that is counted. `Err`: below the door something failed.
    pub fn through_the_door(self) -> Result<Self, Box<(Client, Ended)>> {
        let tls = match self {
            Self::User(tls) => *tls,
            Self::Kernel(_) | Self::Plain(_) => return Ok(self),
        };
        match through_the_door(tls) {
            Offloaded::Kernel(tls) => {
                let down = Flow::new(tls.splicer(), Spare::default());
                Ok(Self::Kernel(Box::new(Behind { tls: *tls, down })))
            }
            Offloaded::Declined(tls) => Ok(Self::User(tls)),
            Offloaded::Failed(client, ended) => Err(Box::new((*client, ended))),
        }
    }

    // ---- from the client

    pub fn is_readable(&self) -> bool {
        match self {
            Self::User(tls) => tls.is_readable(),
            Self::Kernel(_) | Self::Plain(_) => self.client().sock.readable,
        }
    }

    /// Receives about `max` bytes; plaintext lies in the scratch's pieces. `exact`: the connection shall go through the
    /// door. `None`: nothing is there.
    pub fn receive(&mut self, scratch: &mut Scratch, max: usize, exact: bool) -> Result<Option<Received>, Ended> {
        scratch.pieces.clear();
        if !self.is_readable() {
            return Ok(None);
        }
        let received = match self {
            Self::User(tls) => return tls.receive_quietly(scratch, max, exact),
            Self::Kernel(behind) => {
                behind.tls.is_sending = behind.down.is_sending();
                behind.tls.receive_quietly(scratch, max)?
            }
            Self::Plain(plain) => plain.receive(&mut scratch.received[..max.min(RECEIVE_BYTES)])?,
        };
        if received.bytes > 0 {
            scratch.pieces.push(0..received.bytes);
        }
        let nothing = received.bytes == 0 && received.then == Then::Open && !self.client().sock.readable;
        Ok((!nothing).then_some(received))
    }

    /// What was received was handed on; whether all of it was taken.
    pub fn handed_on(&mut self, all_taken: bool) {
        match self {
            Self::User(tls) => tls.handed_on(all_taken),
            Self::Kernel(behind) => behind.tls.handed_on(all_taken),
            Self::Plain(_) => {}
        }
    }

    /// Waits until a socket is ready or time is up.
    pub fn poll_ready(
        &mut self,
        cx: &mut Context<'_>,
        upstream: Option<&mut Sock>,
        want: Want,
        look: Look,
    ) -> Poll<Result<(), Verdict>> {
        match self {
            Self::User(tls) => tls.client.poll_ready(cx, upstream, want, look),
            Self::Kernel(behind) => behind.tls.poll_ready(cx, upstream, want, look),
            Self::Plain(plain) => plain.client.poll_ready(cx, upstream, want, look),
        }
    }

    // ---- to the client

    /// Sends what is on its way and the KeyUpdate that is owed. True when nothing is left.
    pub fn flush(&mut self, cx: &mut Context<'_>) -> Result<bool, Ended> {
        match self {
            Self::User(tls) => {
                let sent = tls.flush().map_err(Ended::client_gone)?;
                if !sent || !tls.owes_key_update() {
                    return Ok(sent);
                }
                tls.queue_key_update()?;
                // That a client takes this is no reason to wait longer.
                tls.to_client.flush(&mut tls.client.sock).map_err(Ended::client_gone)
            }
            Self::Kernel(behind) => behind.flush(cx),
            Self::Plain(plain) => plain.to_client.flush(&mut plain.client.sock).map_err(Ended::client_gone),
        }
    }

    /// Something waits for the client to take it.
    pub fn is_blocked(&self) -> bool {
        match self {
            Self::User(tls) => tls.is_blocked(),
            Self::Kernel(behind) => !behind.down.is_empty() || behind.tls.owes_key_update(),
            Self::Plain(plain) => !plain.to_client.is_empty(),
        }
    }

    /// A splice to or for the client is in flight, and wakes the connection when it ends.
    pub fn is_in_flight(&self) -> bool {
        match self {
            Self::User(_) | Self::Plain(_) => false,
            Self::Kernel(behind) => behind.down.is_in_flight(),
        }
    }

    /// Gives the pipe back: nothing is on its way.
    pub fn rest(&mut self) {
        if let Self::Kernel(behind) = self
            && behind.down.is_empty()
        {
            behind.down.rest();
        }
    }

    /// Sends bytes that are in our memory, behind what is on its way. Everything before must have been flushed.
    pub fn send(&mut self, scratch: &mut Scratch, bytes: &[u8]) -> Result<(), Ended> {
        self.renew_key()?;
        match self {
            Self::User(tls) => tls.seal(scratch, bytes),
            Self::Kernel(behind) => {
                behind.sent(bytes.len());
                behind.tls.sealed(bytes.len());
                behind.tls.client.worker.counters.down_copied.add(bytes.len() as u64);
                behind.down.copy(bytes);
                Ok(())
            }
            Self::Plain(plain) => plain.to_client.send(&mut plain.client.sock, bytes).map_err(Ended::client_gone),
        }
    }

    /// Moves at most `max` bytes of plaintext from the upstream towards the client, without looking at them.
    pub fn forward(
        &mut self,
        cx: &mut Context<'_>,
        upstream: &mut Sock,
        scratch: &mut Scratch,
        max: u64,
    ) -> Poll<Result<Sealed, Ended>> {
        if let Err(ended) = self.renew_key() {
            return Poll::Ready(Err(ended));
        }
        match self {
            Self::User(tls) => Poll::Ready(tls.seal_from(upstream, scratch, max)),
            Self::Kernel(behind) => {
                let max = usize::try_from(max).unwrap_or(usize::MAX);
                behind.tls.fill_down(cx, &mut behind.down, upstream, scratch, max).map(Ok)
            }
            // Nothing is forwarded in mode "redirect".
            Self::Plain(_) => Poll::Ready(Err(Ended::abort(End::Internal))),
        }
    }

    /// The key has no next, and less than one part in `parts` is left of it.
    pub fn is_key_short(&mut self, parts: u64) -> bool {
        match self {
            Self::User(tls) => tls.keys.is_short(parts),
            Self::Kernel(behind) => behind.tls.is_key_short(parts),
            Self::Plain(_) => false,
        }
    }

    /// Has the key changed before it is used up; where that cannot be, the connection ends.
    fn renew_key(&mut self) -> Result<(), Ended> {
        let is_renewed = match self {
            Self::User(tls) if !tls.keys.is_used_up(COPY_RECORDS) => true,
            Self::User(tls) if tls.keys.ring.is_tls12() => false,
            Self::User(tls) => return tls.queue_key_update(),
            Self::Kernel(behind) => behind.down.is_in_flight() || !behind.tls.is_used_up() || behind.tls.renew_key(),
            Self::Plain(_) => true,
        };
        if is_renewed { Ok(()) } else { Err(Ended::abort(End::KeyExhausted)) }
    }

    /// Puts the close_notify behind all that was sent. False: the client has to take something before.
    pub fn close_notify(&mut self) -> Result<bool, Ended> {
        match self {
            Self::User(tls) => {
                tls.queue_close_notify();
                Ok(true)
            }
            Self::Kernel(behind) => match behind.tls.send_close_notify() {
                Ok(true) => {
                    behind.tls.client.sock.finish();
                    Ok(true)
                }
                Ok(false) => Ok(false),
                Err(_) => Err(Ended::abort(End::ClientReset)),
            },
            Self::Plain(_) => Ok(true),
        }
    }

    /// The client, and what `close` still has to send.
    pub fn into_parts(self) -> (Client, Spare) {
        match self {
            Self::User(tls) => (tls.client, tls.to_client),
            Self::Kernel(mut behind) => {
                behind.tls.reset_low_water();
                (behind.tls.client, Spare::default())
            }
            Self::Plain(plain) => (plain.client, plain.to_client),
        }
    }

    /// The end that a client gets behind its last response.
    pub fn clean_end(&self, how: End) -> Ended {
        let client = match (self, how) {
            (Self::Kernel(_), End::NoRekey) => ClientEnd::Await,
            (Self::User(_) | Self::Kernel(_) | Self::Plain(_), _) => ClientEnd::Discard,
        };
        Ended { how, client, upstream: UpstreamEnd::Close }
    }
}

impl Behind {
    fn flush(&mut self, cx: &mut Context<'_>) -> Result<bool, Ended> {
        if self.tls.owes_key_update() && !self.down.is_in_flight() && !self.tls.send_key_update()? {
            return Ok(false);
        }
        self.tls.drain(cx, &mut self.down)
    }

    /// Moves at most `max` bytes of the client's plaintext into the flow, without looking at them.
    pub fn fill_up(
        &mut self,
        cx: &mut Context<'_>,
        up: &mut Flow,
        scratch: &mut Scratch,
        max: usize,
    ) -> Poll<Result<Received, Ended>> {
        self.tls.is_sending = self.down.is_sending();
        self.tls.fill(cx, up, scratch, max)
    }

    fn sent(&mut self, bytes: usize) {
        self.tls.client.moved_down += bytes as u64;
        self.tls.client.watch.touch();
    }
}

impl Plain {
    fn receive(&mut self, buffer: &mut [u8]) -> Result<Received, Ended> {
        match socket::recv(self.client.sock.fd(), buffer) {
            // Without TLS a FIN is all the end that there is.
            Ok(0) => Ok(Received { bytes: 0, then: Then::Closed }),
            Ok(bytes) => {
                self.client.sock.readable = bytes == buffer.len();
                Ok(Received { bytes, then: Then::Open })
            }
            Err(e) if socket::is_again(&e) => {
                self.client.sock.readable = false;
                Ok(Received { bytes: 0, then: Then::Open })
            }
            Err(_) => Err(Ended::abort(End::ClientReset)),
        }
    }
}
