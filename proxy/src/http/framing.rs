//! Where a body ends (RFC 9112 section 6), from the fields of its head, with nothing left to interpretation.

use super::refusal::{Refusal, Status};

/// The longest body: beyond it, implementations count differently.
pub const LENGTH_MAX: u64 = i64::MAX as u64;

/// How a body is delimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    None,
    Length(u64),
    Chunked,
    /// A response's only: it ends with its connection.
    UntilClose,
}

/// What the fields of a head say of the body.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Framing {
    length: Option<u64>,
    chunked: bool,
}

impl Framing {
    /// # Errors
    /// 400 for a length that is none, or a second one.
    pub fn add_length(&mut self, value: &[u8]) -> Result<(), Refusal> {
        if self.length.is_some() {
            return Err(Refusal::bad_request("more than one Content-Length"));
        }
        self.length = Some(length(value).ok_or(Refusal::bad_request("a Content-Length that is no number below 2^63"))?);
        Ok(())
    }

    /// # Errors
    /// 501 for a coding that is not ours, 400 for what frames nothing.
    pub fn add_transfer_encoding(&mut self, value: &[u8], minor: u8) -> Result<(), Refusal> {
        if minor == 0 {
            return Err(Refusal::bad_request("Transfer-Encoding in HTTP/1.0"));
        }
        if self.chunked {
            return Err(Refusal::bad_request("more than one Transfer-Encoding"));
        }
        if !value.eq_ignore_ascii_case(b"chunked") {
            let known =
                |coding: &[u8]| [&b"gzip"[..], b"x-gzip", b"deflate", b"compress", b"x-compress"].contains(&coding);
            let lower = value.to_ascii_lowercase();
            let mut codings = lower.split(|b| *b == b',').map(<[u8]>::trim_ascii);
            let is_last_chunked = codings.next_back() == Some(b"chunked");
            if is_last_chunked && codings.clone().count() > 0 && codings.all(known) {
                return Err(Refusal::new(Status::NotImplemented, "a transfer coding other than chunked"));
            }
            return Err(Refusal::bad_request("a Transfer-Encoding that is not exactly chunked"));
        }
        self.chunked = true;
        Ok(())
    }

    fn either(&self) -> Result<Option<Body>, Refusal> {
        match (self.chunked, self.length) {
            (true, Some(_)) => Err(Refusal::bad_request("both Transfer-Encoding and Content-Length")),
            (true, None) => Ok(Some(Body::Chunked)),
            (false, Some(length)) => Ok(Some(Body::Length(length))),
            (false, None) => Ok(None),
        }
    }

    /// # Errors
    /// 400 if the fields contradict each other.
    pub fn of_request(&self) -> Result<Body, Refusal> {
        Ok(match self.either()? {
            None | Some(Body::Length(0)) => Body::None,
            Some(body) => body,
        })
    }

    /// Of a final response with this status.
    ///
    /// # Errors
    /// As `of_request`.
    pub fn of_response(&self, status: u16, to_head: bool) -> Result<Body, Refusal> {
        let body = self.either()?;
        if to_head || status == 204 || status == 304 {
            return Ok(Body::None);
        }
        Ok(match body {
            None => Body::UntilClose,
            Some(Body::Length(0)) => Body::None,
            Some(body) => body,
        })
    }

    /// Some field frames a body.
    pub fn is_framed(&self) -> bool {
        self.chunked || self.length.is_some()
    }

    pub fn is_chunked(&self) -> bool {
        self.chunked
    }

    pub fn length(&self) -> Option<u64> {
        self.length
    }
}

/// 1*DIGIT, below 2^63.
fn length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let text = std::str::from_utf8(value).ok()?;
    text.parse().ok().filter(|length| *length <= LENGTH_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framing(fields: &[(&str, &str)]) -> Result<Framing, Refusal> {
        let mut framing = Framing::default();
        for (name, value) in fields {
            match *name {
                "cl" => framing.add_length(value.as_bytes())?,
                _ => framing.add_transfer_encoding(value.as_bytes(), 1)?,
            }
        }
        Ok(framing)
    }

    #[test]
    fn a_length_is_digits_below_two_to_the_63() {
        assert_eq!(length(b"0"), Some(0));
        assert_eq!(length(b"007"), Some(7));
        assert_eq!(length(b"9223372036854775807"), Some(LENGTH_MAX));
        let bad =
            ["", "+5", "-5", "5 ", "0x5", "5,5", "5, 5", "5;", "9223372036854775808", "99999999999999999999", "٥"];
        for bad in bad {
            assert_eq!(length(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn what_could_be_read_two_ways_is_refused() {
        for bad in [
            &[("cl", "5"), ("cl", "5")][..],
            &[("cl", "5"), ("cl", "6")],
            &[("te", "chunked"), ("te", "chunked")],
            &[("te", "chunked, chunked")],
            &[("te", "identity")],
            &[("te", "chunked, identity")],
            &[("te", "xchunked")],
            &[("te", "\"chunked\"")],
            &[("te", "chunked;q=1")],
            &[("te", "")],
        ] {
            assert!(matches!(framing(bad), Err(r) if r.status == Status::BadRequest), "{bad:?}");
        }
        for both in [&[("cl", "5"), ("te", "chunked")][..], &[("te", "chunked"), ("cl", "0")]] {
            let both = framing(both).expect("each alone is good");
            assert!(both.of_request().is_err() && both.of_response(200, false).is_err());
            assert!(both.of_response(304, false).is_err() && both.of_response(200, true).is_err());
        }
        assert!(matches!(framing(&[("te", "gzip, chunked")]), Err(r) if r.status == Status::NotImplemented));
        let old = Framing::default().add_transfer_encoding(b"chunked", 0);
        assert!(matches!(old, Err(r) if r.status == Status::BadRequest));
    }

    #[test]
    fn some_responses_have_no_body_whatever_they_say() {
        let five = framing(&[("cl", "5")]).expect("good");
        assert_eq!(five.of_response(200, false), Ok(Body::Length(5)));
        for (status, to_head) in [(204, false), (304, false), (200, true)] {
            assert_eq!(five.of_response(status, to_head), Ok(Body::None));
        }
        assert_eq!(Framing::default().of_response(200, false), Ok(Body::UntilClose));
        assert_eq!(Framing::default().of_request(), Ok(Body::None));
        assert_eq!(framing(&[("te", "Chunked")]).and_then(|f| f.of_request()), Ok(Body::Chunked));
    }
}
