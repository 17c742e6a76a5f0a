//! The grade by the SSL Server Rating Guide of SSL Labs, version 2009r.
//!
//!   configuration.rs ─▶ Facts ─┐
//!   live.rs (any host) ─▶ Facts ─▶ three scores ─▶ letter ─▶ caps ─▶ A+ or not, each with its reason and its mend
//!
//! Scores are protocol (30 %), key exchange (30 %) and cipher strength (40 %), each the mean of best and worst. A cap
//! holds the letter down. A+ takes an A without a warning, and HSTS of six months. Facts come from elsewhere; nothing
//! here reads a file or a socket.

pub mod configuration;
pub mod hello;
pub mod live;
mod probe;

use super::x509::{Hash, Key};
use serde::Serialize;
use std::fmt;

/// Six months, the least that counts for A+.
pub const HSTS_LEAST_SECONDS: u64 = 15_552_000;

/// From worst to best. `T`: the certificate is not trusted; `M`: it has another name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Grade {
    M,
    T,
    F,
    E,
    D,
    C,
    B,
    #[serde(rename = "A-")]
    AMinus,
    A,
    #[serde(rename = "A+")]
    APlus,
}

impl Grade {
    pub fn name(self) -> &'static str {
        match self {
            Self::APlus => "A+",
            Self::A => "A",
            Self::AMinus => "A-",
            Self::B => "B",
            Self::C => "C",
            Self::D => "D",
            Self::E => "E",
            Self::F => "F",
            Self::T => "T",
            Self::M => "M",
        }
    }

    pub fn is_below(self, other: Self) -> bool {
        self < other
    }

    fn of_score(score: u32) -> Self {
        match score {
            80.. => Self::A,
            65..80 => Self::B,
            50..65 => Self::C,
            35..50 => Self::D,
            20..35 => Self::E,
            0..20 => Self::F,
        }
    }
}

impl fmt::Display for Grade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Ssl2,
    Ssl3,
    Tls10,
    Tls11,
    Tls12,
    Tls13,
}

impl Protocol {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ssl2 => "SSL 2.0",
            Self::Ssl3 => "SSL 3.0",
            Self::Tls10 => "TLS 1.0",
            Self::Tls11 => "TLS 1.1",
            Self::Tls12 => "TLS 1.2",
            Self::Tls13 => "TLS 1.3",
        }
    }

    fn score(self) -> u32 {
        match self {
            Self::Ssl2 => 0,
            Self::Ssl3 => 80,
            Self::Tls10 => 90,
            Self::Tls11 => 95,
            Self::Tls12 | Self::Tls13 => 100,
        }
    }
}

/// A suite that the server chooses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suite {
    pub name: String,
    pub protocol: Protocol,
    /// Of the cipher, as the guide counts: 112 for 3DES.
    pub bits: u32,
    pub forward_secrecy: bool,
    pub aead: bool,
    pub authenticated: bool,
}

/// A certificate that the server sends.
#[derive(Debug, Clone)]
pub struct Certificate {
    pub name: String,
    pub key: Key,
    /// The worst of the chain, roots left out.
    pub hash: Hash,
    /// Why no client may take it: expired, not yet valid, unknown root.
    pub untrusted: Option<String>,
    /// The chain lacks an intermediate.
    pub incomplete: Option<String>,
    pub other_name: Option<String>,
}

/// Who adds Strict-Transport-Security.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hsts {
    /// The listener is no `http` one: the upstream has to send it.
    Upstream,
    /// Sent, with this max-age in seconds.
    Sent(u64),
    Absent,
    /// It could not be asked for.
    Unknown,
}

impl Hsts {
    /// Of the field's value (RFC 6797 section 6.1).
    fn of_value(value: &str) -> Self {
        let age = value.split(';').find_map(|directive| {
            let (name, value) = directive.split_once('=')?;
            name.trim().eq_ignore_ascii_case("max-age").then(|| value.trim().trim_matches('"').parse().unwrap_or(0))
        });
        Self::Sent(age.unwrap_or(0))
    }
}

/// What is graded.
#[derive(Debug, Clone)]
pub struct Facts {
    pub protocols: Vec<Protocol>,
    pub suites: Vec<Suite>,
    /// Key exchange groups and DH parameters, as bits of RSA that are as strong.
    pub exchanges: Vec<(String, u32)>,
    pub certificates: Vec<Certificate>,
    pub hsts: Hsts,
    pub fallback_scsv: bool,
    pub secure_renegotiation: bool,
    /// Renegotiation of the client's without RFC 5746.
    pub insecure_renegotiation: bool,
    pub compression: bool,
}

/// One reason, and the line that mends it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// What it holds the grade to.
    pub at_most: Grade,
    pub reason: String,
    pub mend: String,
}

