//! Finds out, once at start, what this kernel's TLS can do; the relay is given the answers and asks for no version.
//!
//!   loopback pair ─▶ ULP? ─▶ each suite, each direction? ─▶ keys again? ─▶ short splices whole? ─▶ padded records whole?
//!                 ─▶ partial records quiet?
//!
//! What pays here cannot be tried at start; it comes from a table in `cost.rs`.

pub mod cost;

use self::cost::Costs;
use crate::protect::{HEADER_BYTES, OVERHEAD_BYTES, Protection};
use crate::sys::ktls::{self, Direction, Keys, content_type};
use crate::sys::pipe::Pipe;
use crate::sys::socket;
use rustls::crypto::aws_lc_rs::cipher_suite as suites;
use rustls::{ConnectionTrafficSecrets, SupportedCipherSuite};
use serde::Serialize;
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;

/// What the running kernel offers.
#[derive(Debug, Clone, Serialize)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// `None`: TCP_ULP "tls" works. Else why not, in words for people.
    pub no_ulp: Option<String>,
    pub suites: Vec<SuiteSupport>,
    /// Keys can be set again (KeyUpdate), 6.14 and later.
    pub rekey: bool,
    /// A splice out of a TLS socket that the pipe cuts short loses nothing: records may be gathered in one pipe.
    pub short_splice_safe: bool,
    /// Records of TLS 1.3 are opened right where recvmsg wants them (TLS_RX_EXPECT_NO_PAD), and those that are padded all the
    /// same are whole: 6.18.15 gives their padding for data, and overwrites what follows.
    pub opens_in_place: bool,
    /// A poll reports a partial record as readable (6.1): SO_RCVLOWAT has to stand in.
    pub partial_record_wakes: bool,
    /// What pays here.
    pub costs: Costs,
}

/// One suite, as `TLS1.3 AES-256-GCM`, and its two directions.
#[derive(Debug, Clone, Serialize)]
pub struct SuiteSupport {
    pub name: &'static str,
    pub tx: bool,
    pub rx: bool,
}

