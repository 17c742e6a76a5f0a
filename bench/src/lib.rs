//! The load generator, and the comparison of tlsplice with other terminators.
//!
//!   measure ─▶ peers (started, pinned) ◀─load─ client          result ─▶ table
//!      │              │                                           ├────▶ report (HTML)
//!      └─▶ process (their CPU, memory, calls)   upstream          └────▶ compare
//!
//! The generator (`load`) knows nothing of processes: it drives any address. What is measured beside it, and how often, is
//! up to `measure`.

pub mod certificate;
pub mod client;
pub mod compare;
pub mod curve;
#[path = "plugin/mark.rs"]
pub mod insn_mark;
pub mod load;
pub mod machine;
pub mod measure;
pub mod peers;
pub mod plain_relay;
pub mod process;
pub mod progress;
pub mod report;
pub mod result;
pub mod statistics;
pub mod table;
pub mod upstream;
