//! Judges a chain: an error or a warning, each with what mends it.
//!
//!   leaf ─▶ names, use, key, signature, time     chain ─▶ order, gaps, what is too much, strength, time
//!
//! An error costs the grade or breaks clients, and the set is refused; a warning is said and served. Whether clients
//! trust the root is asked only of the host's own roots, and is a warning, for there are private authorities.

use super::x509::{Hash, Key, Seen};
use crate::config::{Ocsp, Policy};
use rustls::pki_types::CertificateDer;
use std::collections::HashSet;
use std::path::Path;
use std::sync::OnceLock;
use x509_parser::prelude::ASN1Time;

/// A certificate that ends sooner is named: half of what Let's Encrypt leaves when it renews.
const EXPIRES_SOON_DAYS: i64 = 14;
/// Of short-lived certificates, this part of their life.
const EXPIRES_SOON_PART: i64 = 6;
const DAY_SECONDS: i64 = 86_400;
/// Where distributions keep the roots that the host trusts.
pub const HOST_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    Error,
    Warning,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    pub severity: Severity,
    pub message: String,
}

/// What chains are held against.
#[derive(Clone, Copy)]
pub struct Measure {
    pub policy: Policy,
    pub ocsp: Ocsp,
}

/// The shape of a chain, for whoever judges or grades it.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Places in the chain, leaf first, each issued by the next.
    pub path: Vec<usize>,
    pub in_order: bool,
    /// Places that are on no path from the leaf, or a root.
    pub superfluous: Vec<usize>,
}

impl Shape {
    pub fn of(chain: &[Seen]) -> Self {
        let mut path = vec![0];
        let mut last = 0;
        while let Some(leaf) = chain.get(last).filter(|seen| !seen.is_self_issued())
            && let Some(next) = (1..chain.len()).find(|i| !path.contains(i) && leaf.is_issued_by(&chain[*i]))
        {
            path.push(next);
            last = next;
        }
        let is_root = |place: &usize| *place > 0 && chain[*place].is_self_issued();
        let superfluous = (1..chain.len()).filter(|place| !path.contains(place) || is_root(place)).collect();
        Self { in_order: path.is_sorted(), superfluous, path }
    }
}

/// Judges one chain. `elsewhere`: all other certificates that were found.
pub fn judge(file: &Path, chain: &[Seen], elsewhere: &[&Seen], measure: Measure) -> Vec<Judgement> {
    let mut said = Said(Vec::new());
    let Some(leaf) = chain.first() else { return said.0 };
    judge_leaf(&mut said, leaf, measure);
    for (place, seen) in chain.iter().enumerate() {
        judge_strength(&mut said, place, seen, measure.policy);
        if place > 0
            && let Err(why) = seen.in_force()
        {
            said.error(format!(
                "certificate {} of the chain ({}): {why}: ask your authority for its present chain",
                place + 1,
                seen.subject_text
            ));
        }
    }
    judge_shape(&mut said, file, chain, elsewhere);
    said.0
}

struct Said(Vec<Judgement>);

impl Said {
    fn error(&mut self, message: String) {
        self.0.push(Judgement { severity: Severity::Error, message });
    }

    fn warning(&mut self, message: String) {
        self.0.push(Judgement { severity: Severity::Warning, message });
    }
}

fn judge_leaf(said: &mut Said, leaf: &Seen, measure: Measure) {
    if let Err(why) = leaf.in_force() {
        said.error(format!("{why}: renew it"));
    } else {
        let left = leaf.not_after.timestamp() - ASN1Time::now().timestamp();
        let life = leaf.not_after.timestamp() - leaf.not_before.timestamp();
        if left < (EXPIRES_SOON_DAYS * DAY_SECONDS).min(life / EXPIRES_SOON_PART) {
            said.warning(format!("this certificate ({}) expires on {}: renew it", leaf.name(), leaf.not_after));
        }
    }
    if leaf.names.is_empty() && !leaf.has_addresses {
        said.error(format!(
            "this certificate ({}) has no subjectAltName, and clients look at no other name: have it issued with its DNS names",
            leaf.subject_text
        ));
    }
    if !leaf.may_serve {
        said.error(
            "this certificate is not for servers (extended key usage without serverAuth): have one issued that is"
                .to_owned(),
        );
    }
    if leaf.must_staple && measure.ocsp == Ocsp::Off {
        said.error(
            "this certificate demands a staple (must-staple) and tls.ocsp is \"off\": set it to \"auto\"".to_owned(),
        );
    }
}

