//! A server for tests that ends its connections, as servers do.

use crate::client::Target;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};

/// How a connection ends.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// The last answer says so.
    Announced,
    /// Behind the last answer, without a word.
    Silent,
    /// Instead of the last answer.
    Unanswered,
    /// Never; the last of so many answers is a refusal each time.
    Refusal,
}

/// Answers so many requests of each connection, then ends it. It runs until the process ends.
pub fn start(requests: usize, end: End) -> Target {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let address = listener.local_addr().expect("it listens");
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            std::thread::spawn(move || serve(&socket, requests, end));
        }
    });
    Target { address, name: "bench.example".try_into().expect("a name"), tls: None }
}

fn serve(mut socket: &TcpStream, requests: usize, end: End) -> Option<()> {
    let mut lines = BufReader::new(socket).lines();
    for number in 1.. {
        while !lines.next()?.ok()?.is_empty() {}
        let is_last = number % requests == 0;
        let (status, field) = match end {
            End::Unanswered if is_last => return None,
            End::Announced if is_last => ("200 OK", "Connection: close\r\n"),
            End::Refusal if is_last => ("503 Service Unavailable", ""),
            _ => ("200 OK", ""),
        };
        let answer = format!("HTTP/1.1 {status}\r\n{field}Content-Length: 3\r\n\r\nhey");
        socket.write_all(answer.as_bytes()).ok()?;
        if is_last && !matches!(end, End::Refusal) {
            return None;
        }
    }
    None
}
