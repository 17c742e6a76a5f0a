//! What lies in a guest: the first process, the programs under test, other people's clients and servers, a shell.

use crate::image::Image;
use crate::kernels::Kernel;
use crate::peers::{self, STREAM_MODULE};
use crate::request::{DEFAULT_PATH, Request, Status};
use crate::{first_process, process, qemu};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Programs that every image has: clients, and what takes capabilities away, of which the shell's own is no match.
const PROGRAMS: [&str; 4] = ["openssl", "curl", "gnutls-cli", "setpriv"];
/// Where nginx's modules lie in the guest.
pub const NGINX_MODULES: &str = "/usr/lib/nginx/modules";
/// As on a host where tlsplice is not installed: there is no user of its name, and a test that is about users names one.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
    www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\n\
    nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\ntty:x:5:\nwww-data:x:33:\nnogroup:x:65534:\n";
const HOSTS: &str = "127.0.0.1 localhost\n::1 localhost ip6-localhost\n";
/// Enough for `openssl req`; nothing in it touches TLS, so a client offers what it offers by itself.
const OPENSSL: &str = "[req]\ndistinguished_name = name\n[name]\n";

/// Files of the host's to put into the guest, and what runs there.
#[derive(Clone, Debug)]
pub struct Contents {
    /// Place in the guest, file of the host's; libraries come along.
    pub programs: Vec<(PathBuf, PathBuf)>,
    /// The same, as they are.
    pub files: Vec<(PathBuf, PathBuf)>,
    pub env: Vec<(OsString, OsString)>,
    pub command: Vec<OsString>,
}

/// Writes the image for one kernel.
pub fn write(kernel: &Kernel, contents: &Contents, path: &Path) -> Result<()> {
    let mut image = Image::new();
    image.file("/init", &first_process::obtain()?)?;
    for (place, file) in &contents.files {
        image.file(place, file)?;
    }
    let mut modules = Vec::new();
    for (number, (name, content)) in (0..).zip(kernel.modules()?) {
        let place = PathBuf::from(format!("/usr/lib/modules/{number:02}-{name}"));
        image.content(&place, content, 0o644);
        modules.push(place);
    }
    system(&mut image)?;
    for (place, file) in &contents.programs {
        image.program(place, file)?;
    }
    let request = Request {
        modules,
        tmpfs: vec!["/tmp".into(), "/run".into()],
        env: contents.env.clone(),
        cwd: "/tmp".into(),
        command: contents.command.clone(),
        stdout: qemu::OUTPUT_TERMINAL.into(),
        stderr: None,
        status: Status::DebugExitPort,
    };
    image.content(DEFAULT_PATH, request.encode(), 0o600);
    image.write(path)
}

/// A small system: users, names, a shell, clients, nginx.
fn system(image: &mut Image) -> Result<()> {
    image.content("/etc/passwd", PASSWD, 0o644);
    image.content("/etc/group", GROUP, 0o644);
    image.content("/etc/hosts", HOSTS, 0o644);
    image.content("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n", 0o644);
    for place in ["/etc/ssl/openssl.cnf", "/usr/lib/ssl/openssl.cnf"] {
        image.content(place, OPENSSL, 0o644);
    }
    for program in PROGRAMS {
        let found = process::find(program).with_context(|| format!("{program} is missing: run cargo xtask setup"))?;
        image.program(Path::new("/usr/bin").join(program), &found)?;
    }
    let nginx = peers::nginx()?;
    image.program("/usr/sbin/nginx", &nginx.program)?;
    image.program(Path::new(NGINX_MODULES).join(STREAM_MODULE), &nginx.modules.join(STREAM_MODULE))?;
    for folder in ["/var/log/nginx", "/var/lib/nginx", "/var/www"] {
        image.folder(folder, 0o755);
    }
    // The shell comes last: its many names give way to the programs themselves.
    let busybox = process::find("busybox").context("busybox is missing: run cargo xtask setup")?;
    image.program("/usr/bin/busybox", &busybox)?;
    for applet in process::text(Command::new(&busybox).arg("--list"))?.lines() {
        image.link(Path::new("/usr/bin").join(applet), "busybox");
    }
    Ok(())
}
