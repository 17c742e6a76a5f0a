//! The value of Strict-Transport-Security (RFC 6797 section 6.1): what an A+ asks for cannot be configured away.

use super::section::{Read, allowed, because};
use super::value::text;
use toml::de::DeValue;

/// What is sent unless the file says more: two years.
pub(super) const DEFAULT: &str = "max-age=63072000; includeSubDomains";
/// Half a year, below which SSL Labs gives no A+.
pub(super) const AGE_MIN_S: u64 = 15_768_000;
/// A hundred years: more is a slip of the pen.
const AGE_MAX_S: u64 = 3_153_600_000;

pub(super) fn hsts(value: &DeValue<'_>) -> Read<String> {
    const WHAT: &str = "\"max-age=SECONDS\", then \"; includeSubDomains\" and \"; preload\" or not, as in \"max-age=63072000; includeSubDomains\"";
    let found = text(value, WHAT)?;
    let mut directives = found.split(';').map(str::trim);
    let age = directives.next().and_then(|first| first.strip_prefix("max-age="));
    let is_number = |digits: &&str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let Some(age) = age.filter(is_number).and_then(|digits| digits.parse::<u64>().ok()) else { return allowed(WHAT) };
    let mut rest: Vec<&str> = directives.collect();
    if !rest.iter().all(|directive| ["includeSubDomains", "preload"].contains(directive)) {
        return allowed(WHAT);
    }
    let count = rest.len();
    rest.sort_unstable();
    rest.dedup();
    if rest.len() < count {
        return because("a directive is named twice");
    }
    if !(AGE_MIN_S..=AGE_MAX_S).contains(&age) {
        return because(format!(
            "max-age goes from {AGE_MIN_S} (half a year: below it no grade is an A+) to {AGE_MAX_S}"
        ));
    }
    Ok(std::iter::once(format!("max-age={age}"))
        .chain(rest.into_iter().map(str::to_owned))
        .collect::<Vec<_>>()
        .join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::section::Refusal;

    #[test]
    fn it_can_be_made_stronger_and_no_weaker() {
        let read = |text: &str| hsts(&DeValue::String(text.into()));
        for good in [DEFAULT, "max-age=15768000", "max-age=63072000; includeSubDomains; preload"] {
            assert!(matches!(read(good), Ok(value) if value == good), "{good}");
        }
        for weak in ["max-age=0", "max-age=15767999", "max-age=63072000; preload; preload"] {
            assert!(matches!(read(weak), Err(Refusal::Because(_))), "{weak}");
        }
        for other in ["", "max-age", "max-age=", "max-age=-1", "max-age=63072000;", "max-age=63072000\r\nX: y", "off"] {
            assert!(matches!(read(other), Err(Refusal::Allowed(_))), "{other}");
        }
    }
}
