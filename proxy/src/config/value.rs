//! Single values: durations, sizes, numbers, addresses and words, each from its TOML form.

use super::ServerAddress;
use super::section::{Read, Refusal, allowed, because};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;
use toml::de::DeValue;

/// Bytes that a unix socket's path may have: `sockaddr_un.sun_path` less its final zero, unix(7).
const UNIX_PATH_MAX_BYTES: usize = 107;
/// Threads beyond this are a slip of the pen: no host has so many cores.
const WORKERS_MAX: usize = 1024;

pub(super) fn text<'a>(value: &'a DeValue<'a>, what: &str) -> Read<&'a str> {
    match value {
        DeValue::String(text) => Ok(text),
        DeValue::Integer(_)
        | DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_)
        | DeValue::Array(_)
        | DeValue::Table(_) => allowed(what),
    }
}

/// One word of a fixed set; `later` are words of the contract which this version has not.
pub(super) fn word<T: Copy>(value: &DeValue<'_>, now: &[(&str, T)], later: &[&str]) -> Read<T> {
    let known = || now.iter().map(|(name, _)| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
    let found = text(value, &known())?;
    if let Some((_, meaning)) = now.iter().find(|(name, _)| *name == found) {
        return Ok(*meaning);
    }
    if later.contains(&found) { Err(Refusal::NotInThisVersion) } else { allowed(known()) }
}

/// A whole number within `range`.
pub(super) fn whole(value: &DeValue<'_>, range: RangeInclusive<u64>) -> Read<u64> {
    let what = || format!("a whole number from {} to {}", range.start(), range.end());
    match integer(value) {
        Some(number) if range.contains(&number) => Ok(number),
        Some(_) | None => allowed(what()),
    }
}

fn integer(value: &DeValue<'_>) -> Option<u64> {
    match value {
        DeValue::Integer(digits) => u64::from_str_radix(digits.as_str(), digits.radix()).ok(),
        DeValue::String(_)
        | DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_)
        | DeValue::Array(_)
        | DeValue::Table(_) => None,
    }
}

/// `"auto"`, the cores that this process may use, or a number of threads.
pub(super) fn workers(value: &DeValue<'_>) -> Read<NonZeroUsize> {
    if let DeValue::String(word) = value
        && word == "auto"
    {
        return Ok(std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN));
    }
    let number = integer(value).and_then(|n| usize::try_from(n).ok()).filter(|n| *n <= WORKERS_MAX);
    match number.and_then(NonZeroUsize::new) {
        Some(count) => Ok(count),
        None => allowed(format!("\"auto\" or a whole number from 1 to {WORKERS_MAX}")),
    }
}

/// `"500ms"`, `"10s"`, `"5m"`, `"1h"`, `"1d"`: a whole number and one unit.
pub(super) fn duration(value: &DeValue<'_>, range: RangeInclusive<Duration>) -> Read<Duration> {
    let what = || {
        let (least, most) = (humane(*range.start()), humane(*range.end()));
        format!("a duration in quotes with a unit of ms, s, m, h or d, as in \"10s\", from {least} to {most}")
    };
    match text(value, &what()).ok().and_then(parse_duration) {
        Some(duration) if range.contains(&duration) => Ok(duration),
        Some(_) | None => allowed(what()),
    }
}

fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = number_and_unit(text)?;
    let unit_ms: u64 = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    Some(Duration::from_millis(number.checked_mul(unit_ms)?))
}

/// A duration as the file would say it.
fn humane(duration: Duration) -> String {
    let ms = duration.as_millis();
    for (unit_ms, unit) in [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s")] {
        if ms >= unit_ms && ms.is_multiple_of(unit_ms) {
            return format!("{}{unit}", ms / unit_ms);
        }
    }
    if ms == 0 { "0s".to_owned() } else { format!("{ms}ms") }
}

/// `"64 MiB"`, `"32 KiB"`, or a plain number of bytes.
pub(super) fn size(value: &DeValue<'_>, range: RangeInclusive<u64>) -> Read<u64> {
    let bytes = match value {
        DeValue::String(text) => parse_size(text),
        DeValue::Integer(_) => integer(value),
        DeValue::Float(_) | DeValue::Boolean(_) | DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    };
    match bytes {
        Some(bytes) if range.contains(&bytes) => Ok(bytes),
        Some(_) | None => allowed(format!(
            "a number of bytes or a size in quotes with a unit of B, KiB, MiB or GiB, as in \"64 MiB\", from {} to {} bytes",
            range.start(),
            range.end()
        )),
    }
}

fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = number_and_unit(text)?;
    let unit_bytes: u64 = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(unit_bytes)
}

fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits)?;
    Some((number.parse().ok()?, unit.trim_start()))
}

/// `"[::]:443"`, `"0.0.0.0:443"`.
pub(super) fn socket_address(value: &DeValue<'_>) -> Read<SocketAddr> {
    const WHAT: &str = "an IP address and a port in quotes, as in \"[::]:443\" or \"127.0.0.1:8443\"";
    let address: SocketAddr = match text(value, WHAT)?.parse() {
        Ok(address) => address,
        Err(_) => return allowed(WHAT),
    };
    if address.port() == 0 {
        because("port 0 is none that a client could know; allowed: 1 to 65535")
    } else {
        Ok(address)
    }
}

/// `"127.0.0.1:8080"`, `"[::1]:8080"`, `"unix:/run/app.sock"`.
pub(super) fn server_address(value: &DeValue<'_>) -> Read<ServerAddress> {
    const WHAT: &str = "an IP address and a port, as in \"127.0.0.1:8080\", or \"unix:\" and an absolute path, as in \"unix:/run/app.sock\"";
    let found = text(value, WHAT)?;
    let Some(path) = found.strip_prefix("unix:") else {
        return socket_address(value).map(ServerAddress::Tcp).map_err(|refusal| match refusal {
            Refusal::Allowed(_) => Refusal::Allowed(WHAT.to_owned()),
            Refusal::Because(_) | Refusal::NotInThisVersion => refusal,
        });
    };
    if !path.starts_with('/') || path.contains('\0') {
        return allowed(WHAT);
    }
    if path.len() > UNIX_PATH_MAX_BYTES {
        return because(format!("the path of a unix socket has at most {UNIX_PATH_MAX_BYTES} bytes"));
    }
    Ok(ServerAddress::Unix(PathBuf::from(path)))
}

/// A path that means the same from every working directory.
pub(super) fn path(value: &DeValue<'_>) -> Read<PathBuf> {
    const WHAT: &str = "a path in quotes";
    let found = text(value, WHAT)?;
    if found.is_empty() || found.contains('\0') { allowed(WHAT) } else { Ok(PathBuf::from(found)) }
}

/// A name that is not empty and holds no blanks or control characters.
pub(super) fn name(value: &DeValue<'_>) -> Read<String> {
    const WHAT: &str = "a name in quotes of letters, digits, '.', '_' and '-', at most 64";
    let found = text(value, WHAT)?;
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if found.is_empty() || found.len() > 64 || !found.chars().all(legal) { allowed(WHAT) } else { Ok(found.to_owned()) }
}

/// `true` or `false`.
pub(super) fn truth(value: &DeValue<'_>) -> Read<bool> {
    match value {
        DeValue::Boolean(truth) => Ok(*truth),
        DeValue::String(_)
        | DeValue::Integer(_)
        | DeValue::Float(_)
        | DeValue::Datetime(_)
        | DeValue::Array(_)
        | DeValue::Table(_) => allowed("true or false"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_one_unit() {
        assert_eq!(parse_duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_duration("10s"), Some(Duration::from_secs(10)));
        assert_eq!(parse_duration("5m"), Some(Duration::from_secs(300)));
        assert_eq!(parse_duration("1 h"), Some(Duration::from_secs(3600)));
        for wrong in ["", "10", "s", "-1s", "1.5s", "1h30m", "10 seconds", "99999999999999999999s", "9999999999999999d"]
        {
            assert_eq!(parse_duration(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn sizes_are_binary() {
        assert_eq!(parse_size("64 MiB"), Some(64 << 20));
        assert_eq!(parse_size("32KiB"), Some(32 << 10));
        assert_eq!(parse_size("1 GiB"), Some(1 << 30));
        assert_eq!(parse_size("100"), Some(100));
        for wrong in ["", "MiB", "64 MB", "64mib", "1.5 MiB", "-1 KiB", "99999999999 GiB"] {
            assert_eq!(parse_size(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_duration_is_said_as_it_is_written() {
        assert_eq!(humane(Duration::from_millis(1500)), "1500ms");
        assert_eq!(humane(Duration::from_secs(3600)), "1h");
        assert_eq!(humane(Duration::ZERO), "0s");
    }
}
