//! A TLS terminator that hands the record layer to the kernel and splices the rest. See ARCHITECTURE.md.

pub mod accept;
pub mod close;
pub mod command;
pub mod config;
pub mod connection;
pub mod control;
pub mod doctor;
pub mod exit;
pub mod handshake;
pub mod http;
pub mod keepalive;
pub mod listen;
pub mod observe;
pub mod offload;
pub mod pipes;
pub mod probe;
pub mod protect;
pub mod relay;
pub mod ring;
pub mod send_room;
pub mod session;
pub mod sys;
pub mod tls;
pub mod upstream;
pub mod watch;
pub mod worker;
