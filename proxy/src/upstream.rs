//! The servers behind us.

pub mod connect;
pub mod pool;
