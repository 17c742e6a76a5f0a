//! A folder of one PEM file with whatever in it: served or refused, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tlsplice::config::Config;
use tlsplice::tls::certificates::Certificates;

fuzz_target!(|input: &[u8]| {
    let folder = PathBuf::from(format!("/dev/shm/tlsplice-fuzz-{}", std::process::id()));
    let file = folder.join("a.pem");
    fs::create_dir_all(&folder).expect("a folder in memory");
    fs::write(&file, input).expect("written");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("its own");
    let text = format!(
        "[tls]\ncertificates = [{folder:?}]\n[[listener]]\naddress = \"[::]:1\"\nupstream = \"u\"\n[[upstream]]\nname = \"u\"\n\
         servers = [\"unix:/u\"]\n"
    );
    let tls = Config::parse(Path::new("fuzz"), &text).expect("valid").tls;
    if let Ok(certificates) = Certificates::load(&tls) {
        assert!(!certificates.served().is_empty());
    }
});
