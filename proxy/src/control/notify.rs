//! sd_notify(3), the part that `Type=notify` and `notify-reload` need: one datagram to the socket that systemd names.

use crate::sys::limits::monotonic_usec;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// What the service manager is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Ready,
    Reloading,
    Stopping,
}

/// Tells the service manager, if there is one. Nothing depends on it, so a failure is only logged.
pub fn notify(state: State) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&socket, &message(state)) {
        tracing::warn!(%error, "sd_notify: the service manager was not told");
    }
}

fn message(state: State) -> String {
    match state {
        State::Ready => "READY=1\n".to_owned(),
        State::Reloading => format!("RELOADING=1\nMONOTONIC_USEC={}\n", monotonic_usec()),
        State::Stopping => "STOPPING=1\n".to_owned(),
    }
}

fn send(socket: &OsStr, message: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abstract_socket_is_reached() {
        let name = format!("tlsplice-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let manager = UnixDatagram::bind_addr(&address).expect("free");
        send(OsStr::new(&format!("@{name}")), &message(State::Reloading)).expect("sent");
        let mut buffer = [0; 128];
        let n = manager.recv(&mut buffer).expect("there");
        let text = std::str::from_utf8(&buffer[..n]).expect("text");
        let usec = text.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").and_then(|rest| rest.trim().parse::<u64>().ok());
        assert!(usec.is_some_and(|usec| usec > 0), "{text}");
    }
}
