//! What a first process is asked to do, as the file that carries it from the host into the guest.
//!
//! The file is a list of words, each ended by a NUL: a key, its value, the next key, and so on. NUL is the one byte that no
//! path, argument or environment variable can hold, so nothing has to be quoted.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// Where a guest's image keeps it; user-mode Linux names its own in the environment variable `TLSPLICE_REQUEST`.
pub const DEFAULT_PATH: &str = "/request";

/// How the exit status goes back to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// Through QEMU's isa-debug-exit device.
    DebugExitPort,
    /// As a decimal number in this file of the host's.
    File(PathBuf),
}

/// One command and what must be in place before it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Kernel modules, in the order in which they are loaded.
    pub modules: Vec<PathBuf>,
    /// Folders that get a tmpfs of their own.
    pub tmpfs: Vec<PathBuf>,
    pub env: Vec<(OsString, OsString)>,
    pub cwd: PathBuf,
    pub command: Vec<OsString>,
    /// The terminals that carry the command's output. Without one for stderr it joins stdout.
    pub stdout: PathBuf,
    pub stderr: Option<PathBuf>,
    pub status: Status,
}

impl Request {
    /// The file's content.
    pub fn encode(&self) -> Vec<u8> {
        let mut words = Vec::new();
        let mut put = |key: &str, value: &[u8]| {
            for word in [key.as_bytes(), value] {
                words.extend_from_slice(word);
                words.push(0);
            }
        };
        self.modules.iter().for_each(|m| put("module", m.as_os_str().as_bytes()));
        self.tmpfs.iter().for_each(|t| put("tmpfs", t.as_os_str().as_bytes()));
        for (name, value) in &self.env {
            put("env", &[name.as_bytes(), b"=", value.as_bytes()].concat());
        }
        put("cwd", self.cwd.as_os_str().as_bytes());
        put("stdout", self.stdout.as_os_str().as_bytes());
        if let Some(stderr) = &self.stderr {
            put("stderr", stderr.as_os_str().as_bytes());
        }
        match &self.status {
            Status::DebugExitPort => {}
            Status::File(path) => put("status", path.as_os_str().as_bytes()),
        }
        self.command.iter().for_each(|word| put("command", word.as_bytes()));
        words
    }

    /// Reads it back.
    ///
    /// # Errors
    /// Names the first word that is no key of ours, or what is missing.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut request = Self {
            modules: Vec::new(),
            tmpfs: Vec::new(),
            env: Vec::new(),
            cwd: PathBuf::from("/"),
            command: Vec::new(),
            stdout: PathBuf::new(),
            stderr: None,
            status: Status::DebugExitPort,
        };
        let body = bytes.strip_suffix(&[0]).ok_or("the request does not end with a NUL")?;
        let mut words = body.split(|&byte| byte == 0);
        while let Some(key) = words.next() {
            let key = String::from_utf8_lossy(key).into_owned();
            let value = words.next().ok_or_else(|| format!("the key {key:?} has no value"))?;
            let word = OsString::from_vec(value.to_vec());
            match key.as_str() {
                "module" => request.modules.push(word.into()),
                "tmpfs" => request.tmpfs.push(word.into()),
                "env" => request.env.push(split_variable(value)?),
                "cwd" => request.cwd = word.into(),
                "stdout" => request.stdout = word.into(),
                "stderr" => request.stderr = Some(word.into()),
                "status" => request.status = Status::File(word.into()),
                "command" => request.command.push(word),
                other => return Err(format!("{other:?} is no key of a request")),
            }
        }
        if request.command.is_empty() {
            return Err("the request names no command".into());
        }
        Ok(request)
    }
}

fn split_variable(bytes: &[u8]) -> Result<(OsString, OsString), String> {
    let at = bytes
        .iter()
        .position(|&byte| byte == b'=')
        .ok_or_else(|| format!("the environment variable {:?} has no '='", String::from_utf8_lossy(bytes)))?;
    Ok((OsString::from_vec(bytes[..at].to_vec()), OsString::from_vec(bytes[at + 1..].to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_with_empty_words_quotes_and_newlines_survives_the_way() {
        let request = Request {
            modules: vec!["/m/1.ko".into(), "/m/2.ko".into()],
            tmpfs: vec!["/tmp".into()],
            env: vec![("A".into(), "x=y\nz".into()), ("EMPTY".into(), "".into())],
            cwd: "/a b".into(),
            command: vec!["sh".into(), "-c".into(), "".into(), "echo \"'$A\n".into()],
            stdout: "/dev/ttyS1".into(),
            stderr: Some("/dev/tty2".into()),
            status: Status::File("/tmp/status".into()),
        };
        assert_eq!(Request::decode(&request.encode()), Ok(request));
    }

    #[test]
    fn a_request_cut_short_or_with_a_strange_key_is_refused() {
        assert!(Request::decode(b"command\0true").is_err());
        assert!(Request::decode(b"command\0").is_err());
        assert!(Request::decode(b"colour\0blue\0").is_err_and(|e| e.contains("colour")));
    }
}
