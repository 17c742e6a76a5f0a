//! The proxy's pure modules by themselves: a fuzzer's build needs neither the ring nor the cryptography.
#![allow(dead_code, reason = "each target uses some of them")]

#[path = "../../../proxy/src/http/chunk.rs"]
pub mod chunk;
#[path = "../../../proxy/src/http/field.rs"]
pub mod field;
#[path = "../../../proxy/src/http/framing.rs"]
pub mod framing;
#[path = "../../../proxy/src/http/head.rs"]
pub mod head;
#[path = "../../../proxy/src/http/refusal.rs"]
pub mod refusal;
#[path = "../../../proxy/src/http/request.rs"]
pub mod request;
#[path = "../../../proxy/src/http/response.rs"]
pub mod response;
#[path = "../../../proxy/src/http/target.rs"]
pub mod target;
