//! tlsplice and the programs that it is measured against, each configured for the same work: TLS with one ECDSA certificate in
//! front, plain TCP to the same upstream behind, nothing logged, the same number of workers.

use crate::certificate::Certificate;
use crate::process::Running;
use crate::result::OURS;
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A program and how it works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// As it comes: the kernel takes over where it can and where that pays.
    Tlsplice,
    /// The same in mode "http", with a pool of upstream connections, as nginx http and HAProxy http have one.
    TlspliceHttp,
    /// Never the kernel.
    TlspliceUserspace,
    /// The kernel from the first byte.
    TlspliceKernel,
    /// The same, spliced both ways by the worker's own thread, whatever costs less on this kernel.
    TlspliceInline,
    /// The same, with splices on io_uring's own threads.
    TlspliceRing,
    NginxStream,
    NginxStreamKtls,
    NginxHttp,
    NginxHttpKtls,
    HaproxyTcp,
    HaproxyHttp,
    Hitch,
    /// No TLS: the floor.
    CopyRelay,
    SpliceRelay,
}

impl Peer {
    /// What takes part, on a kernel with or without TLS.
    pub fn line_up(kernel_tls: bool) -> Vec<Self> {
        let all = [
            Self::Tlsplice,
            Self::TlspliceHttp,
            Self::TlspliceUserspace,
            Self::TlspliceKernel,
            Self::TlspliceInline,
            Self::TlspliceRing,
            Self::NginxStream,
            Self::NginxStreamKtls,
            Self::NginxHttp,
            Self::NginxHttpKtls,
            Self::HaproxyTcp,
            Self::HaproxyHttp,
            Self::Hitch,
        ];
        all.into_iter().filter(|peer| kernel_tls || !peer.needs_kernel_tls()).collect()
    }

    /// Without kernel TLS these are what their neighbours are anyway.
    fn needs_kernel_tls(self) -> bool {
        match self {
            Self::TlspliceUserspace
            | Self::TlspliceKernel
            | Self::TlspliceInline
            | Self::TlspliceRing
            | Self::NginxStreamKtls
            | Self::NginxHttpKtls => true,
            Self::Tlsplice
            | Self::TlspliceHttp
            | Self::NginxStream
            | Self::NginxHttp
            | Self::HaproxyTcp
            | Self::HaproxyHttp
            | Self::Hitch
            | Self::CopyRelay
            | Self::SpliceRelay => false,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Tlsplice => OURS,
            Self::TlspliceHttp => "tlsplice-http",
            Self::TlspliceUserspace => "tlsplice-userspace",
            Self::TlspliceKernel => "tlsplice-kernel",
            Self::TlspliceInline => "tlsplice-inline",
            Self::TlspliceRing => "tlsplice-ring",
            Self::NginxStream => "nginx-stream",
            Self::NginxStreamKtls => "nginx-stream-ktls",
            Self::NginxHttp => "nginx-http",
            Self::NginxHttpKtls => "nginx-http-ktls",
            Self::HaproxyTcp => "haproxy-tcp",
            Self::HaproxyHttp => "haproxy-http",
            Self::Hitch => "hitch",
            Self::CopyRelay => "plain-copy",
            Self::SpliceRelay => "plain-splice",
        }
    }

    pub fn program(self) -> Program {
        match self {
            Self::Tlsplice
            | Self::TlspliceHttp
            | Self::TlspliceUserspace
            | Self::TlspliceKernel
            | Self::TlspliceInline
            | Self::TlspliceRing => Program::Tlsplice,
            Self::NginxStream | Self::NginxStreamKtls | Self::NginxHttp | Self::NginxHttpKtls => Program::Nginx,
            Self::HaproxyTcp | Self::HaproxyHttp => Program::Haproxy,
            Self::Hitch => Program::Hitch,
            Self::CopyRelay | Self::SpliceRelay => Program::Ourselves,
        }
    }

