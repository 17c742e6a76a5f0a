//! Kernel TLS on one socket (Documentation/networking/tls.rst, net/tls/tls_main.c): keys in, control records both ways.

use super::cvt;
use super::socket::set_option;
use crate::tls::traffic::{IV_BYTES, NextKey};
use ktls_sys::bindings as sys;
use rustls::{CipherSuite, ConnectionTrafficSecrets, SupportedCipherSuite};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd};
use zeroize::Zeroize;

const SOL_TLS: libc::c_int = 282;
/// On the wire and in `tls_crypto_info`.
const TLS_1_3: u16 = 0x0304;
const TLS_TX: libc::c_int = 1;
const TLS_RX: libc::c_int = 2;
const TLS_RX_EXPECT_NO_PAD: libc::c_int = 4;
const TLS_SET_RECORD_TYPE: libc::c_int = 1;
const TLS_GET_RECORD_TYPE: libc::c_int = 2;

/// Key and iv that protect nothing, for the probe.
pub const FIXED_AES_256_GCM: ([u8; 32], [u8; IV_BYTES]) = ([7; 32], FIXED_IV);
const FIXED_IV: [u8; IV_BYTES] = [9; IV_BYTES];

/// Which of a socket's two keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Tx,
    Rx,
}

/// Content types of RFC 8446 section 5.1.
pub mod content_type {
    pub const ALERT: u8 = 21;
    pub const HANDSHAKE: u8 = 22;
    pub const APPLICATION_DATA: u8 = 23;
}

/// Makes the socket a TLS socket without keys. ENOENT: no `tls` module; ENOTCONN: not established; EEXIST: done before.
pub fn attach(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls")
}

/// The kernel's form of one direction's key, iv and record sequence. Erased when dropped.
pub struct Keys(ktls::CryptoInfo);

impl Keys {
    /// `None`: the kernel has no such suite.
    pub fn new(
        suite: SupportedCipherSuite,
        direction: Direction,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Option<Self> {
        let mut info = ktls::CryptoInfo::from_rustls(suite, (sequence, secrets)).ok()?;
        if direction == Direction::Tx && matches!(suite, SupportedCipherSuite::Tls12(_)) {
            match &mut info {
                ktls::CryptoInfo::AesGcm128(i) => i.iv = fresh_explicit_nonce(i.iv),
                ktls::CryptoInfo::AesGcm256(i) => i.iv = fresh_explicit_nonce(i.iv),
                ktls::CryptoInfo::Chacha20Poly1305(_)
                | ktls::CryptoInfo::AesCcm128(_)
                | ktls::CryptoInfo::Sm4Gcm(_)
                | ktls::CryptoInfo::Sm4Ccm(_) => {}
            }
        }
        Some(Self(info))
    }

    /// Of a key that followed another, in TLS 1.3. `None`: the kernel has no such suite.
    pub fn next(suite: SupportedCipherSuite, next: &NextKey, sequence: u64) -> Option<Self> {
        let raw = Raw { version: TLS_1_3, iv: next.iv, sequence };
        match suite.suite() {
            CipherSuite::TLS13_AES_128_GCM_SHA256 => Some(raw.aes_128_gcm(next.key().try_into().ok()?)),
            CipherSuite::TLS13_AES_256_GCM_SHA384 => Some(raw.aes_256_gcm(next.key().try_into().ok()?)),
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => Some(raw.chacha20_poly1305(next.key().try_into().ok()?)),
            _ => None,
        }
    }

    /// Keys that protect nothing, for the probe; `version` as on the wire, 0x0303 or 0x0304.
    pub fn fixed_aes_128_gcm(version: u16) -> Self {
        Raw::fixed(version).aes_128_gcm([7; 16])
    }

    /// As `fixed_aes_128_gcm`.
    pub fn fixed_aes_256_gcm(version: u16) -> Self {
        Raw::fixed(version).aes_256_gcm(FIXED_AES_256_GCM.0)
    }

    /// As `fixed_aes_128_gcm`.
    pub fn fixed_chacha20_poly1305(version: u16) -> Self {
        Raw::fixed(version).chacha20_poly1305([7; 32])
    }

    /// Gives the keys to the kernel. EBUSY: they are set and this kernel cannot change them.
    pub fn install(self, socket: BorrowedFd<'_>, direction: Direction) -> io::Result<()> {
        let name = match direction {
            Direction::Tx => TLS_TX,
            Direction::Rx => TLS_RX,
        };
        // SAFETY: CryptoInfo's own pointer and size describe the struct that it holds, and the kernel only reads it.
        let r = unsafe {
            libc::setsockopt(socket.as_raw_fd(), SOL_TLS, name, self.0.as_ptr(), self.0.size() as libc::socklen_t)
        };
        cvt(r).map(drop)
    }
}

/// Lets the kernel open records of TLS 1.3 right where recvmsg(2) wants them, without a copy (6.0 and later; TLS_RX must be
/// set). A record with padding is opened twice then. Of TLS 1.2 the kernel knows that it has none: EINVAL.
pub fn expect_no_padding(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_option(socket, SOL_TLS, TLS_RX_EXPECT_NO_PAD, &1u32.to_ne_bytes())
}

/// What the kernel's structs have beside the key.
struct Raw {
    version: u16,
    /// AES-GCM's salt is its front.
    iv: [u8; IV_BYTES],
    sequence: u64,
}

impl Raw {
    fn fixed(version: u16) -> Self {
        Self { version, iv: FIXED_IV, sequence: 0 }
    }

