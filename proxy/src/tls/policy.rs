//! The policies: what may be negotiated. Nothing weaker than an A+ can be expressed.
//!
//!   a-plus    TLS 1.2 and 1.3, forward secrecy and AEAD
//!   modern    TLS 1.3 alone
//!   labs-100  a-plus with 256-bit suites and P-384 alone, and keys of that strength
//!   fips      AES-GCM, P-256 and P-384 (with ML-KEM where the validated module has it); a cargo feature
//!
//! `suites`, `groups` and `alpn` of the configuration choose and order within one. What lies outside is refused with
//! what it would cost in the grade, by the SSL Server Rating Guide of SSL Labs
//! (<https://github.com/ssllabs/research/wiki/SSL-Server-Rating-Guide>).

use super::key_schedule;
use super::resolver::Resolver;
use super::tickets::Ticketer;
use super::traffic;
use crate::config::{Group, Policy, Suite, Tls};
use rustls::crypto::aws_lc_rs::{self, cipher_suite as suites, kx_group as groups};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::server::{ProducesTickets, ResolvesServerCert, ServerSessionMemoryCache, StoresServerSessions};
use rustls::{ServerConfig, SupportedCipherSuite, SupportedProtocolVersion, version};
use std::sync::Arc;

/// The suites by their IANA names, in the server's order: 256-bit AES first, ChaCha20 last.
const SUITES: [(&str, SupportedCipherSuite); 9] = [
    ("TLS_AES_256_GCM_SHA384", suites::TLS13_AES_256_GCM_SHA384),
    ("TLS_AES_128_GCM_SHA256", suites::TLS13_AES_128_GCM_SHA256),
    ("TLS_CHACHA20_POLY1305_SHA256", suites::TLS13_CHACHA20_POLY1305_SHA256),
    ("TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", suites::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
    ("TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", suites::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
    ("TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", suites::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
    ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", suites::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
    ("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", suites::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256),
    ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", suites::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
];

/// The groups by their IANA names, and the name that people use for two of them.
const GROUPS: [(&str, &str, &dyn SupportedKxGroup); 4] = [
    ("X25519MLKEM768", "X25519MLKEM768", groups::X25519MLKEM768),
    ("x25519", "X25519", groups::X25519),
    ("secp256r1", "P-256", groups::SECP256R1),
    ("secp384r1", "P-384", groups::SECP384R1),
];

/// TLS 1.2 sessions that can be resumed by their id, by clients without tickets; about 1 KiB each.
const SESSIONS_BY_ID: usize = 4096;
/// RFC 7301 section 3.1: a protocol name has one byte of length.
const ALPN_MAX_BYTES: usize = 255;

/// What lets clients resume. It outlives a reload, so that tickets handed out before it stay good.
#[derive(Clone)]
pub struct Resumption {
    ticketer: Arc<dyn ProducesTickets>,
    sessions: Arc<dyn StoresServerSessions>,
}

impl Resumption {
    /// Ticket keys that the fleet shares.
    pub fn shared(ticketer: Arc<Ticketer>) -> Self {
        Self { ticketer, sessions: ServerSessionMemoryCache::new(SESSIONS_BY_ID) }
    }

    /// Ticket keys of this process: random, renewed every six hours by rustls, never written anywhere.
    ///
    /// # Errors
    /// The system's random source failed.
    pub fn of_this_process() -> Result<Self, rustls::Error> {
        Ok(Self { ticketer: aws_lc_rs::Ticketer::new()?, sessions: ServerSessionMemoryCache::new(SESSIONS_BY_ID) })
    }
}

/// What handshakes are made by, for every listener.
#[derive(Clone)]
pub struct Negotiation {
    pub config: Arc<ServerConfig>,
    /// `strict_sni`: the names that are served; all others are refused.
    pub strict: Option<Arc<Resolver>>,
    /// The record layer may leave the process.
    pub kernel_may_protect: bool,
}

impl Policy {
    pub fn name(self) -> &'static str {
        match self {
            Self::APlus => "a-plus",
            Self::Modern => "modern",
            Self::Labs100 => "labs-100",
            #[cfg(feature = "fips")]
            Self::Fips => "fips",
        }
    }

    fn has_suite(self, suite: &SupportedCipherSuite) -> bool {
        match self {
            Self::APlus => true,
            Self::Modern => suite.version() == &version::TLS13,
            Self::Labs100 => !suite_name(suite.suite()).contains("_AES_128_"),
            #[cfg(feature = "fips")]
            Self::Fips => suite.fips(),
        }
    }

    fn has_group(self, group: &dyn SupportedKxGroup) -> bool {
        match self {
            Self::APlus | Self::Modern => true,
            Self::Labs100 => group.name() == rustls::NamedGroup::secp384r1,
            #[cfg(feature = "fips")]
            Self::Fips => group.fips() && group.name() != rustls::NamedGroup::X25519,
        }
    }

    /// Why something of `a-plus` is not in this policy.
    fn leaves_out(self) -> &'static str {
        match self {
            Self::APlus => "it is no suite or group that gets an A+ here",
            Self::Modern => "the policy modern is TLS 1.3 alone; a-plus has it",
            Self::Labs100 => {
                "it is weaker than 256 bits (or P-384), and the score would be 90 instead of 100; a-plus has it"
            }
            #[cfg(feature = "fips")]
            Self::Fips => "the validated module does not do it; a-plus has it",
        }
    }

    /// Whether the record layer may leave the process for the kernel: in FIPS, if the kernel itself is in that mode.
    pub fn lets_the_kernel_protect(self) -> bool {
        match self {
            Self::APlus | Self::Modern | Self::Labs100 => true,
            #[cfg(feature = "fips")]
            Self::Fips => std::fs::read_to_string("/proc/sys/crypto/fips_enabled").is_ok_and(|on| on.trim() == "1"),
        }
    }
}

/// # Errors
/// rustls found no usable combination, which the configuration's checks exclude.
pub fn server_config(
    tls: &Tls,
    certificates: Arc<Resolver>,
    resumption: &Resumption,
) -> Result<Negotiation, rustls::Error> {
    let provider = provider(tls);
    let versions = versions(&provider.cipher_suites);
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&versions)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::clone(&certificates) as Arc<dyn ResolvesServerCert>);
    config.ignore_client_order = true;
    config.alpn_protocols = tls.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config.ticketer = Arc::clone(&resumption.ticketer);
    config.session_storage = Arc::clone(&resumption.sessions);
    // The door to the kernel needs the keys, and later ones are derived from what is caught. They go nowhere else.
    config.enable_secret_extraction = true;
    config.key_log = Arc::new(traffic::Catcher);
    // Early data can be replayed, and nothing that relays bytes can tell whether that does harm.
    config.max_early_data_size = 0;
    // Nothing is sent before the client's Finished: the record sequence past the door would not be known.
    config.send_half_rtt_data = false;
    #[cfg(feature = "fips")]
    if tls.policy == Policy::Fips && !config.fips() {
        return Err(rustls::Error::General("rustls does not call this configuration FIPS".to_owned()));
    }
    let kernel_may_protect = tls.policy.lets_the_kernel_protect();
    Ok(Negotiation { config: Arc::new(config), strict: tls.strict_sni.then_some(certificates), kernel_may_protect })
}

