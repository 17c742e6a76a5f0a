//! TCP's keepalive (RFC 9293 section 3.8.4): what is between two hosts must not forget a connection that is quiet.
//!
//! A network load balancer drops a flow from its table after 350 s without a packet, a NAT gateway too, and tells neither
//! side: the next byte meets a reset. And a host that has vanished is found out before `limits.idle_timeout`.

use socket2::{Socket, TcpKeepalive};
use std::io;
use std::time::Duration;

/// Well below 350 s, and rarely enough to cost nothing.
const IDLE: Duration = Duration::from_secs(120);
const INTERVAL: Duration = Duration::from_secs(30);
/// Probes without an answer: a peer that is gone is known to be so after four minutes.
const PROBES: u32 = 4;

/// Switches it on; what a listener accepts inherits it.
///
/// # Errors
/// setsockopt(2)'s.
pub fn switch_on(socket: &Socket) -> io::Result<()> {
    let keepalive = TcpKeepalive::new().with_time(IDLE).with_interval(INTERVAL).with_retries(PROBES);
    socket.set_tcp_keepalive(&keepalive)
}
