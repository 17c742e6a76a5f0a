//! What a request asks for (RFC 9112 section 3.2), in the form that an origin server gets.

use super::refusal::Refusal;
use std::borrow::Cow;

/// A host that is longer than any name with its port can be (RFC 1035 section 2.3.4).
const HOST_BYTES: usize = 255 + ":65535".len();

/// See the module.
#[derive(Debug, PartialEq, Eq)]
pub struct Target<'a> {
    /// From the slash on, or `*`.
    pub path: Cow<'a, str>,
    /// Where the target is a whole URI.
    pub authority: Option<&'a str>,
}

impl<'a> Target<'a> {
    /// # Errors
    /// 400 for a target of another form, with a fragment, or with bytes that no URI has.
    pub fn parse(method: &str, target: &'a str) -> Result<Self, Refusal> {
        if !target.bytes().all(|b| matches!(b, b'!'..=b'~') && b != b'#') {
            return Err(Refusal::bad_request("a target with a fragment, or with bytes that no URI has"));
        }
        if target.starts_with('/') {
            return Ok(Self { path: target.into(), authority: None });
        }
        if target == "*" && method == "OPTIONS" {
            return Ok(Self { path: target.into(), authority: None });
        }
        let (scheme, rest) = target.split_once("://").ok_or(Refusal::bad_request("a target that is no path"))?;
        if !["http", "https"].iter().any(|known| known.eq_ignore_ascii_case(scheme)) {
            return Err(Refusal::bad_request("a target of another scheme"));
        }
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        if !is_host(authority) {
            return Err(Refusal::bad_request("a target whose authority is none"));
        }
        let path = match path {
            "" if method == "OPTIONS" => "*".into(),
            "" => "/".into(),
            query if query.starts_with('?') => format!("/{query}").into(),
            path => path.into(),
        };
        Ok(Self { path, authority: Some(authority) })
    }
}

/// A host with or without a port (RFC 3986 section 3.2.2), without userinfo. The comma is left out: a list of hosts is
/// not one.
pub fn is_host(host: &str) -> bool {
    if host.is_empty() || host.len() > HOST_BYTES {
        return false;
    }
    let (name, port) = if let Some(rest) = host.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else { return false };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        ("v6", port)
    } else {
        host.split_at(host.find(':').unwrap_or(host.len()))
    };
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+;=%".contains(&b);
    let is_port = port.strip_prefix(':').map_or(port, |digits| digits);
    let port_is_good = port.is_empty() || port.starts_with(':') && is_port.bytes().all(|b| b.is_ascii_digit());
    !name.is_empty() && name.bytes().all(legal) && port_is_good && is_port.len() <= 5
}

/// The host alone.
pub fn without_port(host: &str) -> &str {
    let end = if host.starts_with('[') { host.find(']').map(|at| at + 1) } else { host.find(':') };
    &host[..end.unwrap_or(host.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_becomes_what_an_origin_server_gets() {
        let parse = |target| Target::parse("GET", target).map(|t| (t.path.into_owned(), t.authority));
        assert_eq!(parse("/a?b"), Ok(("/a?b".into(), None)));
        assert_eq!(parse("//a/b"), Ok(("//a/b".into(), None)));
        assert_eq!(parse("http://a:1/b"), Ok(("/b".into(), Some("a:1"))));
        assert_eq!(parse("HTTPS://a"), Ok(("/".into(), Some("a"))));
        assert_eq!(parse("https://a?q"), Ok(("/?q".into(), Some("a"))));
        assert_eq!(Target::parse("OPTIONS", "http://a").map(|t| t.path), Ok("*".into()));
        assert_eq!(Target::parse("OPTIONS", "*").map(|t| t.path), Ok("*".into()));
        for bad in
            ["*", "a", "a:443", "/a#b", "ftp://a/", "http://", "http:///a", "http://u@a/", "http://a,b/", "/\u{e9}", ""]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_host_is_a_name_or_an_address_with_or_without_a_port() {
        for good in ["a", "a.b", "a:1", "a:", "127.0.0.1:8080", "[::1]", "[::1]:443", "a_b", "xn--a"] {
            assert!(is_host(good), "{good}");
        }
        let bad = [
            "", ":80", "a b", "a/b", "u@a", "a,b", "a:b", "a:1:2", "[::1", "::1", "[::1]a", "[x]", "a:123456", "a\\b",
            "a\"b",
        ];
        for bad in bad {
            assert!(!is_host(bad), "{bad}");
        }
        assert!(!is_host(&"a".repeat(262)));
        assert_eq!((without_port("a:1"), without_port("[::1]:1"), without_port("a")), ("a", "[::1]", "a"));
    }
}
