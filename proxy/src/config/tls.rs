//! `[tls]`: the policy and the choices within it, certificates, tickets and stapling.

use super::parse::unique;
use super::problem::Problems;
use super::section::{Read, Section, because};
use super::{Ocsp, Policy, Tls, value};
use crate::tls::policy;
use std::ops::RangeInclusive;
use std::time::Duration;
use toml::de::DeValue;

const POLL: Duration = Duration::from_secs(10);
/// Faster than that only loads the file server; a certificate lives for days.
const POLLS: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(86_400);
const TICKET_LIFETIME: Duration = Duration::from_secs(12 * 3600);
/// At most: half of the seven days that RFC 8446 section 4.6.1 allows a ticket, since its key lives for twice as long.
const TICKET_LIFETIMES: RangeInclusive<Duration> = Duration::from_secs(2)..=Duration::from_secs(84 * 3600);

pub(super) fn read_tls(mut section: Section<'_>, problems: &mut Problems<'_>) -> Tls {
    const OCSP: &[(&str, Ocsp)] = &[("auto", Ocsp::Auto), ("file", Ocsp::File), ("off", Ocsp::Off)];
    let policy = section.take_or(problems, "policy", Policy::APlus, policy_word);
    let certificates = section.take_some(problems, "certificates", "files or folders in quotes", value::path);
    let suites = section.take_list(problems, "suites", "cipher suites", |v| {
        value::text(v, "a cipher suite in quotes").and_then(|name| by_grade(policy::suite(policy, name)))
    });
    let groups = section.take_list(problems, "groups", "key exchange groups", |v| {
        value::text(v, "a key exchange group in quotes").and_then(|name| by_grade(policy::group(policy, name)))
    });
    let alpn = section.take_list(problems, "alpn", "protocol names", |v| {
        value::text(v, "a protocol name in quotes").and_then(|name| by_grade(policy::alpn(name)))
    });
    let suites = unique(problems, "tls.suites", suites);
    if !suites.is_empty()
        && let Err(why) = policy::choice_of_suites(&suites)
    {
        problems.add(section.span_of("suites"), format!("tls.suites: {why}"));
    }
    let path = |section: &mut Section<'_>, problems: &mut Problems<'_>, key| {
        section.take(problems, key, value::path).map(|(path, _)| path)
    };
    let tls = Tls {
        policy,
        certificates: certificates.into_iter().map(|(path, _)| path).collect(),
        suites,
        groups: unique(problems, "tls.groups", groups),
        alpn: unique(problems, "tls.alpn", alpn),
        strict_sni: section.take_or(problems, "strict_sni", false, value::truth),
        poll: section.take_or(problems, "poll", POLL, |v| value::duration(v, POLLS)),
        last_good: path(&mut section, problems, "last_good"),
        tickets: path(&mut section, problems, "tickets"),
        ticket_lifetime: section
            .take_or(problems, "ticket_lifetime", TICKET_LIFETIME, |v| value::duration(v, TICKET_LIFETIMES)),
        ocsp: section.take_or(problems, "ocsp", Ocsp::Auto, |v| value::word(v, OCSP, &[])),
    };
    section.finish(problems);
    tls
}

fn policy_word(value: &DeValue<'_>) -> Read<Policy> {
    const POLICIES: &[(&str, Policy)] = &[
        ("a-plus", Policy::APlus),
        ("modern", Policy::Modern),
        ("labs-100", Policy::Labs100),
        #[cfg(feature = "fips")]
        ("fips", Policy::Fips),
    ];
    if cfg!(not(feature = "fips")) && matches!(value, DeValue::String(word) if word == "fips") {
        return because("this build has no validated module; one that has: cargo build --release --features fips");
    }
    value::word(value, POLICIES, &[])
}

fn by_grade<T>(chosen: Result<T, String>) -> Read<T> {
    chosen.or_else(because)
}