/// The suites that a configuration leaves, in order.
pub fn suites_of(tls: &Tls) -> Vec<SupportedCipherSuite> {
    if tls.suites.is_empty() {
        return SUITES.iter().map(|(_, suite)| *suite).filter(|suite| tls.policy.has_suite(suite)).collect();
    }
    let known = |wanted: &Suite| SUITES.iter().map(|(_, suite)| *suite).find(|suite| suite.suite() == wanted.0);
    tls.suites.iter().filter_map(known).collect()
}

/// The groups that a configuration leaves, in order.
pub fn groups_of(tls: &Tls) -> Vec<&'static dyn SupportedKxGroup> {
    let all = GROUPS.iter().map(|(_, _, known)| *known);
    if tls.groups.is_empty() {
        return all.filter(|group| tls.policy.has_group(*group)).collect();
    }
    tls.groups.iter().filter_map(|group| all.clone().find(|known| known.name() == group.0)).collect()
}

/// The IANA name of a suite of the policy.
pub fn suite_name(suite: rustls::CipherSuite) -> &'static str {
    SUITES.iter().find(|(_, known)| known.suite() == suite).map_or("unknown", |(name, _)| name)
}

/// The IANA name of a group of the policy.
pub fn group_name(group: rustls::NamedGroup) -> &'static str {
    GROUPS.iter().find(|(_, _, known)| known.name() == group).map_or("unknown", |(name, _, _)| name)
}

fn provider(tls: &Tls) -> CryptoProvider {
    let cipher_suites = suites_of(tls).into_iter().map(key_schedule::prepared).collect();
    CryptoProvider { cipher_suites, kx_groups: groups_of(tls), ..aws_lc_rs::default_provider() }
}

fn versions(suites: &[SupportedCipherSuite]) -> Vec<&'static SupportedProtocolVersion> {
    [&version::TLS13, &version::TLS12].into_iter().filter(|v| suites.iter().any(|s| s.version() == *v)).collect()
}

