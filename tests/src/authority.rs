//! A certificate authority of a test: a root, an intermediate, and whatever leaves it is asked for, made by openssl.

use crate::process::find_program;
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// See the module.
#[derive(Debug)]
pub struct Authority {
    pub folder: PathBuf,
    /// What clients trust.
    pub root: PathBuf,
    pub intermediate: PathBuf,
}

/// A leaf to issue.
#[derive(Debug, Clone)]
pub struct Leaf<'a> {
    pub file: &'a str,
    pub name: &'a str,
    /// As `openssl req -newkey` takes it: `rsa:2048`, or a curve.
    pub key: &'a str,
    pub days: &'a str,
    pub hash: &'a str,
    /// Lines of its extensions beside the name.
    pub extensions: &'a str,
}

impl Default for Leaf<'_> {
    fn default() -> Self {
        Self { file: "leaf", name: crate::certificate::NAME, key: "P-256", days: "90", hash: "-sha256", extensions: "" }
    }
}

/// A leaf that was issued.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The leaf alone.
    pub leaf: PathBuf,
    /// With the intermediate behind it.
    pub chain: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    pub fn make(folder: &Path) -> Result<Self> {
        Self::with_key(folder, "rsa:2048")
    }

    /// One that signs with such a key, as a `Leaf` names it.
    pub fn with_key(folder: &Path, key: &str) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let at = |name: &str| folder.join(name);
        let (root, intermediate) = (at("root.pem"), at("intermediate.pem"));
        let ca =
            "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n";
        request(folder, "root", key, "Test Root")?;
        sign(folder, "root", None, "3650", "-sha256", ca)?;
        request(folder, "intermediate", key, "Test Intermediate")?;
        sign(folder, "intermediate", Some("root"), "1825", "-sha256", ca)?;
        Ok(Self { folder: folder.to_owned(), root, intermediate })
    }

    pub fn issue(&self, leaf: &Leaf<'_>) -> Result<Issued> {
        let Leaf { file, name, key, days, hash, extensions } = leaf;
        request(&self.folder, file, key, name)?;
        let text = format!(
            "basicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\nsubjectAltName=DNS:{name},DNS:localhost,IP:127.0.0.1\n{extensions}\n"
        );
        sign(&self.folder, file, Some("intermediate"), days, hash, &text)?;
        let at = |ending: &str| self.folder.join(format!("{file}.{ending}"));
        let (leaf, chain) = (at("pem"), at("chain"));
        fs::write(&chain, fs::read_to_string(&leaf)? + &fs::read_to_string(&self.intermediate)?)?;
        Ok(Issued { leaf, chain, key: at("key") })
    }
}

pub fn openssl(folder: &Path, arguments: &[&str]) -> Result<Vec<u8>> {
    let program = find_program("openssl").context("no openssl on this machine")?;
    let output = Command::new(program).args(arguments).current_dir(folder).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "openssl {}: {}", arguments.join(" "), said.trim());
    Ok(output.stdout)
}

fn request(folder: &Path, file: &str, key: &str, name: &str) -> Result<()> {
    let (key_file, subject) = (format!("{file}.key"), format!("/CN={name}"));
    match key.strip_prefix("rsa:") {
        Some(bits) => openssl(folder, &["genrsa", "-out", &key_file, bits])?,
        None => openssl(
            folder,
            &["genpkey", "-algorithm", "EC", "-pkeyopt", &format!("ec_paramgen_curve:{key}"), "-out", &key_file],
        )?,
    };
    fs::set_permissions(folder.join(&key_file), fs::Permissions::from_mode(0o600))?;
    openssl(folder, &["req", "-new", "-key", &key_file, "-subj", &subject, "-out", &format!("{file}.csr")])?;
    Ok(())
}

/// By itself, if by nobody else.
fn sign(folder: &Path, file: &str, by: Option<&str>, days: &str, hash: &str, extensions: &str) -> Result<()> {
    let (ext, request, out) = (format!("{file}.ext"), format!("{file}.csr"), format!("{file}.pem"));
    fs::write(folder.join(&ext), extensions)?;
    let signer = by.unwrap_or(file);
    let (signer_key, signer_certificate) = (format!("{signer}.key"), format!("{signer}.pem"));
    let mut arguments = vec!["x509", "-req", hash, "-in", &request, "-out", &out, "-days", days, "-extfile", &ext];
    if by.is_some() {
        arguments.extend(["-CA", &signer_certificate, "-CAkey", &signer_key, "-CAcreateserial"]);
    } else {
        arguments.extend(["-key", &signer_key]);
    }
    openssl(folder, &arguments).map(drop)
}
