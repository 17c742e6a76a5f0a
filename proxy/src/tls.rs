//! The TLS side that is not per connection: what may be negotiated, and with which certificates.

pub mod certificates;
mod pem;
pub mod policy;
pub mod resolver;
