//! Every system call that needs `unsafe`, each wrapped so that callers cannot misuse it.
#![allow(unsafe_code)]
