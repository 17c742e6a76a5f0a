//! The first process of a guest and of user-mode Linux.
//!
//!   kernel ─▶ mounts ─▶ modules ─▶ loopback, limits ─▶ the command ─▶ exit status to the host ─▶ power off
//!
//! Its request (`request.rs`) lies in the image, or where the environment variable `TLSPLICE_REQUEST` says. The command's
//! output goes through pipes to raw terminals, so it sees no terminal and its bytes arrive as they were. A failure of its
//! own is one line on the same terminal, and exit status 125. It is static, links nothing but libc, and is process 1: it
//! reaps every orphan, and when it panics the kernel does too, which the host takes for a failure.

// This is the guest's own first process: every call below is one that the kernel offers to nobody else in safe form.
#![allow(unsafe_code)]

#[allow(dead_code, reason = "the host writes what is read here")]
mod request;

use request::{DEFAULT_PATH, Request, Status};
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// The exit status for "the guest itself failed", as `env` and `timeout` use it.
const OWN_FAILURE: u8 = 125;
/// The isa-debug-exit device, as `qemu.rs` places it.
const DEBUG_EXIT_PORT: u16 = 0xf4;
/// QEMU's exit status is `2 * value + 1` in eight bits and the value is our exit status plus one: nothing larger fits.
const DEBUG_EXIT_MAX: u8 = 126;
/// Files that a process may hold open: the kernel's own ceiling (`fs.nr_open`).
const OPEN_FILES: u64 = 1 << 20;
/// How long the command's orphans may keep its output open after it has ended.
const ORPHAN_OUTPUT_MS: u64 = 300;

fn main() {
    mount_kernel_filesystems();
    let path = std::env::var_os("TLSPLICE_REQUEST").unwrap_or_else(|| DEFAULT_PATH.into());
    let request = fs::read(&path).map_err(|e| format!("{}: {e}", path.to_string_lossy()));
    let request = match request.and_then(|bytes| Request::decode(&bytes)) {
        Ok(request) => request,
        Err(error) => {
            let _ = fs::write("/dev/kmsg", format!("<2>tlsplice-init: {error}"));
            power_off();
        }
    };
    let code = serve(&request).unwrap_or_else(|error| {
        let line = format!("tlsplice-init: {error}\n");
        let _ = fs::write("/dev/kmsg", format!("<2>{line}"));
        let _ = open_terminal(&request.stdout).and_then(|mut tty| tty.write_all(line.as_bytes()));
        OWN_FAILURE
    });
    hand_back(&request.status, code);
    power_off();
}

/// Prepares the system and runs the command; gives its exit status.
fn serve(request: &Request) -> Result<u8, String> {
    for folder in &request.tmpfs {
        fs::create_dir_all(folder).map_err(|e| format!("create {}: {e}", folder.display()))?;
        let target = folder.to_string_lossy();
        mount("tmpfs", &target, "tmpfs", "mode=1777").map_err(|e| format!("tmpfs on {target}: {e}"))?;
    }
    for module in &request.modules {
        load_module(module).map_err(|e| format!("load {}: {e}", module.display()))?;
    }
    raise_limit(libc::RLIMIT_NOFILE, OPEN_FILES)?;
    raise_limit(libc::RLIMIT_MEMLOCK, libc::RLIM_INFINITY)?;
    bring_up_loopback().map_err(|e| format!("bring up lo: {e}"))?;
    run(request)
}

/// Everything the kernel offers as files. What a kernel lacks is left out: the tests say what they miss.
fn mount_kernel_filesystems() {
    let table = [
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devtmpfs", "/dev", ""),
        ("devpts", "/dev/pts", "ptmxmode=0666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", ""),
        ("bpf", "/sys/fs/bpf", ""),
        ("securityfs", "/sys/kernel/security", ""),
        ("debugfs", "/sys/kernel/debug", ""),
        ("tracefs", "/sys/kernel/tracing", ""),
    ];
    for (kind, target, options) in table {
        if kind != "devtmpfs" || !Path::new("/dev/tty").exists() {
            // Only folders that are missing in /dev and in an image are made; sysfs makes its own.
            let _ = fs::create_dir_all(target);
            let _ = mount(kind, target, kind, options);
        }
    }
    let links = [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ];
    for (name, target) in links {
        let _ = symlink(target, Path::new("/dev").join(name));
    }
}

fn mount(source: &str, target: &str, kind: &str, options: &str) -> io::Result<()> {
    let text = |s: &str| CString::new(s).map_err(io::Error::other);
    let (source, target, kind, options) = (text(source)?, text(target)?, text(kind)?, text(options)?);
    // SAFETY: four NUL-terminated strings that live until the call returns.
    check(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) })
}

/// Loads one module. That it is there already, or drives what this processor lacks, is no failure.
fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: an open descriptor, an empty string constant, no flags.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match check(result) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EEXIST | libc::ENODEV)) => Ok(()),
        other => other,
    }
}

fn raise_limit(resource: libc::__rlimit_resource_t, to: u64) -> Result<(), String> {
    let limit = libc::rlimit { rlim_cur: to, rlim_max: to };
    // SAFETY: the kernel only reads the struct, which lives until the call returns.
    check(unsafe { libc::setrlimit(resource, &raw const limit) }).map_err(|e| format!("raise limit {resource}: {e}"))
}

