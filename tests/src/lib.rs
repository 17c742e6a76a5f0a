//! The test harness: real servers and clients around the real program.
