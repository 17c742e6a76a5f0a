//! The commands, one file each. Each gives its exit code or the failure that has one.

pub mod run;
