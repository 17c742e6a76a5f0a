//! The servers behind us.

pub mod connect;
