//! Every system call that needs `unsafe`, each wrapped so that callers cannot misuse it.
#![allow(unsafe_code)]

pub mod bpf;
pub mod ktls;
pub mod limits;
pub mod pipe;
pub mod privilege;
pub mod socket;
pub mod wiped;

use std::io;

/// A system call's result: negative is an error in errno.
fn cvt<T: TryInto<usize>>(result: T) -> io::Result<usize> {
    result.try_into().map_err(|_| io::Error::last_os_error())
}
