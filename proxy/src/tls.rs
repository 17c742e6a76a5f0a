//! The TLS side that is not per connection: what may be negotiated, and with which certificates.

pub mod certificates;
pub mod der;
pub mod grade;
pub mod hello;
pub mod judge;
pub mod key_schedule;
pub mod ocsp;
pub mod pem;
pub mod policy;
pub mod resolver;
pub mod source;
pub mod tickets;
pub mod traffic;
pub mod x509;
