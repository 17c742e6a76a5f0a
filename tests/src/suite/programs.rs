//! Runs a program of the machine as a TLS client: bytes into its standard input, bytes out of its standard output.

use crate::client::handshake::Suite;
use crate::pattern::Pattern;
use crate::process::{Guarded, find_program};
use crate::run::Context;
use crate::upstream::{Request, THREAD_STACK_BYTES};
use anyhow::{Context as _, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

pub fn program(name: &str) -> Result<Command> {
    Ok(Command::new(find_program(name).with_context(|| format!("no {name} on this machine"))?))
}

/// `openssl s_client` with one suite. `commands`: a line that begins with `k` or `K` is a KeyUpdate.
pub fn openssl(ctx: &Context, address: SocketAddr, suite: Suite, commands: bool) -> Result<Command> {
    let certificate = if suite.rsa { &ctx.certificates.rsa } else { &ctx.certificates.ecdsa };
    let mut command = program("openssl")?;
    command.args(["s_client", "-quiet", "-servername", crate::certificate::NAME, "-verify_return_error", "-CAfile"]);
    command.arg(&certificate.chain).args(["-connect", &address.to_string()]);
    if commands {
        command.arg("-no_ign_eof");
    }
    if suite.tls13 {
        command.args(["-tls1_3", "-ciphersuites", suite.openssl]);
    } else {
        command.args(["-tls1_2", "-cipher", suite.openssl]);
    }
    Ok(command)
}

/// `gnutls-cli` with one suite. `commands`: a line `^rekey^` is a KeyUpdate.
pub fn gnutls(ctx: &Context, address: SocketAddr, suite: Suite, commands: bool) -> Result<Command> {
    let certificate = if suite.rsa { &ctx.certificates.rsa } else { &ctx.certificates.ecdsa };
    let mut command = program("gnutls-cli")?;
    command.args(["--logfile", "/dev/null", "--priority", suite.gnutls, "--sni-hostname", crate::certificate::NAME]);
    command.args(["--verify-hostname", crate::certificate::NAME, "--x509cafile"]).arg(&certificate.chain);
    if commands {
        command.arg("--inline-commands");
    }
    command.args(["--port", &address.port().to_string(), "127.0.0.1"]);
    Ok(command)
}

/// What goes into the program's standard input.
pub enum Feed<'a> {
    /// The request and the upload's pattern.
    Plain,
    /// Lines of digits; about every so many bytes, at the end of a line, one of these commands alone in the pipe.
    WithCommands { lines: &'a [&'a str], every: usize },
}

/// What came of a conversation.
pub struct Conversation {
    /// Bytes of the pattern that came out.
    pub got: u64,
    /// Whether the program took all of its input. One that was told the end of the stream does not.
    pub fed: Result<()>,
}

/// Runs it to its end. Its input stays open until its output has ended, so that it leaves when the server does.
pub fn converse(ctx: &Context, mut command: Command, request: &Request, feed: &Feed<'_>) -> Result<Conversation> {
    let words = ctx.environment.tmp.join(format!("{}-program.log", ctx.test()));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(fs::File::create(&words)?);
    ctx.watch_log(&words);
    let mut program = Guarded::spawn(&mut command)?;
    let mut stdin = program.child().stdin.take().context("no standard input")?;
    let mut stdout = program.child().stdout.take().context("no standard output")?;
    let limit = ctx.environment.patience();
    let conversation = thread::scope(|scope| {
        let (ended, wait) = channel::<()>();
        let feeding = move || {
            let fed = self::feed(&mut stdin, request, feed, limit);
            // Until the reader has come to the end.
            let _ = wait.recv();
            fed
        };
        let feeder = thread::Builder::new().stack_size(THREAD_STACK_BYTES).spawn_scoped(scope, feeding)?;
        let got = check_output(&mut stdout);
        drop(ended);
        let fed = feeder.join().expect("the feeder does not panic");
        // What came out explains what did not go in.
        Ok::<_, anyhow::Error>(Conversation { got: got?, fed })
    })?;
    program.wait(limit)?;
    Ok(conversation)
}

fn check_output(stdout: &mut impl Read) -> Result<u64> {
    let mut buf = vec![0; 1 << 16];
    let mut got = 0;
    loop {
        let n = stdout.read(&mut buf).context("read the program's output")?;
        if n == 0 {
            return Ok(got);
        }
        Pattern::down().check(got, &buf[..n]).context("the program's output")?;
        got += n as u64;
    }
}

fn feed(stdin: &mut ChildStdin, request: &Request, feed: &Feed<'_>, limit: Duration) -> Result<()> {
    stdin.write_all(&request.encode()).context("feed the request")?;
    let up = usize::try_from(request.up)?;
    match feed {
        Feed::Plain => stdin.write_all(&Pattern::up().bytes(up)).context("feed the upload"),
        Feed::WithCommands { lines, every } => {
            let digits = Pattern::digits().bytes(up);
            let mut rest = digits.as_slice();
            let mut lines = lines.iter().cycle();
            while rest.len() > *every {
                let end = rest[*every..].iter().position(|b| *b == b'\n').map_or(rest.len(), |at| every + at + 1);
                stdin.write_all(&rest[..end]).context("feed a part of the upload")?;
                rest = &rest[end..];
                alone(stdin, limit)?;
                stdin.write_all(lines.next().context("no commands")?.as_bytes()).context("feed a command")?;
                alone(stdin, limit)?;
            }
            // With the last part all is complete, and the program leaves.
            stdin.write_all(rest).context("feed the last part of the upload")?;
            Ok(())
        }
    }
}

/// Waits until the program has taken everything: a command counts only at the start of a read.
fn alone(stdin: &ChildStdin, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    while rustix::io::ioctl_fionread(stdin).context("FIONREAD of a pipe")? > 0 {
        ensure!(!is_abandoned(stdin)?, "the program has ended before it took all of its input");
        ensure!(Instant::now() < deadline, "the program has stopped to read its input");
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_millis(2));
    Ok(())
}

/// Nobody reads the pipe any more: what lies in it stays there, and only a poll tells.
fn is_abandoned(stdin: &ChildStdin) -> Result<bool> {
    let mut fds = [PollFd::new(stdin, PollFlags::empty())];
    poll(&mut fds, Some(&Timespec::default())).context("poll a pipe")?;
    Ok(fds[0].revents().contains(PollFlags::ERR))
}
