//! Asks the admin endpoint for the live connections: one GET, bounded in time and size.

use crate::observe::live::Connection;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(2);
/// 10,000 connections take about 4 MiB.
const ANSWER_BYTES: u64 = 16 << 20;

/// # Errors
/// One line: why there is no answer.
pub fn connections(admin: SocketAddr) -> Result<Vec<Connection>, String> {
    let answer = get(admin).map_err(|e| format!("{admin}: {e}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| format!("{admin}: an answer without a head"))?;
    if head.split(' ').nth(1) != Some("200") {
        return Err(format!("{admin}: {}", head.lines().next().unwrap_or_default()));
    }
    serde_json::from_str(body).map_err(|e| format!("{admin}: {e}"))
}

fn get(admin: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&admin, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // HTTP/1.0: the answer ends with the connection and is not chunked.
    write!(stream, "GET /connections HTTP/1.0\r\nHost: {admin}\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES).read_to_string(&mut answer)?;
    Ok(answer)
}