/// A suite of the policy by its IANA name.
///
/// # Errors
/// Why it is outside, in terms of the grade.
pub fn suite(policy: Policy, name: &str) -> Result<Suite, String> {
    let known = SUITES.iter().find(|(known, _)| *known == name);
    if let Some((_, suite)) = known.filter(|(_, suite)| policy.has_suite(suite)) {
        return Ok(Suite(suite.suite()));
    }
    let why = if known.is_some() { policy.leaves_out() } else { outside_by_suite(name) };
    let names: Vec<_> = SUITES.iter().filter(|(_, suite)| policy.has_suite(suite)).map(|(name, _)| *name).collect();
    Err(format!("{why}; the policy {} has: {}", policy.name(), names.join(", ")))
}

fn outside_by_suite(name: &str) -> &'static str {
    let upper = name.to_ascii_uppercase().replace('-', "_");
    let has = |part: &str| upper.contains(part);
    if has("NULL") || has("EXPORT") || has("ANON") {
        "it does not protect what it carries, which is grade F"
    } else if has("RC4") {
        "RC4 is broken: grade C with TLS 1.1 and later, B at best"
    } else if has("3DES") || has("_DES_") {
        "its 64-bit blocks leak on long connections (Sweet32): grade C"
    } else if upper.starts_with("TLS_RSA_") {
        "without forward secrecy the grade is B at best"
    } else if has("_CBC_") {
        "CBC is no AEAD: SSL Labs marks it weak, and a server whose best it is gets no A+"
    } else if has("_DHE_") {
        "finite-field Diffie-Hellman is not offered: with common parameters of 1024 bits the grade is B, and no client needs it"
    } else if has("CCM") {
        "CCM is slower than GCM everywhere, and no client needs it"
    } else {
        "it is no suite that gets an A+ here"
    }
}

/// Checks the choice as a whole.
///
/// # Errors
/// Why a server with only these would not get an A+.
pub fn choice_of_suites(chosen: &[Suite]) -> Result<(), String> {
    let is_tls13 = |suite: &Suite| SUITES.iter().any(|(_, s)| s.suite() == suite.0 && s.version() == &version::TLS13);
    if chosen.iter().any(is_tls13) {
        Ok(())
    } else {
        Err("without a suite of TLS 1.3 (TLS_AES_..., TLS_CHACHA20_...) SSL Labs gives A- at best".to_owned())
    }
}

/// A group of the policy by its IANA name, or as P-256 and P-384.
///
/// # Errors
/// Why it is outside, in terms of the grade.
pub fn group(policy: Policy, name: &str) -> Result<Group, String> {
    let is_named = |(iana, common, _): &&(&str, &str, _)| *iana == name || *common == name;
    let known = GROUPS.iter().find(is_named);
    if let Some((_, _, group)) = known.filter(|(_, _, group)| policy.has_group(*group)) {
        return Ok(Group(group.name()));
    }
    let lower = name.to_ascii_lowercase();
    let why = if known.is_some() {
        policy.leaves_out()
    } else if lower.starts_with("ffdhe") || lower.starts_with("dh") {
        "finite-field Diffie-Hellman is not offered: it costs the grade with small parameters, and no client needs it"
    } else if ["secp160", "secp192", "secp224", "sect1", "sect2", "p-192", "p-224"].iter().any(|w| lower.starts_with(w))
    {
        "a key exchange below 256 bits of curve lowers the score"
    } else {
        "it is no group that gets an A+ here"
    };
    let names: Vec<_> =
        GROUPS.iter().filter(|(_, _, group)| policy.has_group(*group)).map(|(iana, _, _)| *iana).collect();
    Err(format!("{why}; the policy {} has: {}", policy.name(), names.join(", ")))
}