    /// Whether it speaks TLS at all.
    pub fn is_plain(self) -> bool {
        self.program() == Program::Ourselves
    }
}

/// What has to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Tlsplice,
    Nginx,
    Haproxy,
    Hitch,
    Ourselves,
}

/// Where the programs lie.
#[derive(Clone, Debug)]
pub struct Programs {
    pub tlsplice: Option<PathBuf>,
    /// Debian packages, unpacked with all that they need; absent: what the system has installed.
    pub root: Option<PathBuf>,
}

/// Connections that a peer is made ready for.
const MOST_CONNECTIONS: u64 = 20_000;
/// Where distributions have nginx's stream module, if it is not built in.
const STREAM_MODULES: [&str; 3] = [
    "usr/lib/nginx/modules/ngx_stream_module.so",
    "usr/lib64/nginx/modules/ngx_stream_module.so",
    "usr/share/nginx/modules/ngx_stream_module.so",
];
/// Where a Debian root has its libraries, on the architectures that we know.
const LIBRARIES: [&str; 4] =
    ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "lib/aarch64-linux-gnu"];
const LOADERS: [&str; 4] = [
    "lib64/ld-linux-x86-64.so.2",
    "usr/lib64/ld-linux-x86-64.so.2",
    "usr/lib/ld-linux-aarch64.so.1",
    "lib/ld-linux-aarch64.so.1",
];

impl Programs {
    /// The words that start a program: through its own loader and with its own libraries, if it comes from a folder.
    pub fn words(&self, program: Program) -> Result<Vec<OsString>> {
        let name = match program {
            Program::Tlsplice => {
                let found = self.tlsplice.clone().or_else(|| find("tlsplice"));
                return Ok(vec![found.context("no tlsplice: name it by --tlsplice")?.into()]);
            }
            Program::Ourselves => return Ok(vec![std::env::current_exe().context("find this program")?.into()]),
            Program::Nginx => "nginx",
            Program::Haproxy => "haproxy",
            Program::Hitch => "hitch",
        };
        let Some(root) = &self.root else {
            let found =
                find(name).with_context(|| format!("{name} is not installed and --peers-root was not given"))?;
            return Ok(vec![found.into()]);
        };
        let file = root.join("usr/sbin").join(name);
        if !file.exists() {
            bail!("{} does not exist", file.display());
        }
        let loader = LOADERS.iter().map(|path| root.join(path)).find(|path| path.exists());
        let loader = loader.with_context(|| format!("{} holds no dynamic loader", root.display()))?;
        let folders: Vec<OsString> = LIBRARIES.iter().map(|path| root.join(path).into_os_string()).collect();
        let folders = folders.join(OsString::from(":").as_os_str());
        Ok(vec![loader.into(), "--library-path".into(), folders, file.into()])
    }

    fn stream_module(&self) -> Option<PathBuf> {
        let root = self.root.as_deref().unwrap_or(Path::new("/"));
        STREAM_MODULES.map(|path| root.join(path)).into_iter().find(|path| path.exists())
    }

