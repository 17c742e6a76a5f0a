//! Where the tests run, and what differs there: sizes, counts and patience, and what the kernel can do.

use anyhow::{Context as _, Result, bail};
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

/// The machine's kernel, by TLSPLICE_KERNEL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    Host,
    /// User-mode Linux on the host's files: kTLS at native speed, one CPU.
    Uml,
    /// A guest under emulation, about 20 times slower, by its series.
    Guest(&'static str),
}

impl Kernel {
    fn parse(name: &str) -> Result<Self> {
        match name {
            "host" => Ok(Self::Host),
            "uml" => Ok(Self::Uml),
            // Once in the life of the process.
            series if is_series(series) => Ok(Self::Guest(series.to_owned().leak())),
            other => bail!("TLSPLICE_KERNEL={other}: allowed are host, uml, or a series such as 6.12"),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Uml => "uml",
            Self::Guest(series) => series,
        }
    }
}

fn is_series(name: &str) -> bool {
    name.split_once('.').is_some_and(|(major, minor)| major.parse::<u8>().is_ok() && minor.parse::<u8>().is_ok())
}

/// How the bytes go through tlsplice in this test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relay {
    /// `offload = "off"`.
    Userspace,
    /// `offload = "require"`, `splice = "auto"`: each direction goes by what costs less on this kernel.
    Auto,
    /// `offload = "require"`, `splice = "inline"`.
    Inline,
    /// `offload = "require"`, `splice = "ring"`.
    Ring,
}

impl Relay {
    pub fn name(self) -> &'static str {
        match self {
            Self::Userspace => "userspace",
            Self::Auto => "auto",
            Self::Inline => "inline",
            Self::Ring => "ring",
        }
    }

    /// Behind the door, what is much in this `direction` ("in", "out") goes through a pipe on every kernel.
    pub fn splices(self, direction: &str) -> bool {
        match self {
            Self::Userspace => false,
            Self::Auto => direction == "out",
            Self::Inline | Self::Ring => true,
        }
    }

    pub fn offloads(self) -> bool {
        self != Self::Userspace
    }
}

#[derive(Debug, Clone)]
pub struct Environment {
    pub bin: PathBuf,
    pub kernel: Kernel,
    /// TLSPLICE_OFFLOAD=require: the kernel has kTLS and every listener must use it.
    pub offload: bool,
    pub tmp: PathBuf,
}

impl Environment {
    pub fn from_variables() -> Result<Self> {
        let variable = |name: &str| std::env::var(name).with_context(|| format!("the variable {name} is not set"));
        let bin = PathBuf::from(variable("TLSPLICE_BIN")?);
        let bin = bin.canonicalize().with_context(|| format!("TLSPLICE_BIN={}", bin.display()))?;
        let kernel = Kernel::parse(&std::env::var("TLSPLICE_KERNEL").unwrap_or_else(|_| "host".into()))?;
        let offload = match std::env::var("TLSPLICE_OFFLOAD").as_deref() {
            Ok("require") => true,
            Ok("off") | Err(_) => false,
            Ok(other) => bail!("TLSPLICE_OFFLOAD={other}: allowed are off, require"),
        };
        let tmp = std::env::var_os("TLSPLICE_TMP").map_or_else(std::env::temp_dir, PathBuf::from);
        let tmp = tmp.join(format!("tlsplice-suite-{}", std::process::id()));
        std::fs::create_dir_all(&tmp).with_context(|| format!("create {}", tmp.display()))?;
        Ok(Self { bin, kernel, offload, tmp })
    }

    /// The relays that this run is about.
    pub fn relays(&self) -> &'static [Relay] {
        if self.offload { &[Relay::Auto, Relay::Inline, Relay::Ring] } else { &[Relay::Userspace] }
    }

    /// A KeyUpdate past the door goes on: always in userspace, in the kernel since 6.14.
    pub fn rekeys(&self) -> bool {
        !self.offload || !matches!(self.kernel, Kernel::Guest("6.1" | "6.12"))
    }

    /// An eBPF program can count here. User-mode Linux makes the maps and loads the program, and then says ENOMEM to
    /// whatever shall be kept with a socket.
    pub fn counts_in_kernel(&self) -> bool {
        self.kernel != Kernel::Uml
    }

    pub fn is_guest(&self) -> bool {
        matches!(self.kernel, Kernel::Guest(_))
    }

    /// `native` on the host and in user-mode Linux, `guest` under emulation.
    pub fn scale<T>(&self, native: T, guest: T) -> T {
        if self.is_guest() { guest } else { native }
    }

    /// Of a claim's listeners, those for its `n`th case: all natively, under emulation, where a handshake takes long, one in turn.
    pub fn listeners(&self, n: usize, all: usize) -> Range<usize> {
        let one = n % all;
        self.scale(0..all, one..one + 1)
    }

    /// How long a socket operation may wait before its test fails.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.scale(20, 60))
    }

    /// Long enough for an idle tlsplice to have read what was just sent to it.
    pub fn moment(&self) -> Duration {
        Duration::from_micros(self.scale(1_000, 6_000))
    }
}
