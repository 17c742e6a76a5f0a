//! A relay without TLS: what moving the bytes costs on this machine at the least, by copying or by splice.
//!
//! One connection, two threads, one way each; nothing is looked at and nothing is written about it. It is a floor to measure
//! against, not a server.

use anyhow::{Context, Result};
use rustix::pipe::{SpliceFlags, fcntl_setpipe_size, pipe, splice};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

/// What is read at once, and what a pipe holds.
const COPY_BUFFER_BYTES: usize = 256 << 10;
const PIPE_BYTES: usize = 1 << 20;

/// How it moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    Copy,
    Splice,
}

/// Serves until the process ends.
pub fn serve(mode: Mode, listen: SocketAddr, upstream: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("listen on {listen}"))?;
    for client in listener.incoming() {
        let client = client.context("accept")?;
        std::thread::spawn(move || relay(mode, &client, upstream));
    }
    Ok(())
}

fn relay(mode: Mode, client: &TcpStream, upstream: SocketAddr) -> Result<()> {
    let server = TcpStream::connect(upstream)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    std::thread::scope(|scope| {
        scope.spawn(|| one_way(mode, client, &server));
        // A connection that breaks is over; there is nobody to tell.
        let _ = one_way(mode, &server, client);
    });
    Ok(())
}

fn one_way(mode: Mode, from: &TcpStream, to: &TcpStream) -> Result<()> {
    let moved = match mode {
        Mode::Copy => copied(from, to),
        Mode::Splice => spliced(from, to),
    };
    // The other way ends too if this one broke.
    let how = if moved.is_ok() { Shutdown::Write } else { Shutdown::Both };
    let _ = to.shutdown(how);
    if moved.is_err() {
        let _ = from.shutdown(Shutdown::Both);
    }
    moved
}

fn copied(mut from: &TcpStream, mut to: &TcpStream) -> Result<()> {
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..count])?;
    }
}

fn spliced(from: &TcpStream, to: &TcpStream) -> Result<()> {
    let (out, into) = pipe()?;
    fcntl_setpipe_size(&into, PIPE_BYTES)?;
    loop {
        let mut inside = splice(from, None, &into, None, PIPE_BYTES, SpliceFlags::MOVE)?;
        if inside == 0 {
            return Ok(());
        }
        while inside > 0 {
            inside -= splice(&out, None, to, None, inside, SpliceFlags::MOVE)?;
        }
    }
}