    fn info(&self, cipher_type: u32) -> sys::tls_crypto_info {
        sys::tls_crypto_info { version: self.version, cipher_type: cipher_type as u16 }
    }

    fn salt_and_iv(&self) -> ([u8; 4], [u8; 8]) {
        let [a, b, c, d, iv @ ..] = self.iv;
        ([a, b, c, d], iv)
    }

    fn aes_128_gcm(&self, key: [u8; 16]) -> Keys {
        let (salt, iv) = self.salt_and_iv();
        let (info, rec_seq) = (self.info(sys::TLS_CIPHER_AES_GCM_128), self.sequence.to_be_bytes());
        Keys(ktls::CryptoInfo::AesGcm128(sys::tls12_crypto_info_aes_gcm_128 { info, iv, key, salt, rec_seq }))
    }

    fn aes_256_gcm(&self, key: [u8; 32]) -> Keys {
        let (salt, iv) = self.salt_and_iv();
        let (info, rec_seq) = (self.info(sys::TLS_CIPHER_AES_GCM_256), self.sequence.to_be_bytes());
        Keys(ktls::CryptoInfo::AesGcm256(sys::tls12_crypto_info_aes_gcm_256 { info, iv, key, salt, rec_seq }))
    }

    fn chacha20_poly1305(&self, key: [u8; 32]) -> Keys {
        Keys(ktls::CryptoInfo::Chacha20Poly1305(sys::tls12_crypto_info_chacha20_poly1305 {
            info: self.info(sys::TLS_CIPHER_CHACHA20_POLY1305),
            iv: self.iv,
            key,
            salt: sys::__IncompleteArrayField::new(),
            rec_seq: self.sequence.to_be_bytes(),
        }))
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        match &mut self.0 {
            ktls::CryptoInfo::AesGcm128(i) => i.key.zeroize(),
            ktls::CryptoInfo::AesGcm256(i) => i.key.zeroize(),
            ktls::CryptoInfo::Chacha20Poly1305(i) => i.key.zeroize(),
            ktls::CryptoInfo::AesCcm128(i) => i.key.zeroize(),
            ktls::CryptoInfo::Sm4Gcm(i) => i.key.zeroize(),
            ktls::CryptoInfo::Sm4Ccm(i) => i.key.zeroize(),
        }
    }
}

/// The explicit nonce at which the kernel starts to count in TLS 1.2 AES-GCM.
///
/// rustls sends `iv XOR sequence` and has used sequence 0 for its Finished; the kernel counts up from what it is
/// given and would start at that very nonce again. The value here is beyond all that an XOR with a sequence below
/// 2^32 can reach, whatever was sent under this key before. RFC 5288 section 3 leaves the choice to the sender.
fn fresh_explicit_nonce(iv: [u8; 8]) -> [u8; 8] {
    (u64::from_be_bytes(iv) | 0xffff_ffff).wrapping_add(1).to_be_bytes()
}

/// The sequence number of the next record in one direction.
pub fn record_sequence(socket: BorrowedFd<'_>, direction: Direction) -> io::Result<u64> {
    let name = match direction {
        Direction::Tx => TLS_TX,
        Direction::Rx => TLS_RX,
    };
    // The answer must be asked for in the cipher's own size: header 4, then iv, key, salt, sequence.
    const HEADER: usize = 4;
    const SIZES: [(u16, usize); 3] = [(51, 40), (52, 56), (54, 56)];
    let mut buffer = [0u8; 64];
    let read = |buffer: &mut [u8; 64], size: usize| {
        let mut len = size as libc::socklen_t;
        // SAFETY: `len` is at most the size of `buffer`, which outlives the call.
        cvt(unsafe { libc::getsockopt(socket.as_raw_fd(), SOL_TLS, name, buffer.as_mut_ptr().cast(), &mut len) })
    };
    read(&mut buffer, HEADER)?;
    let cipher = u16::from_ne_bytes([buffer[2], buffer[3]]);
    let (_, size) = *SIZES.iter().find(|(id, _)| *id == cipher).ok_or(io::ErrorKind::Unsupported)?;
    let result = read(&mut buffer, size);
    let mut sequence = [0u8; 8];
    sequence.copy_from_slice(&buffer[size - 8..size]);
    buffer.zeroize();
    result.map(|_| u64::from_be_bytes(sequence))
}

/// What recvmsg(2) found at the head of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Bytes of a record of this content type.
    Record { content_type: u8, len: usize },
    /// The end of the TCP stream.
    Eof,
}