    /// The first line of what it says about its version.
    pub fn version(&self, program: Program) -> Result<String> {
        let words = self.words(program)?;
        let option = match program {
            Program::Nginx | Program::Haproxy => "-v",
            Program::Tlsplice | Program::Hitch | Program::Ourselves => "--version",
        };
        let mut command = Command::new(&words[0]);
        let output = command.args(&words[1..]).arg(option).env("OPENSSL_CONF", "/dev/null").output();
        let output = output.with_context(|| format!("start {}", words[0].display()))?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        match text.lines().next() {
            Some(line) if output.status.success() => Ok(line.trim().to_owned()),
            _ => bail!("it does not start: {}", text.trim()),
        }
    }
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// What all peers of a run share.
#[derive(Clone, Debug)]
pub struct Setup {
    pub programs: Programs,
    pub certificate: Certificate,
    pub upstream: SocketAddr,
    pub workers: usize,
    pub cpus: Option<Vec<usize>>,
    /// They end when we do, whatever ends us; a guest that goes off needs no such thing, and its small tools have none.
    pub bound_to_us: bool,
    /// How many descriptors a process may have.
    pub descriptors: u64,
    /// For configurations and logs.
    pub folder: PathBuf,
    pub kernel_tls: bool,
}

/// A peer that runs.
#[derive(Debug)]
pub struct Started {
    pub peer: Peer,
    pub address: SocketAddr,
    pub process: Running,
}

impl Setup {
    /// Starts a peer on a free port.
    pub fn start(&self, peer: Peer) -> Result<Started> {
        let address = free_address()?;
        let folder = self.folder.join(peer.name());
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let mut words: Vec<OsString> = Vec::new();
        if self.bound_to_us {
            words.extend(["setpriv", "--pdeathsig", "TERM", "--"].map(OsString::from));
        }
        if let Some(cpus) = &self.cpus {
            words.extend(["taskset".into(), "-c".into(), listed(cpus).into()]);
        }
        words.extend(self.programs.words(peer.program())?);
        words.extend(self.arguments(peer, address, &folder)?);
        let mut command = Command::new(&words[0]);
        // The system's own settings of OpenSSL may restrict what a newer one is here to show.
        command.args(&words[1..]).env("OPENSSL_CONF", "/dev/null").current_dir(&folder);
        let process = Running::start(&mut command, folder.join("log"), address)
            .with_context(|| format!("start {}", peer.name()))?;
        Ok(Started { peer, address, process })
    }

    fn arguments(&self, peer: Peer, address: SocketAddr, folder: &Path) -> Result<Vec<OsString>> {
        let config = folder.join("config");
        let write = |text: String| fs::write(&config, text).with_context(|| format!("write {}", config.display()));
        let file = config.clone().into_os_string();
        match peer.program() {
            Program::Tlsplice => {
                write(self.tlsplice(peer, address))?;
                Ok(vec!["run".into(), "--config".into(), file])
            }
            Program::Nginx => {
                write(self.nginx(peer, address, folder))?;
                Ok(vec!["-c".into(), file, "-e".into(), folder.join("error.log").into(), "-p".into(), folder.into()])
            }
            Program::Haproxy => {
                write(self.haproxy(if peer == Peer::HaproxyHttp { "http" } else { "tcp" }, address))?;
                Ok(vec!["-f".into(), file])
            }
            Program::Hitch => {
                write(self.hitch(address))?;
                let mut option = OsString::from("--config=");
                option.push(&config);
                Ok(vec![option])
            }
            Program::Ourselves => {
                Ok(relay(if peer == Peer::SpliceRelay { "splice" } else { "copy" }, address, self.upstream))
            }
        }
    }

    fn tlsplice(&self, peer: Peer, address: SocketAddr) -> String {
        let offload = match peer {
            Peer::TlspliceUserspace => "offload = \"off\"\n",
            Peer::TlspliceKernel | Peer::TlspliceInline | Peer::TlspliceRing => {
                "offload = \"require\"\noffload_after = 0\n"
            }
            _ if self.kernel_tls => "offload = \"require\"\n",
            _ => "offload = \"off\"\n",
        };
        let splice = match peer {
            Peer::TlspliceInline => "inline",
            Peer::TlspliceRing => "ring",
            _ => "auto",
        };
        let (chain, key) = (&self.certificate.chain, &self.certificate.key);
        let mode = if peer == Peer::TlspliceHttp { "mode = \"http\"\n" } else { "" };
        format!(
            "[server]\nworkers = {}\nsplice = \"{splice}\"\n{}[tls]\ncertificates = [{:?}, {:?}]\n[log]\nlevel = \"warn\"\n\
             [[listener]]\naddress = \"{address}\"\n{mode}{offload}upstream = \"u\"\n\
             [[upstream]]\nname = \"u\"\nservers = [\"{}\"]\n",
            self.workers,
            // A user of that name may exist here; the files of a run are ours alone.
            if is_root() { "user = \"root\"\n" } else { "" },
            chain.display().to_string(),
            key.display().to_string(),
            self.upstream
        )
    }

