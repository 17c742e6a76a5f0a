//! A folder of PEM files with whatever in them: refused with reasons, or served as what it is.
//!
//!   text, cut at 0xff into files ─▶ folder in memory ─▶ pairs, judged ─▶ served
//!   DER (begins with 0x30) ─▶ read by x509 and by der ─▶ PEM with the test's key ─▶ the same
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustls::pki_types::CertificateDer;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tlsplice::config::{Config, Tls};
use tlsplice::tls::certificates::Certificates;
use tlsplice::tls::der::{INTEGER, Reader, SEQUENCE, Signed, context};
use tlsplice::tls::judge::{Measure, Shape, judge};
use tlsplice::tls::pem;
use tlsplice::tls::x509::Seen;

/// More files find nothing that these do not.
const FILES: usize = 4;
const KEY: &str = include_str!("../seeds/leaf.key");

fuzz_target!(|input: &[u8]| {
    if input.first() == Some(&SEQUENCE) {
        let chain = certificates(input);
        look_at(&chain);
        let text: String = chain.iter().map(|der| as_pem(der)).collect();
        serve(&[(text + KEY).as_bytes()]);
    } else {
        serve(&input.split(|byte| *byte == 0xff).take(FILES).collect::<Vec<_>>());
    }
});

fn tls() -> &'static (PathBuf, Tls) {
    static TLS: OnceLock<(PathBuf, Tls)> = OnceLock::new();
    TLS.get_or_init(|| {
        let folder = PathBuf::from(format!("/dev/shm/tlsplice-fuzz-{}", std::process::id()));
        let text = format!(
            "[tls]\ncertificates = [{folder:?}]\n[[listener]]\naddress = \"[::]:1\"\nupstream = \"u\"\n[[upstream]]\n\
             name = \"u\"\nservers = [\"unix:/u\"]\n"
        );
        let tls = Config::parse(Path::new("fuzz"), &text).expect("valid").tls;
        (folder, tls)
    })
}

fn serve(files: &[&[u8]]) {
    let (folder, tls) = tls();
    fs::create_dir_all(folder).expect("a folder in memory");
    let paths: Vec<PathBuf> = (0..files.len()).map(|index| folder.join(format!("{index}.pem"))).collect();
    for (path, bytes) in paths.iter().zip(files) {
        fs::write(path, bytes).expect("written");
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("its own");
    }
    let loaded = Certificates::load(tls);
    // Certificates are the same once they have been written anew.
    for path in &paths {
        let Ok(chain) = pem::certificates(path) else { continue };
        fs::write(path, chain.iter().map(|der| as_pem(der)).collect::<String>()).expect("written");
        assert_eq!(pem::certificates(path).as_ref(), Ok(&chain));
    }
    paths.iter().for_each(|path| fs::remove_file(path).expect("its own"));
    match loaded {
        Ok(certificates) => {
            assert!(!certificates.served().is_empty());
            for served in certificates.served() {
                // rustls' own reader of certificates refuses more, as ones of version 1; it finds no other key.
                let matched = served.certified.keys_match();
                assert!(!matches!(matched, Err(rustls::Error::InconsistentKeys(_))), "{matched:?}");
                assert_eq!(served.chain.len(), served.certified.cert.len());
                let leaf = &served.chain[0];
                assert!(leaf.in_force().is_ok() && leaf.may_serve && leaf.key.as_rsa_bits() >= 2048);
                assert!(served.names.iter().all(|name| certificates.resolver().covers(name)));
            }
        }
        Err(faults) => assert!(!faults.list().is_empty() && !faults.to_string().is_empty()),
    }
}

/// What one certificate says is what its signature covers: two readers find the same fields in the same places.
fn look_at(chain: &[CertificateDer<'_>]) {
    let seen: Vec<Seen> = chain.iter().filter_map(|der| Seen::read(der).ok()).collect();
    for (one, der) in seen.iter().zip(chain).filter(|_| seen.len() == chain.len()) {
        let Some(fields) = fields(der) else { continue };
        assert_eq!([&one.serial[..], &one.issuer, &one.subject, &one.key_info], fields);
    }
    if seen.is_empty() {
        return;
    }
    let shape = Shape::of(&seen);
    assert_eq!(shape.path[0], 0);
    assert!(shape.path.iter().chain(&shape.superfluous).all(|place| *place < seen.len()));
    let (_, tls) = tls();
    let said = judge(Path::new("fuzz"), &seen, &[], Measure { policy: tls.policy, ocsp: tls.ocsp });
    assert!(said.iter().all(|one| !one.message.is_empty()));
}

/// Serial number, issuer, subject and key (RFC 5280 section 4.1).
fn fields(der: &[u8]) -> Option<[&[u8]; 4]> {
    let mut inside = Signed::read(der)?.message.inside();
    inside.optional(context(0));
    let serial = inside.next(INTEGER)?.body;
    inside.next(SEQUENCE)?;
    let issuer = inside.next(SEQUENCE)?.whole;
    inside.next(SEQUENCE)?;
    let subject = inside.next(SEQUENCE)?.whole;
    Some([serial, issuer, subject, inside.next(SEQUENCE)?.whole])
}

/// One certificate behind the other, and what follows them as a last one.
fn certificates(input: &[u8]) -> Vec<CertificateDer<'_>> {
    let (mut reader, mut found) = (Reader(input), Vec::new());
    while found.len() < FILES
        && let Some(value) = reader.next(SEQUENCE)
    {
        found.push(CertificateDer::from(value.whole));
    }
    if !reader.is_empty() {
        found.push(CertificateDer::from(reader.0));
    }
    found
}

fn as_pem(der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for three in der.chunks(3) {
        let bits = three.iter().chain([&0; 2]).take(3).fold(0, |bits, byte| bits << 8 | usize::from(*byte));
        for place in 0..4 {
            let digit = DIGITS[bits >> (18 - 6 * place) & 63];
            text.push(if place <= three.len() { char::from(digit) } else { '=' });
        }
        // Long lines are as good.
    }
    text.push_str("\n-----END CERTIFICATE-----\n");
    text
}
