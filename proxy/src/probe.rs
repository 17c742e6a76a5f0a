//! Finds out, once at start, what this kernel's TLS can do; the relay is given the answers and asks for no version.

use serde::Serialize;

/// What the running kernel offers.
#[derive(Debug, Clone, Serialize)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// `None`: TCP_ULP "tls" works. Else why not, in words for people.
    pub no_ulp: Option<String>,
    pub suites: Vec<SuiteSupport>,
    /// Keys can be set again (KeyUpdate), 6.14 and later.
    pub rekey: bool,
    /// A splice out of a TLS socket that the pipe cuts short loses nothing: records may be gathered in one pipe.
    pub short_splice_safe: bool,
    /// A poll reports a partial record as readable (6.1): SO_RCVLOWAT has to stand in.
    pub partial_record_wakes: bool,
}

/// One suite, as `TLS1.3 AES-256-GCM`, and its two directions.
#[derive(Debug, Clone, Serialize)]
pub struct SuiteSupport {
    pub name: &'static str,
    pub tx: bool,
    pub rx: bool,
}

impl Kernel {
    /// Probes with loopback socket pairs; a few milliseconds. Loads the `tls` module where the caller may (CAP_NET_ADMIN).
    pub fn probe() -> Self {
        todo!()
    }

    /// Both directions of every suite of the policy work: what `offload = "require"` needs.
    pub fn offloads_everything(&self) -> bool {
        self.no_ulp.is_none() && !self.suites.is_empty() && self.suites.iter().all(|s| s.tx && s.rx)
    }
}