/// Room for a control message with one byte, aligned as cmsghdr asks.
#[repr(C, align(8))]
struct ControlSpace([u8; 64]);

/// recvmsg(2) without waiting, with the record's content type.
pub fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Received> {
    let mut control = ControlSpace([0; 64]);
    let mut iov = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: an all-zero msghdr is a valid value of that plain C struct.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = size_of::<ControlSpace>() as _;
    // SAFETY: the message points at `into` and `control`, both borrowed for the call, with their true sizes.
    let len = cvt(unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })?;
    // SAFETY: the kernel filled `message`; CMSG_FIRSTHDR checks that a whole header is there.
    let header = unsafe { libc::CMSG_FIRSTHDR(&message) };
    if header.is_null() {
        // Only the end of the stream comes without a type (net/tls/tls_sw.c, tls_record_content_type).
        return Ok(if len == 0 {
            Received::Eof
        } else {
            Received::Record { content_type: content_type::APPLICATION_DATA, len }
        });
    }
    // SAFETY: `header` is not null, so it lies whole inside `control`, and its data follows it there.
    let (level, kind, value) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, *libc::CMSG_DATA(header)) };
    if level != SOL_TLS || kind != TLS_GET_RECORD_TYPE {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Received::Record { content_type: value, len })
}

/// Sends one record of a content type other than data, whole or not at all (EAGAIN).
pub fn send_record(socket: BorrowedFd<'_>, content_type: u8, body: &[u8]) -> io::Result<()> {
    let mut control = ControlSpace([0; 64]);
    let mut iov = libc::iovec { iov_base: body.as_ptr().cast_mut().cast(), iov_len: body.len() };
    // SAFETY: as in `receive`.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: CMSG_SPACE and CMSG_LEN only compute; CMSG_FIRSTHDR points into `control`, which has room for one byte.
    unsafe {
        message.msg_controllen = libc::CMSG_SPACE(1) as _;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = SOL_TLS;
        (*header).cmsg_type = TLS_SET_RECORD_TYPE;
        (*header).cmsg_len = libc::CMSG_LEN(1) as _;
        *libc::CMSG_DATA(header) = content_type;
        message.msg_controllen = (*header).cmsg_len;
    }
    // SAFETY: the message points at `body`, which the kernel only reads, and at `control`, with their true sizes.
    let sent = cvt(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) })?;
    if sent == body.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use super::fresh_explicit_nonce;

    #[test]
    fn explicit_nonce_is_beyond_every_xor_with_a_small_sequence() {
        for iv in [0u64, 1, u64::MAX, 0x1234_5678_9abc_def0, 0xffff_ffff_0000_0000, 0x0000_0000_ffff_ffff] {
            let first = u64::from_be_bytes(fresh_explicit_nonce(iv.to_be_bytes()));
            // Counting up from `first` stays outside iv XOR [0, 2^32) for 2^32 records and more.
            for n in [0u64, 1, 1 << 24, (1 << 32) - 1] {
                assert_ne!(first.wrapping_add(n) >> 32, iv >> 32, "iv {iv:x} n {n}");
            }
        }
    }
}