fn judge_strength(said: &mut Said, place: usize, seen: &Seen, policy: Policy) {
    let which = || format!("certificate {} of the chain ({})", place + 1, seen.subject_text);
    // The root's own signature protects nothing.
    if !seen.is_self_issued() {
        match seen.hash {
            Hash::Md5 => said.error(format!("{} is signed with MD5, which is grade F: have it issued anew", which())),
            Hash::Sha1 => {
                said.error(format!(
                    "{} is signed with SHA-1, which no client trusts any more: have it issued anew",
                    which()
                ));
            }
            Hash::Strong => {}
        }
    }
    let bits = seen.key.as_rsa_bits();
    if bits < 2048 {
        said.error(format!("{} has a key {}, which is grade B at best: 2048 bits of RSA or P-256", which(), seen.key));
    } else if policy == Policy::Labs100 && place == 0 && bits < 4096 {
        said.error(format!(
            "its key is {}, and the key exchange would score 90 instead of 100 (policy labs-100): P-384 or RSA 4096",
            seen.key
        ));
    }
    if place == 0 && seen.key == Key::Ed25519 {
        said.warning(
            "its key is Ed25519, which hardly any browser verifies: have a P-256 certificate beside it".to_owned(),
        );
    }
}

fn judge_shape(said: &mut Said, file: &Path, chain: &[Seen], elsewhere: &[&Seen]) {
    let shape = Shape::of(chain);
    if !shape.in_order {
        said.warning("the chain is not in order: leaf first, then each certificate's issuer".to_owned());
    }
    for place in &shape.superfluous {
        let seen = &chain[*place];
        let number = place + 1;
        said.warning(if seen.is_self_issued() {
            format!(
                "certificate {number} of the chain is a root ({}), sent in vain with every handshake: leave it out",
                seen.subject_text
            )
        } else {
            format!("certificate {number} of the chain ({}) does not belong to it: leave it out", seen.subject_text)
        });
    }
    let Some(last) = shape.path.last().map(|place| &chain[*place]) else { return };
    if last.is_self_issued() {
        if shape.path.len() == 1 {
            said.warning(format!(
                "this certificate ({}) is signed by itself: clients trust it only if they were given it",
                last.name()
            ));
        }
    } else if roots().contains(&last.issuer) {
    } else if let Some(issuer) = elsewhere.iter().find(|other| !other.is_self_issued() && last.is_issued_by(other)) {
        said.error(format!(
            "the chain lacks {}, which lies in another file; without it the grade is B: append it to {}",
            issuer.subject_text,
            file.display()
        ));
    } else {
        said.warning(format!(
            "the chain ends with one that {} issued, which is no root of this host: append its intermediate, unless it is \
             the root of a private authority",
            last.issuer_text
        ));
    }
}

/// The subjects of the host's roots.
fn roots() -> &'static HashSet<Vec<u8>> {
    static ROOTS: OnceLock<HashSet<Vec<u8>>> = OnceLock::new();
    ROOTS.get_or_init(|| host_roots().iter().filter_map(|der| Seen::read(der).ok()).map(|seen| seen.subject).collect())
}

/// The roots that the host trusts; empty where it has none.
pub fn host_roots() -> Vec<CertificateDer<'static>> {
    HOST_ROOTS.iter().find_map(|file| super::pem::certificates(Path::new(file)).ok()).unwrap_or_default()
}
