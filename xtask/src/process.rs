//! Runs other programs: to their end with a clear error, or with a time limit and their output line by line.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Lines of a failed program's output that its error shows.
const TAIL_LINES: usize = 25;
/// How long a program's orphans may keep its output open after it has ended.
const ORPHAN_OUTPUT: Duration = Duration::from_millis(500);

/// The command as a person would type it.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Runs it with our own output; an error unless it exits 0.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {}", shown(command)))?;
    if !status.success() {
        bail!("{}: {status}", shown(command));
    }
    Ok(())
}

/// Runs it silently and gives what it printed; its stderr is in the error.
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let result = command.stdin(Stdio::null()).output().with_context(|| format!("start {}", shown(command)))?;
    if !result.status.success() {
        let text = String::from_utf8_lossy(&result.stderr);
        bail!("{}: {}\n{}", shown(command), result.status, tail(text.trim_end()));
    }
    Ok(result.stdout)
}

/// The same, as text.
pub fn text(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&output(command)?).into_owned())
}

/// The last lines of a text.
pub fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

/// Where a program lies: in PATH, or in the folders for administrators that an ordinary PATH leaves out.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|folder| folder.join(program)).find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// A command that dies with the thread that starts it, whatever ends that: no guest outlives us.
pub fn bound_to_us(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// How a watched program ended.
#[derive(Debug)]
pub enum Ended {
    Exited(ExitStatus),
    /// It was killed when its time was up.
    TimedOut,
}

/// Runs it, hands over each line of its stdout and stderr as it comes, and kills it at the limit.
pub fn watch(command: &mut Command, limit: Duration, mut on_line: impl FnMut(&str)) -> Result<Ended> {
    let deadline = Instant::now() + limit;
    let (out, clone) = std::io::pipe().and_then(|(r, w)| Ok((r, (w.try_clone()?, w)))).context("make a pipe")?;
    command.stdin(Stdio::null()).stdout(clone.0).stderr(clone.1);
    let mut child = command.spawn().with_context(|| format!("start {}", shown(command)))?;
    // `Command` keeps our copies of the writing ends; without this the end of the output would never come.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(out);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(count) if count > 0) {
            let text = String::from_utf8_lossy(&line);
            let _ = sender.send(text.trim_end_matches(['\n', '\r']).to_owned());
            line.clear();
        }
    });
    let mut ended_at = None;
    loop {
        match lines.recv_timeout(Duration::from_millis(20)) {
            Ok(line) => on_line(&line),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                if ended_at.is_none() && child.try_wait().context("wait for a program")?.is_some() {
                    ended_at = Some(Instant::now());
                }
                if ended_at.is_some_and(|at| at.elapsed() > ORPHAN_OUTPUT) {
                    break;
                }
            }
        }
        if Instant::now() > deadline {
            return kill(&mut child);
        }
    }
    finish(&mut child, deadline)
}

/// Waits for the end until the deadline.
pub fn finish(child: &mut Child, deadline: Instant) -> Result<Ended> {
    loop {
        if let Some(status) = child.try_wait().context("wait for a program")? {
            return Ok(Ended::Exited(status));
        }
        if Instant::now() > deadline {
            return kill(child);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn kill(child: &mut Child) -> Result<Ended> {
    child.kill().context("kill a program whose time is up")?;
    child.wait().context("wait for a program")?;
    Ok(Ended::TimedOut)
}

/// Copies a stream to its end on a thread of its own.
pub fn copy_in_background(
    mut from: impl Read + Send + 'static,
    mut to: impl std::io::Write + Send + 'static,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            // When our reader is gone the rest is still taken, so that the program does not hang on a full pipe.
            let _ = to.write_all(&buffer[..count]).and_then(|()| to.flush());
        }
    })
}