/// A protocol name for ALPN. Any protocol that runs over TLS over TCP may be named.
///
/// # Errors
/// Why it cannot be offered.
pub fn alpn(name: &str) -> Result<String, String> {
    if name.is_empty() || name.len() > ALPN_MAX_BYTES {
        return Err(format!("a protocol name has 1 to {ALPN_MAX_BYTES} bytes (RFC 7301)"));
    }
    match name {
        "h2c" => Err("h2c names HTTP/2 without TLS and must not be offered here (RFC 9113 section 3.1)".to_owned()),
        "h3" => Err("h3 runs over QUIC, which a TCP listener does not speak".to_owned()),
        _ if name.starts_with("spdy/") => Err("SPDY is obsolete: SSL Labs warns of it".to_owned()),
        _ => Ok(name.to_owned()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::{Config, Tls};

    pub(crate) fn tls(policy: Policy, suites: &[&str], groups: &[&str]) -> Tls {
        let file = format!(
            "[tls]\npolicy = {:?}\ncertificates = [\"/x\"]\nsuites = {suites:?}\ngroups = {groups:?}\nalpn = [\"h2\"]\n\
             [[listener]]\naddress = \"[::]:1\"\nupstream = \"u\"\n[[upstream]]\nname = \"u\"\nservers = [\"unix:/u\"]\n",
            policy.name()
        );
        Config::parse(std::path::Path::new("test"), &file).expect("valid").tls
    }

    #[test]
    fn the_policy_has_aead_and_forward_secrecy_only() {
        let provider = provider(&tls(Policy::APlus, &[], &[]));
        assert_eq!((provider.cipher_suites.len(), provider.kx_groups.len()), (9, 4));
        for (name, suite) in SUITES {
            assert!(name.contains("GCM") || name.contains("POLY1305"), "{name}");
            assert!(suite.version() == &version::TLS13 || name.contains("_ECDHE_"), "{name}");
            assert_eq!(suite_name(suite.suite()), name);
        }
    }

    #[test]
    fn a_choice_keeps_its_order_and_decides_the_versions() {
        let provider = provider(&tls(
            Policy::APlus,
            &["TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256"],
            &["P-384", "X25519"],
        ));
        let names: Vec<_> = provider.cipher_suites.iter().map(|s| suite_name(s.suite())).collect();
        assert_eq!(names, ["TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256"]);
        let groups: Vec<_> = provider.kx_groups.iter().map(|g| group_name(g.name())).collect();
        assert_eq!(groups, ["secp384r1", "x25519"]);
        assert_eq!(versions(&provider.cipher_suites), [&version::TLS13]);
    }

    #[test]
    fn the_server_config_leaks_and_replays_nothing() {
        let certificates = crate::tls::certificates::testing::resolver(&["a.test"]);
        let resumption = Resumption::of_this_process().expect("random");
        let config = server_config(&tls(Policy::APlus, &[], &[]), certificates, &resumption).expect("usable").config;
        assert!(config.enable_secret_extraction && config.ignore_client_order);
        assert!(!config.send_half_rtt_data && config.max_early_data_size == 0);
        assert!(!config.key_log.will_log("CLIENT_RANDOM"));
        assert!(config.ticketer.enabled());
        assert_eq!(config.alpn_protocols, [b"h2".to_vec()]);
    }

    #[test]
    fn a_narrower_policy_refuses_what_it_leaves_out_and_says_what_that_costs() {
        let names =
            |policy| suites_of(&tls(policy, &[], &[])).iter().map(|s| suite_name(s.suite())).collect::<Vec<_>>();
        assert!(names(Policy::Modern).iter().all(|name| !name.contains("ECDHE")));
        assert_eq!(names(Policy::Labs100).len(), 6);
        assert_eq!(groups_of(&tls(Policy::Labs100, &[], &[])).len(), 1);
        let said = suite(Policy::Labs100, "TLS_AES_128_GCM_SHA256").expect_err("128 bits");
        assert!(said.contains("90 instead of 100") && said.contains("the policy labs-100 has: TLS_AES_256"), "{said}");
        let said = suite(Policy::Modern, "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256").expect_err("1.2");
        assert!(said.contains("TLS 1.3 alone"), "{said}");
        assert!(group(Policy::Labs100, "X25519").is_err() && group(Policy::Labs100, "P-384").is_ok());
        assert!(suite(Policy::Labs100, "TLS_RSA_WITH_AES_128_CBC_SHA").expect_err("no").contains("grade is B"));
    }

    #[cfg(feature = "fips")]
    #[test]
    fn the_policy_fips_is_what_the_validated_module_does() {
        let (tls, resumption) = (tls(Policy::Fips, &[], &[]), Resumption::of_this_process().expect("random"));
        let certificates = crate::tls::certificates::testing::resolver(&["a.test"]);
        let config = server_config(&tls, certificates, &resumption).expect("usable").config;
        assert!(config.fips() && config.crypto_provider().fips());
        assert!(suites_of(&tls).iter().all(|suite| suite_name(suite.suite()).contains("_GCM_")));
        assert!(groups_of(&tls).iter().any(|group| group.name() == rustls::NamedGroup::secp256r1));
        assert!(group(Policy::Fips, "X25519").is_err() && suite(Policy::Fips, "TLS_CHACHA20_POLY1305_SHA256").is_err());
    }
}
