//! HTTP/1.1 between a client and an upstream, message by message (RFC 9110, RFC 9112).
//!
//!   head ─▶ edited head ─▶ upstream ─▶ head ─▶ edited head ─▶ client        bodies: framing says where they end
//!
//! Strict on both sides: what two readers could understand differently is refused, and what is passed on is written
//! anew, so that there is only one way to read it. HTTP/2 is not spoken here.

pub mod chunk;
mod download;
pub mod downstream;
pub mod exchange;
pub mod field;
pub mod framing;
pub mod head;
pub mod near;
pub mod redirect;
pub mod refusal;
pub mod request;
pub mod response;
pub mod serve;
pub mod target;
mod upload;