/// Every pair of version and cipher that a policy can negotiate; authentication makes no difference to the kernel.
static PROBED: [(&str, SupportedCipherSuite); 6] = [
    ("TLS1.3 AES-256-GCM", suites::TLS13_AES_256_GCM_SHA384),
    ("TLS1.3 AES-128-GCM", suites::TLS13_AES_128_GCM_SHA256),
    ("TLS1.3 CHACHA20-POLY1305", suites::TLS13_CHACHA20_POLY1305_SHA256),
    ("TLS1.2 AES-256-GCM", suites::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
    ("TLS1.2 AES-128-GCM", suites::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
    ("TLS1.2 CHACHA20-POLY1305", suites::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256),
];

impl Kernel {
    /// Probes with loopback socket pairs; a few milliseconds. Loads the `tls` module where the caller may (CAP_NET_ADMIN).
    pub fn probe() -> Self {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
        let costs = Costs::of(&release);
        let no_ulp = Pair::new().and_then(|p| ktls::attach(p.near.as_fd())).err().map(|e| match e.raw_os_error() {
            Some(libc::ENOENT) => {
                "the kernel has no tls module, or it is not loaded and only root may load it".to_owned()
            }
            _ => format!("setsockopt(TCP_ULP, \"tls\"): {e}"),
        });
        if no_ulp.is_some() {
            let none = |(name, _): &(&'static str, _)| SuiteSupport { name, tx: false, rx: false };
            let suites = PROBED.iter().map(none).collect();
            return Self {
                release,
                no_ulp,
                suites,
                rekey: false,
                short_splice_safe: false,
                opens_in_place: false,
                partial_record_wakes: true,
                costs,
            };
        }
        let suites = PROBED.iter().map(|&(name, suite)| SuiteSupport {
            name,
            tx: accepts(suite, Direction::Tx).unwrap_or(false),
            rx: accepts(suite, Direction::Rx).unwrap_or(false),
        });
        Self {
            release,
            no_ulp,
            suites: suites.collect(),
            rekey: accepts_again().unwrap_or(false),
            short_splice_safe: short_splices_are_whole().unwrap_or(false),
            opens_in_place: padded_records_are_whole().unwrap_or(false),
            partial_record_wakes: partial_record_wakes().unwrap_or(true),
            costs,
        }
    }

    /// Both directions of every suite of the policy work: what `offload = "require"` needs.
    pub fn offloads_everything(&self) -> bool {
        self.no_ulp.is_none() && !self.suites.is_empty() && self.suites.iter().all(|s| s.tx && s.rx)
    }

    /// Both directions of this suite work.
    pub fn offloads(&self, suite: SupportedCipherSuite) -> bool {
        let same = |other: SupportedCipherSuite| suite.version() == other.version() && cipher(suite) == cipher(other);
        let at = PROBED.iter().position(|(_, s)| same(*s));
        at.and_then(|i| self.suites.get(i)).is_some_and(|s| s.tx && s.rx)
    }
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum Cipher {
    Aes128Gcm,
    Aes256Gcm,
    ChaCha20Poly1305,
    Other,
}

fn cipher(suite: SupportedCipherSuite) -> Cipher {
    use rustls::CipherSuite as S;
    match suite.suite() {
        S::TLS13_AES_256_GCM_SHA384
        | S::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384
        | S::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => Cipher::Aes256Gcm,
        S::TLS13_AES_128_GCM_SHA256
        | S::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
        | S::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => Cipher::Aes128Gcm,
        S::TLS13_CHACHA20_POLY1305_SHA256
        | S::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
        | S::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => Cipher::ChaCha20Poly1305,
        _ => Cipher::Other,
    }
}

/// Two ends of one loopback connection, the near one non-blocking.
struct Pair {
    near: TcpStream,
    far: TcpStream,
}

impl Pair {
    fn new() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).or_else(|_| TcpListener::bind(("::1", 0)))?;
        let far = TcpStream::connect(listener.local_addr()?)?;
        let (near, _) = listener.accept()?;
        near.set_nonblocking(true)?;
        Ok(Self { near, far })
    }
}

/// Fixed keys: they protect nothing but the probe's own bytes on loopback.
fn keys(suite: SupportedCipherSuite) -> io::Result<Keys> {
    let version = match suite {
        SupportedCipherSuite::Tls12(_) => 0x0303,
        SupportedCipherSuite::Tls13(_) => 0x0304,
    };
    match cipher(suite) {
        Cipher::Aes256Gcm => Ok(Keys::fixed_aes_256_gcm(version)),
        Cipher::Aes128Gcm => Ok(Keys::fixed_aes_128_gcm(version)),
        Cipher::ChaCha20Poly1305 => Ok(Keys::fixed_chacha20_poly1305(version)),
        Cipher::Other => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn accepts(suite: SupportedCipherSuite, direction: Direction) -> io::Result<bool> {
    let pair = Pair::new()?;
    ktls::attach(pair.near.as_fd())?;
    keys(suite)?.install(pair.near.as_fd(), direction)?;
    Ok(true)
}

fn accepts_again() -> io::Result<bool> {
    let pair = Pair::new()?;
    let suite = suites::TLS13_AES_256_GCM_SHA384;
    ktls::attach(pair.near.as_fd())?;
    keys(suite)?.install(pair.near.as_fd(), Direction::Tx)?;
    match keys(suite)?.install(pair.near.as_fd(), Direction::Tx) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Reads records through a pipe of one page, so that every splice is cut short, and compares.
fn short_splices_are_whole() -> io::Result<bool> {
    const RECORDS: usize = 3;
    const RECORD: usize = 16384;
    let pair = Pair::new()?;
    let suite = suites::TLS13_AES_256_GCM_SHA384;
    ktls::attach(pair.far.as_fd())?;
    keys(suite)?.install(pair.far.as_fd(), Direction::Tx)?;
    ktls::attach(pair.near.as_fd())?;
    keys(suite)?.install(pair.near.as_fd(), Direction::Rx)?;
    let sent: Vec<u8> = (0..RECORDS * RECORD).map(|i| (i % 251) as u8).collect();
    (&pair.far).write_all(&sent)?;
    let pipe = Pipe::new(4096)?;
    let got = read_out(sent.len(), |into| {
        let mut inside = pipe.fill_from(pair.near.as_fd(), 1 << 16)?;
        let mut at = 0;
        while inside > 0 && at < into.len() {
            let n = pipe.read(&mut into[at..])?;
            at += n;
            inside = inside.saturating_sub(n);
        }
        Ok(at)
    })?;
    Ok(got == sent)
}

/// Sends records with padding and without, and receives them all together.
fn padded_records_are_whole() -> io::Result<bool> {
    const RECORDS: [(usize, usize); 5] = [(1000, 0), (500, 300), (16_000, 1), (1, 1000), (700, 0)];
    let pair = Pair::new()?;
    let suite = suites::TLS13_AES_256_GCM_SHA384;
    ktls::attach(pair.near.as_fd())?;
    keys(suite)?.install(pair.near.as_fd(), Direction::Rx)?;
    ktls::expect_no_padding(pair.near.as_fd())?;
    let (key, iv) = ktls::FIXED_AES_256_GCM;
    let secrets = ConnectionTrafficSecrets::Aes256Gcm { key: key.into(), iv: iv.into() };
    let mut protection = Protection::new(suite, 0, &secrets).ok_or(io::ErrorKind::Unsupported)?;
    let (mut sent, mut wire) = (Vec::new(), Vec::new());
    for (data, padding) in RECORDS {
        let mut record = vec![0; OVERHEAD_BYTES + data + padding];
        let plain = &mut record[HEADER_BYTES..];
        plain[..data].iter_mut().zip(1..).for_each(|(byte, n)| *byte = (n % 251) as u8);
        sent.extend_from_slice(&plain[..data]);
        // RFC 8446 section 5.4: the content type stands behind the data, and zeros behind it; the last of them is where
        // a record without padding has its type.
        let last = if padding > 0 { 0 } else { content_type::APPLICATION_DATA };
        plain[data] = content_type::APPLICATION_DATA;
        let len = protection.seal(last, &mut record, data + padding);
        wire.extend_from_slice(&record[..len]);
    }
    (&pair.far).write_all(&wire)?;
    Ok(read_out(sent.len(), |into| socket::recv(pair.near.as_fd(), into))? == sent)
}

/// Reads until so many bytes are there, or none have come for a while.
fn read_out(bytes: usize, mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> io::Result<Vec<u8>> {
    const SLACK: usize = 4096;
    let mut got = vec![0; bytes + SLACK];
    let (mut at, mut quiet) = (0, 0);
    while at < bytes && quiet < 100 {
        match read(&mut got[at..]) {
            Ok(0) => break,
            Ok(n) => at += n,
            Err(e) if socket::is_again(&e) => {
                quiet += 1;
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            Err(e) => return Err(e),
        }
    }
    got.truncate(at);
    Ok(got)
}

/// Sends the head of a record and asks whether a poll calls that readable.
fn partial_record_wakes() -> io::Result<bool> {
    let pair = Pair::new()?;
    ktls::attach(pair.near.as_fd())?;
    keys(suites::TLS13_AES_256_GCM_SHA384)?.install(pair.near.as_fd(), Direction::Rx)?;
    (&pair.far).write_all(&[23, 3, 3, 0, 64, 1, 2, 3, 4])?;
    // Loopback delivers within the send; the read makes the kernel look at the partial record first.
    std::thread::sleep(std::time::Duration::from_millis(2));
    let mut buffer = [0u8; 64];
    match socket::recv(pair.near.as_fd(), &mut buffer) {
        Err(e) if socket::is_again(&e) => {}
        Err(e) => return Err(e),
        Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
    }
    Ok(socket::poll_now(pair.near.as_fd(), libc::POLLIN)? & libc::POLLIN != 0)
}
