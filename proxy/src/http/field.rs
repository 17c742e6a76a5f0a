//! What a field is to a proxy, by its name: framing, routing, one connection's own, or none of our business.

use super::refusal::Refusal;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    Host,
    ContentLength,
    TransferEncoding,
    Connection,
    Upgrade,
    Expect,
    Te,
    MaxForwards,
    Date,
    StrictTransportSecurity,
    /// Of this connection, though `Connection` may not name it (RFC 9110 section 7.6.1).
    HopByHop,
    /// What only the proxy nearest to the upstream may say of the client.
    Forwarding,
    /// Frames or routes a message once somebody reads `_` as `-`, as CGI does.
    Disguised,
    Other,
}

/// Forwarding fields that other proxies set and applications believe. `Proxy` becomes HTTP_PROXY in CGI.
const FORWARDING: [&str; 4] = ["forwarded", "x-real-ip", "proxy", "x-client-ip"];

impl Field {
    pub fn of(name: &str) -> Self {
        const KNOWN: [(&str, Field); 12] = [
            ("host", Field::Host),
            ("content-length", Field::ContentLength),
            ("transfer-encoding", Field::TransferEncoding),
            ("connection", Field::Connection),
            ("upgrade", Field::Upgrade),
            ("expect", Field::Expect),
            ("te", Field::Te),
            ("max-forwards", Field::MaxForwards),
            ("date", Field::Date),
            ("strict-transport-security", Field::StrictTransportSecurity),
            ("keep-alive", Field::HopByHop),
            ("proxy-connection", Field::HopByHop),
        ];
        if let Some((_, field)) = KNOWN.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)) {
            return *field;
        }
        if FORWARDING.iter().any(|known| matches(known, name)) || starts_with("x-forwarded-", name) {
            return Self::Forwarding;
        }
        if ["content-length", "transfer-encoding"].iter().any(|known| matches(known, name)) {
            return Self::Disguised;
        }
        Self::Other
    }

    /// May stand in a trailer: nothing that frames, routes or controls the message (RFC 9110 section 6.5.1).
    pub fn may_trail(name: &str) -> bool {
        const NEVER: [&str; 12] = [
            "authorization",
            "cache-control",
            "content-encoding",
            "content-range",
            "content-type",
            "cookie",
            "proxy-authenticate",
            "proxy-authorization",
            "range",
            "set-cookie",
            "trailer",
            "www-authenticate",
        ];
        match Self::of(name) {
            Self::Other => !NEVER.iter().any(|never| never.eq_ignore_ascii_case(name)),
            Self::Date => true,
            Self::Host
            | Self::ContentLength
            | Self::TransferEncoding
            | Self::Connection
            | Self::Upgrade
            | Self::Expect
            | Self::Te
            | Self::MaxForwards
            | Self::StrictTransportSecurity
            | Self::HopByHop
            | Self::Forwarding
            | Self::Disguised => false,
        }
    }
}

/// The same name, `_` read as `-`.
fn matches(known: &str, name: &str) -> bool {
    known.len() == name.len() && starts_with(known, name)
}

fn starts_with(known: &str, name: &str) -> bool {
    let same = |(k, n): (u8, u8)| k == n.to_ascii_lowercase() || k == b'-' && n == b'_';
    name.len() >= known.len() && known.bytes().zip(name.bytes()).all(same)
}

/// The members of a list (RFC 9110 section 5.6.1), empty ones left out.
pub fn members(value: &str) -> impl Iterator<Item = &str> {
    value.split(',').map(|member| member.trim_matches([' ', '\t'])).filter(|member| !member.is_empty())
}

/// What the `Connection` fields of a head say.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Connection {
    pub close: bool,
    pub upgrade: bool,
    /// Fields that are not passed on, in lower case.
    named: Vec<String>,
}

impl Connection {
    /// # Errors
    /// It names what frames or routes the message, or something that is no name.
    pub fn add(&mut self, value: &str) -> Result<(), Refusal> {
        for option in members(value) {
            if !option.bytes().all(is_token_byte) {
                return Err(Refusal::bad_request("Connection names what is no field"));
            }
            let option = option.to_ascii_lowercase();
            match option.as_str() {
                "close" => self.close = true,
                "upgrade" => self.upgrade = true,
                "keep-alive" => {}
                "host" | "content-length" | "transfer-encoding" | "connection" => {
                    return Err(Refusal::bad_request("Connection names what frames or routes the message"));
                }
                _ => self.named.push(option),
            }
        }
        Ok(())
    }

    pub fn names(&self, field: &str) -> bool {
        self.named.iter().any(|named| named.eq_ignore_ascii_case(field))
    }
}

/// tchar of RFC 9110 section 5.6.2.
pub fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disguise_is_seen_through() {
        assert_eq!(Field::of("X_Forwarded-FOR"), Field::Forwarding);
        assert_eq!(Field::of("x-forwarded-anything"), Field::Forwarding);
        assert_eq!(Field::of("Content_Length"), Field::Disguised);
        assert_eq!(Field::of("transfer_encoding"), Field::Disguised);
        assert_eq!(Field::of("Transfer-Encodin"), Field::Other);
        assert_eq!(Field::of("CONTENT-LENGTH"), Field::ContentLength);
    }

    #[test]
    fn connection_options_are_told_from_fields() {
        let mut connection = Connection::default();
        connection.add("Keep-Alive, X-One,, close").expect("good");
        connection.add("Upgrade").expect("good");
        assert!(connection.close && connection.upgrade);
        assert!(connection.names("x-oNe") && !connection.names("x-two"));
        assert!(connection.add("Content-Length").is_err());
        assert!(connection.add("a b").is_err());
    }

    #[test]
    fn trailers_neither_frame_nor_route() {
        for name in
            ["Content-Length", "Transfer-Encoding", "Host", "X-Forwarded-For", "Authorization", "Set-Cookie", "TE"]
        {
            assert!(!Field::may_trail(name), "{name}");
        }
        assert!(Field::may_trail("Grpc-Status") && Field::may_trail("X-Checksum"));
    }
}