/// The report.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub grade: Grade,
    /// The grade is A+ on this condition alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub condition: Option<&'static str>,
    pub protocol_score: u32,
    pub key_exchange_score: u32,
    pub cipher_score: u32,
    pub score: u32,
    pub reasons: Vec<Reason>,
    /// Where another judge departs from the guide.
    pub notes: Vec<String>,
}

impl Report {
    pub fn reasons(&self) -> Vec<&str> {
        self.reasons.iter().map(|reason| reason.reason.as_str()).collect()
    }
}

/// Grades.
pub fn grade(facts: &Facts) -> Report {
    let protocol_score = mean(facts.protocols.iter().map(|protocol| protocol.score()));
    let key_exchange_score = key_exchange(facts);
    let cipher_score = mean(facts.suites.iter().map(|suite| cipher(suite.bits)));
    let scores = [protocol_score, key_exchange_score, cipher_score];
    let score =
        if scores.contains(&0) { 0 } else { (protocol_score * 3 + key_exchange_score * 3 + cipher_score * 4) / 10 };
    let mut caps = Caps(Vec::new());
    caps.of_protocols(facts);
    caps.of_suites(facts);
    caps.of_exchanges(facts);
    caps.of_certificates(facts);
    caps.of_features(facts);
    let condition = caps.of_hsts(facts);
    let letter = Grade::of_score(score);
    // An A that nothing holds down is an A+.
    let best = if letter == Grade::A { Grade::APlus } else { letter };
    let grade = caps.0.iter().map(|cap| cap.at_most).fold(best, Grade::min);
    caps.0.sort_by_key(|cap| cap.at_most);
    let mut notes = Vec::new();
    if facts.hsts == Hsts::Absent && grade == Grade::A {
        notes.push("testssl.sh gives A+ without HSTS; the guide does not".to_owned());
    }
    Report {
        grade,
        condition: condition.filter(|_| grade == Grade::APlus),
        protocol_score,
        key_exchange_score,
        cipher_score,
        score,
        reasons: caps.0,
        notes,
    }
}

/// The mean of the best and the worst; 0 if there is nothing.
fn mean(scores: impl Iterator<Item = u32> + Clone) -> u32 {
    match (scores.clone().min(), scores.max()) {
        (Some(worst), Some(best)) => u32::midpoint(worst, best),
        (None, _) | (_, None) => 0,
    }
}

fn cipher(bits: u32) -> u32 {
    match bits {
        0 => 0,
        1..128 => 20,
        128..256 => 80,
        256.. => 100,
    }
}

/// The weakest of certificate keys and exchanges.
fn key_exchange(facts: &Facts) -> u32 {
    if facts.suites.iter().any(|suite| !suite.authenticated) {
        return 0;
    }
    let keys = facts.certificates.iter().map(|certificate| certificate.key.as_rsa_bits());
    let weakest = keys.chain(facts.exchanges.iter().map(|(_, bits)| *bits)).min().unwrap_or(0);
    match weakest {
        0 => 0,
        1..512 => 20,
        512..1024 => 40,
        1024..2048 => 80,
        2048..4096 => 90,
        4096.. => 100,
    }
}

struct Caps(Vec<Reason>);

impl Caps {
    fn add(&mut self, at_most: Grade, reason: impl Into<String>, mend: &str) {
        self.0.push(Reason { at_most, reason: reason.into(), mend: mend.to_owned() });
    }

    fn of_protocols(&mut self, facts: &Facts) {
        let has = |protocol| facts.protocols.contains(&protocol);
        if facts.protocols.is_empty() {
            self.add(Grade::F, "nothing here speaks TLS", "let it");
            return;
        }
        if has(Protocol::Ssl2) {
            self.add(Grade::F, "SSL 2.0 is offered", "offer TLS 1.2 and 1.3 only");
        }
        if has(Protocol::Ssl3) {
            let cbc = facts.suites.iter().any(|suite| suite.protocol == Protocol::Ssl3 && suite.name.contains("_CBC_"));
            let (grade, why) = if cbc { (Grade::C, " with CBC (POODLE)") } else { (Grade::B, "") };
            self.add(grade, format!("SSL 3.0 is offered{why}"), "offer TLS 1.2 and 1.3 only");
        }
        for old in [Protocol::Tls10, Protocol::Tls11].into_iter().filter(|old| has(*old)) {
            self.add(Grade::B, format!("{} is offered", old.name()), "offer TLS 1.2 and 1.3 only");
        }
        if !has(Protocol::Tls12) && !has(Protocol::Tls13) {
            self.add(Grade::C, "TLS 1.2 is not offered", "offer TLS 1.2 and 1.3");
        } else if !has(Protocol::Tls13) {
            self.add(Grade::AMinus, "TLS 1.3 is not offered", "offer TLS 1.3");
        }
    }

