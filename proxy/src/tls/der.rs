//! DER as far as it is needed where no crate goes: signed structures, OCSP requests and answers (X.690).
//!
//! Definite lengths below 2^32, tags below 31. Reading borrows and never panics.

pub const INTEGER: u8 = 0x02;
pub const BIT_STRING: u8 = 0x03;
pub const OCTET_STRING: u8 = 0x04;
pub const NULL: u8 = 0x05;
pub const OID: u8 = 0x06;
pub const ENUMERATED: u8 = 0x0a;
pub const GENERALIZED_TIME: u8 = 0x18;
pub const SEQUENCE: u8 = 0x30;

/// `[n]`, constructed.
pub const fn context(n: u8) -> u8 {
    0xa0 | n
}

/// One value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Value<'a> {
    pub tag: u8,
    pub body: &'a [u8],
    /// With tag and length.
    pub whole: &'a [u8],
}

/// What is left to read.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next value, whatever it is.
    pub fn any(&mut self) -> Option<Value<'a>> {
        let [tag, first, rest @ ..] = self.0 else { return None };
        if tag & 0x1f == 0x1f {
            return None;
        }
        let (length, head) = match *first {
            short @ 0..=0x7f => (usize::from(short), 2),
            0x81..=0x84 => {
                let width = usize::from(first & 0x7f);
                (rest.get(..width)?.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)), 2 + width)
            }
            0x80 | 0x85.. => return None,
        };
        let (whole, after) = self.0.split_at_checked(head.checked_add(length)?)?;
        self.0 = after;
        Some(Value { tag: *tag, body: &whole[head..], whole })
    }

    /// The next value, which has this tag.
    pub fn next(&mut self, tag: u8) -> Option<Value<'a>> {
        self.any().filter(|value| value.tag == tag)
    }

    /// The next value if it has this tag.
    pub fn optional(&mut self, tag: u8) -> Option<Value<'a>> {
        if self.0.first() == Some(&tag) { self.any() } else { None }
    }
}

impl<'a> Value<'a> {
    pub fn inside(&self) -> Reader<'a> {
        Reader(self.body)
    }

    /// The bytes of a BIT STRING without unused bits.
    pub fn bits(&self) -> Option<&'a [u8]> {
        match self.body {
            [0, bits @ ..] if self.tag == BIT_STRING => Some(bits),
            _ => None,
        }
    }
}

/// Writes one value around `parts`.
pub fn write(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut value = vec![tag];
    if let Ok(short @ 0..=0x7f) = u8::try_from(length) {
        value.push(short);
    } else {
        let bytes = length.to_be_bytes();
        let bytes: Vec<u8> = bytes.into_iter().skip_while(|byte| *byte == 0).collect();
        value.push(0x80 | bytes.len() as u8);
        value.extend(bytes);
    }
    parts.iter().for_each(|part| value.extend_from_slice(part));
    value
}

/// `SEQUENCE { signed, algorithm, BIT STRING signature, … }`: certificates and OCSP answers alike.
#[derive(Debug, Clone, Copy)]
pub struct Signed<'a> {
    pub message: Value<'a>,
    /// The body of the AlgorithmIdentifier.
    pub algorithm: &'a [u8],
    pub signature: &'a [u8],
    pub rest: Reader<'a>,
}

impl<'a> Signed<'a> {
    pub fn read(der: &'a [u8]) -> Option<Self> {
        let mut inside = Reader(der).next(SEQUENCE)?.inside();
        let message = inside.next(SEQUENCE)?;
        let algorithm = inside.next(SEQUENCE)?.body;
        let signature = inside.next(BIT_STRING)?.bits()?;
        Some(Self { message, algorithm, signature, rest: inside })
    }

    /// Whether the key of this SubjectPublicKeyInfo signed it. SHA-1 and older are not among what is verified.
    pub fn is_signed_by(&self, key_info: &[u8]) -> bool {
        let Some((algorithm, key)) = key_parts(key_info) else { return false };
        let known = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all;
        known
            .iter()
            .filter(|a| a.public_key_alg_id().as_ref() == algorithm && a.signature_alg_id().as_ref() == self.algorithm)
            .any(|a| a.verify_signature(key, self.message.whole, self.signature).is_ok())
    }
}

/// Algorithm and key of a SubjectPublicKeyInfo.
pub fn key_parts(key_info: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut inside = Reader(key_info).next(SEQUENCE)?.inside();
    let algorithm = inside.next(SEQUENCE)?.body;
    Some((algorithm, inside.next(BIT_STRING)?.bits()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        for length in [0, 1, 127, 128, 255, 256, 70_000] {
            let body = vec![7; length];
            let value = write(OCTET_STRING, &[&body[..length / 2], &body[length / 2..]]);
            let mut reader = Reader(&value);
            let read = reader.next(OCTET_STRING).expect("a value");
            assert_eq!((read.body, read.whole), (&body[..], &value[..]));
            assert!(reader.is_empty());
            assert!(Reader(&value[..value.len() - 1]).any().is_none());
        }
        for odd in
            [&[0x30, 0x80, 0, 0][..], &[0x1f, 1, 0], &[0x30, 0x85, 1, 1, 1, 1, 1], &[0x30, 0x84, 255, 255, 255, 255]]
        {
            assert!(Reader(odd).any().is_none());
        }
    }
}
