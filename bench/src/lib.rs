//! The load generator and the comparison with other terminators.