    fn of_suites(&mut self, facts: &Facts) {
        let named = |is: &dyn Fn(&Suite) -> bool| facts.suites.iter().find(|suite| is(suite)).map(|s| s.name.as_str());
        if let Some(name) = named(&|suite| suite.bits == 0 || !suite.authenticated || suite.name.contains("EXPORT")) {
            self.add(Grade::F, format!("{name} protects nothing"), "take it out of the suites");
        }
        if let Some(name) = named(&|suite| suite.name.contains("_RC4_")) {
            let newer = named(&|suite| suite.name.contains("_RC4_") && suite.protocol >= Protocol::Tls11);
            let grade = if newer.is_some() { Grade::C } else { Grade::B };
            self.add(grade, format!("RC4 is broken ({name})"), "take it out of the suites");
        }
        if let Some(name) = named(&|suite| is_short_block(&suite.name)) {
            let newer = named(&|suite| is_short_block(&suite.name) && suite.protocol >= Protocol::Tls11);
            let grade = if newer.is_some() { Grade::C } else { Grade::B };
            self.add(grade, format!("blocks of 64 bits leak (Sweet32, {name})"), "take it out of the suites");
        }
        if facts.suites.is_empty() {
            return;
        }
        if !facts.suites.iter().any(|suite| suite.aead) {
            self.add(Grade::B, "no suite is AEAD", "add AES-GCM or ChaCha20-Poly1305");
        }
        if let Some(name) = named(&|suite| !suite.forward_secrecy) {
            // Reference clients choose by the server's order; a server that has both is not held down by the guide.
            if !facts.suites.iter().any(|suite| suite.forward_secrecy) {
                self.add(Grade::B, format!("there is no forward secrecy ({name})"), "add suites with ECDHE");
            }
        }
    }

    fn of_exchanges(&mut self, facts: &Facts) {
        if let Some((name, bits)) = facts.exchanges.iter().min_by_key(|(_, bits)| *bits) {
            if *bits < 1024 {
                self.add(Grade::F, format!("the key exchange {name} is insecure"), "take it out of the groups");
            } else if *bits < 2048 {
                self.add(Grade::B, format!("the key exchange {name} is weak"), "take it out of the groups");
            }
        }
    }

    fn of_certificates(&mut self, facts: &Facts) {
        for certificate in &facts.certificates {
            let Certificate { name, key, hash, untrusted, incomplete, other_name } = certificate;
            match key.as_rsa_bits() {
                0..1024 => self.add(Grade::F, format!("{name}: its key is {key}"), "P-256, or RSA of 2048 bits"),
                1024..2048 => self.add(Grade::B, format!("{name}: its key is {key}"), "P-256, or RSA of 2048 bits"),
                2048.. => {}
            }
            match hash {
                Hash::Md5 => self.add(Grade::F, format!("{name}: signed with MD5"), "have it issued anew"),
                Hash::Sha1 => self.add(Grade::T, format!("{name}: signed with SHA-1"), "have it issued anew"),
                Hash::Strong => {}
            }
            if let Some(why) = untrusted {
                self.add(Grade::T, format!("{name}: {why}"), "a certificate of an authority that clients trust");
            }
            if let Some(why) = incomplete {
                self.add(Grade::B, format!("{name}: {why}"), "append the intermediate to the chain");
            }
            if let Some(other) = other_name {
                self.add(Grade::M, format!("{name}: is not for {other}"), "a certificate with that name");
            }
        }
    }

    fn of_features(&mut self, facts: &Facts) {
        let below_tls13 = facts.protocols.iter().any(|protocol| *protocol < Protocol::Tls13);
        if facts.insecure_renegotiation {
            self.add(Grade::F, "clients may renegotiate without RFC 5746", "forbid it");
        } else if below_tls13 && !facts.secure_renegotiation {
            self.add(Grade::AMinus, "RFC 5746 (secure renegotiation) is not supported", "a TLS library that has it");
        }
        if facts.compression {
            self.add(Grade::C, "TLS compression is offered (CRIME)", "switch it off");
        }
        if facts.protocols.len() > 1 && below_tls13 && !facts.fallback_scsv {
            self.add(Grade::A, "TLS_FALLBACK_SCSV is not supported", "a TLS library that has it");
        }
    }

    fn of_hsts(&mut self, facts: &Facts) -> Option<&'static str> {
        match facts.hsts {
            Hsts::Upstream => return Some("if the upstream sends Strict-Transport-Security of six months or more"),
            Hsts::Sent(seconds) if seconds < HSTS_LEAST_SECONDS => self.add(
                Grade::A,
                format!("HSTS is of {seconds} seconds, less than six months"),
                "Strict-Transport-Security: max-age=63072000; includeSubDomains",
            ),
            Hsts::Sent(_) => {}
            Hsts::Absent => self.add(
                Grade::A,
                "no Strict-Transport-Security",
                "Strict-Transport-Security: max-age=63072000; includeSubDomains",
            ),
            Hsts::Unknown => {
                self.add(Grade::A, "whether it sends HSTS could not be asked", "a suite that this client has")
            }
        }
        None
    }
}

