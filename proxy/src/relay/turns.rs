//! How relays and exchanges are polled: both directions have their turns, then the sockets are waited for.
//!
//!   turns ─▶ wait ─▶ something has come ─▶ turns …        a poll goes on where the last one waited
//!
//! Until something has come the directions have nothing to do, so a poll begins with the wait that the last one ended in. It
//! looks at all that is armed once; whoever comes to wait again in the same poll looks at what was armed since.

use super::Turn;
use crate::ring::Look;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// Two directions between two sockets, and their end.
pub trait Turns {
    type End;

    /// A splice runs on the ring: its end wakes a direction, and no socket tells of it.
    fn is_in_flight(&self) -> bool;

    /// Both directions have their turn; `Err` is the end.
    fn turns(&mut self, cx: &mut Context<'_>) -> Result<Turn, Self::End>;

    /// Waits for the connection's next turn.
    fn poll_next_turn(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// Waits until a direction may go on (`None`) or time is up.
    fn poll_sockets(&mut self, cx: &mut Context<'_>, look: Look) -> Poll<Option<Self::End>>;
}

/// The future of all turns.
pub struct InTurns<'a, T> {
    of: &'a mut T,
    waits: bool,
}

impl<'a, T: Turns> InTurns<'a, T> {
    pub fn new(of: &'a mut T) -> Self {
        Self { of, waits: false }
    }
}

impl<T: Turns> Future for InTurns<'_, T> {
    type Output = T::End;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T::End> {
        let Self { of, waits } = &mut *self;
        let mut look = Look::All;
        let mut goes_on = std::mem::take(waits) && !of.is_in_flight();
        loop {
            while !std::mem::take(&mut goes_on) {
                match of.turns(cx) {
                    Ok(Turn::Wait) => break,
                    Ok(Turn::Again) => ready!(of.poll_next_turn(cx)),
                    Err(end) => return Poll::Ready(end),
                }
            }
            match of.poll_sockets(cx, look) {
                Poll::Ready(None) => look = Look::New,
                Poll::Ready(Some(end)) => return Poll::Ready(end),
                Poll::Pending => {
                    *waits = true;
                    return Poll::Pending;
                }
            }
        }
    }
}
