pub mod access;
pub mod counters;
pub mod log;
pub mod metrics;