    fn nginx(&self, peer: Peer, address: SocketAddr, folder: &Path) -> String {
        let ktls = matches!(peer, Peer::NginxStreamKtls | Peer::NginxHttpKtls);
        let (chain, key) = (self.certificate.chain.display(), self.certificate.key.display());
        let tls = format!(
            "listen {address} ssl backlog=4096; ssl_certificate {chain}; ssl_certificate_key {key}; \
             ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache off;{}",
            if ktls { " ssl_conf_command Options KTLS;" } else { "" }
        );
        let folder = folder.display();
        let mut text = String::new();
        let stream = matches!(peer, Peer::NginxStream | Peer::NginxStreamKtls);
        if stream && let Some(module) = self.programs.stream_module() {
            let _ = writeln!(text, "load_module {};", module.display());
        }
        if is_root() {
            text.push_str("user root;\n");
        }
        let _ = write!(
            text,
            "daemon off; worker_processes {}; pid {folder}/pid; error_log {folder}/error.log warn;\n\
             events {{ worker_connections {}; }}\n",
            self.workers,
            (self.descriptors / 3).min(MOST_CONNECTIONS)
        );
        if stream {
            let _ = writeln!(text, "stream {{ server {{ {tls} proxy_pass {}; }} }}", self.upstream);
            return text;
        }
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|what| format!("{what}_temp_path {folder}/{what}; "))
            .collect();
        let _ = write!(
            text,
            "http {{ access_log off; {temporary}keepalive_requests 1000000000; keepalive_timeout 600s; \
             client_max_body_size 0;\n upstream u {{ server {}; keepalive 128; keepalive_requests 1000000000; }}\n \
             server {{ {tls}\n  location / {{ proxy_pass http://u; proxy_http_version 1.1; proxy_set_header Connection \
             ''; proxy_request_buffering off; proxy_max_temp_file_size 0; }} }} }}\n",
            self.upstream
        );
        text
    }

    fn haproxy(&self, mode: &str, address: SocketAddr) -> String {
        let reuse = if mode == "http" { " option http-keep-alive\n http-reuse always\n" } else { "" };
        format!(
            "global\n nbthread {}\n maxconn {}\n tune.ssl.cachesize 0\ndefaults\n mode {mode}\n timeout client 600s\n \
             timeout server 600s\n timeout connect 5s\n option splice-auto\n{reuse}\
             frontend f\n bind {address} ssl crt {} ssl-min-ver TLSv1.2 backlog 4096\n default_backend b\n\
             backend b\n server s {}\n",
            self.workers,
            // It refuses to start without two and a half descriptors for each.
            (self.descriptors / 3).min(MOST_CONNECTIONS),
            self.certificate.both.display(),
            self.upstream
        )
    }

    fn hitch(&self, address: SocketAddr) -> String {
        let user = if is_root() { "user = \"root\"\n" } else { "" };
        format!(
            "frontend = \"[{}]:{}\"\nbackend = \"[{}]:{}\"\npem-file = {:?}\nworkers = {}\nbacklog = 4096\ndaemon = off\n\
             quiet = on\ntls-protos = TLSv1.2 TLSv1.3\n{user}",
            address.ip(),
            address.port(),
            self.upstream.ip(),
            self.upstream.port(),
            self.certificate.both.display().to_string(),
            self.workers,
        )
    }
}

fn relay(mode: &str, listen: SocketAddr, upstream: SocketAddr) -> Vec<OsString> {
    let (listen, upstream) = (listen.to_string(), upstream.to_string());
    ["plain-relay", "--mode", mode, "--listen", &listen, "--upstream", &upstream].map(OsString::from).to_vec()
}

/// As `taskset -c` takes them.
pub fn listed(cpus: &[usize]) -> String {
    cpus.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// An address of loopback that nobody listens on.
pub fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    listener.local_addr().context("find a free port")
}