/// The kernel gives the interface 127.0.0.1 and ::1 by itself as soon as it is up.
fn bring_up_loopback() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: zeroes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which lives until the call returns.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
}

fn run(request: &Request) -> Result<u8, String> {
    let (program, arguments) = request.command.split_first().ok_or("no command")?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(request.env.iter().map(|(k, v)| (k, v)));
    command.current_dir(&request.cwd).stdin(Stdio::null());
    // The search for the program uses our own PATH, not the one that the command is given.
    if let Some((_, path)) = request.env.iter().find(|(name, _)| name == "PATH") {
        // SAFETY: no other thread has been started yet, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var("PATH", path) };
    }
    let (out_read, out_write) = io::pipe().map_err(|e| format!("pipe: {e}"))?;
    let clone = out_write.try_clone().map_err(|e| format!("pipe: {e}"))?;
    let mut streams: Vec<(Box<dyn Read + Send>, File)> = Vec::new();
    let terminal = |path: &Path| open_terminal(path).map_err(|e| format!("open {}: {e}", path.display()));
    command.stdout(out_write).stderr(clone);
    streams.push((Box::new(out_read), terminal(&request.stdout)?));
    if let Some(path) = &request.stderr {
        let (err_read, err_write) = io::pipe().map_err(|e| format!("pipe: {e}"))?;
        command.stderr(err_write);
        streams.push((Box::new(err_read), terminal(path)?));
    }
    let child = match command.spawn() {
        Ok(child) => child,
        Err(e) => {
            // What a shell answers for a command that is not there, or cannot be executed.
            let code = if e.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
            let line = format!("{}: {e}\n", program.to_string_lossy());
            let (_, mut terminal) = streams.pop().ok_or("no terminal")?;
            let _ = terminal.write_all(line.as_bytes()).and_then(|()| drain(&terminal));
            return Ok(code);
        }
    };
    drop(command); // and with it our copies of the pipes' writing ends
    Ok(stream_until_exit(&child, streams))
}

/// Copies the output until the command has ended, and reaps whatever ends before it.
fn stream_until_exit(child: &Child, streams: Vec<(Box<dyn Read + Send>, File)>) -> u8 {
    let (done, finished) = mpsc::channel();
    let count = streams.len();
    for (mut from, mut to) in streams {
        let done = done.clone();
        std::thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = drain(&to);
            let _ = done.send(());
        });
    }
    let wanted = child.id().cast_signed();
    let code = loop {
        let mut status = 0;
        // SAFETY: the kernel writes one int, which lives until the call returns.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if pid == wanted {
            break exit_code(status);
        }
        if pid < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ECHILD) {
            break OWN_FAILURE;
        }
    };
    for _ in 0..count {
        let _ = finished.recv_timeout(Duration::from_millis(ORPHAN_OUTPUT_MS));
    }
    code
}

fn exit_code(status: i32) -> u8 {
    let code = if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) };
    u8::try_from(code).unwrap_or(OWN_FAILURE)
}

/// Opens a terminal for writing, and takes from it whatever would change a byte on the way.
fn open_terminal(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    // SAFETY: zeroes are a valid termios; the calls read and write that one struct.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        check(libc::tcgetattr(file.as_raw_fd(), &raw mut settings))?;
        libc::cfmakeraw(&raw mut settings);
        check(libc::tcsetattr(file.as_raw_fd(), libc::TCSANOW, &raw const settings))?;
    }
    Ok(file)
}

/// Waits until the terminal has sent everything: powering off loses what it still holds.
fn drain(terminal: &File) -> io::Result<()> {
    // SAFETY: an open descriptor.
    check(unsafe { libc::tcdrain(terminal.as_raw_fd()) })
}

fn hand_back(status: &Status, code: u8) {
    match status {
        Status::DebugExitPort => debug_exit(code.min(DEBUG_EXIT_MAX) + 1),
        Status::File(path) => {
            let written = File::create(path).and_then(|mut file| {
                file.write_all(code.to_string().as_bytes())?;
                file.sync_all()
            });
            if let Err(e) = written {
                let _ = fs::write("/dev/kmsg", format!("<2>tlsplice-init: {}: {e}", path.display()));
            }
        }
    }
}

/// Ends the machine with this value; returns only where there is no such device.
#[cfg(target_arch = "x86_64")]
fn debug_exit(value: u8) {
    // SAFETY: asks the kernel for one port; refused, it answers an error.
    if unsafe { libc::ioperm(DEBUG_EXIT_PORT.into(), 1, 1) } == 0 {
        // SAFETY: the kernel has just granted this port, and writing to it touches no memory.
        unsafe { std::arch::asm!("out dx, al", in("dx") DEBUG_EXIT_PORT, in("al") value, options(nomem, nostack)) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn debug_exit(_value: u8) {
    let _ = DEBUG_EXIT_PORT;
}

fn power_off() -> ! {
    // SAFETY: neither call takes memory of ours.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    std::process::exit(OWN_FAILURE.into());
}

fn check<T: Into<i64>>(result: T) -> io::Result<()> {
    if result.into() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