fn is_short_block(name: &str) -> bool {
    ["_3DES_", "_DES_", "_DES40_", "_IDEA_", "_RC2_"].iter().any(|cipher| name.contains(cipher))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suite(name: &str, protocol: Protocol, bits: u32) -> Suite {
        let tls13 = protocol == Protocol::Tls13;
        Suite {
            name: name.to_owned(),
            protocol,
            bits,
            forward_secrecy: tls13 || name.contains("DHE_"),
            aead: tls13 || name.contains("_GCM_"),
            authenticated: !name.contains("anon"),
        }
    }

    fn facts() -> Facts {
        Facts {
            protocols: vec![Protocol::Tls12, Protocol::Tls13],
            suites: vec![
                suite("TLS_AES_128_GCM_SHA256", Protocol::Tls13, 128),
                suite("TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", Protocol::Tls12, 256),
            ],
            exchanges: vec![("x25519".to_owned(), 3072)],
            certificates: vec![Certificate {
                name: "a.test".to_owned(),
                key: Key::Rsa(2048),
                hash: Hash::Strong,
                untrusted: None,
                incomplete: None,
                other_name: None,
            }],
            hsts: Hsts::Sent(HSTS_LEAST_SECONDS),
            fallback_scsv: true,
            secure_renegotiation: true,
            insecure_renegotiation: false,
            compression: false,
        }
    }

    fn after(change: impl FnOnce(&mut Facts)) -> Grade {
        let mut facts = facts();
        change(&mut facts);
        grade(&facts).grade
    }

    #[test]
    fn the_scores_are_those_of_the_guide() {
        let report = grade(&facts());
        assert_eq!((report.protocol_score, report.key_exchange_score, report.cipher_score), (100, 90, 90));
        assert_eq!((report.score, report.grade), (93, Grade::APlus));
        assert!(report.reasons.is_empty());
    }

    #[test]
    fn each_weakness_holds_the_grade_down_to_its_letter() {
        assert_eq!(after(|f| f.hsts = Hsts::Absent), Grade::A);
        assert_eq!(after(|f| f.hsts = Hsts::Sent(3600)), Grade::A);
        assert_eq!(after(|f| f.fallback_scsv = false), Grade::A);
        assert_eq!(after(|f| f.protocols = vec![Protocol::Tls12]), Grade::AMinus);
        assert_eq!(after(|f| f.protocols.push(Protocol::Tls10)), Grade::B);
        assert_eq!(after(|f| f.protocols = vec![Protocol::Tls10]), Grade::C);
        assert_eq!(after(|f| f.protocols.push(Protocol::Ssl2)), Grade::F);
        assert_eq!(after(|f| f.suites.push(suite("TLS_RSA_WITH_RC4_128_SHA", Protocol::Tls12, 128))), Grade::C);
        assert_eq!(after(|f| f.suites.push(suite("TLS_RSA_WITH_3DES_EDE_CBC_SHA", Protocol::Tls12, 112))), Grade::C);
        assert_eq!(after(|f| f.suites.push(suite("TLS_DH_anon_WITH_AES_128_CBC_SHA", Protocol::Tls12, 128))), Grade::F);
        assert_eq!(
            after(|f| f.suites = vec![suite("TLS_RSA_WITH_AES_128_GCM_SHA256", Protocol::Tls12, 128)]),
            Grade::B
        );
        assert_eq!(after(|f| f.exchanges.push(("DH 1024".to_owned(), 1024))), Grade::B);
        assert_eq!(after(|f| f.certificates[0].key = Key::Rsa(1024)), Grade::B);
        assert_eq!(after(|f| f.certificates[0].hash = Hash::Sha1), Grade::T);
        assert_eq!(after(|f| f.certificates[0].incomplete = Some("gap".to_owned())), Grade::B);
        assert_eq!(after(|f| f.certificates[0].untrusted = Some("expired".to_owned())), Grade::T);
        assert_eq!(after(|f| f.certificates[0].other_name = Some("b.test".to_owned())), Grade::M);
        assert_eq!(after(|f| f.compression = true), Grade::C);
        assert_eq!(after(|f| f.insecure_renegotiation = true), Grade::F);
        assert_eq!(after(|f| f.protocols.clear()), Grade::F);
    }

    #[test]
    fn in_tcp_mode_the_plus_hangs_on_the_upstream() {
        let report = grade(&Facts { hsts: Hsts::Upstream, ..facts() });
        assert_eq!(report.grade, Grade::APlus);
        assert!(report.condition.is_some_and(|condition| condition.contains("if the upstream sends")));
    }
}
