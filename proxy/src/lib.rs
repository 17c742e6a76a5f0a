//! A TLS terminator that hands the record layer to the kernel and splices the rest. See ARCHITECTURE.md.

pub mod command;
pub mod config;
pub mod control;
pub mod exit;
pub mod listen;
pub mod observe;
pub mod probe;
pub mod sys;
pub mod tls;
pub mod worker;
