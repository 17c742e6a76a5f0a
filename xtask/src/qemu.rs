//! Starts a kernel in QEMU and tells how it ended.
//!
//! The first serial port carries what the kernel says, into a file; the second what the command prints. The exit status
//! comes back through the isa-debug-exit device. A kernel that panics restarts, which `-no-reboot` turns into exit status 0:
//! so 0 is a failure.

use crate::process::{self, Ended};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::time::Duration;

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// The terminal inside the guest that carries the command's output.
pub const OUTPUT_TERMINAL: &str = "/dev/ttyS1";
/// `quiet` above all makes a boot short under emulation; the rest leaves out what tests do not need or what disturbs them:
/// mitigations, self-tests of ciphers, the search for a clock, watchdogs that see an emulated second as a hang. Amazon Linux
/// does not clear pages when they are allocated, Debian does: that would be half of what a relay costs.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 panic=-1 oops=panic quiet loglevel=4 mitigations=off tsc=reliable nokaslr \
    no_timer_check random.trust_cpu=on cryptomgr.notests nowatchdog init_on_alloc=0";
/// All that the emulator has, but a fifth level of page tables and the checks of supervisor accesses, which cost it a
/// twelfth of its time and nothing here meets.
const PROCESSOR: &str = "max,-la57,-smap,-smep";

/// A machine to start.
#[derive(Clone, Debug)]
pub struct Guest {
    pub kernel: PathBuf,
    pub image: PathBuf,
    /// Where what the kernel says is kept.
    pub console: PathBuf,
    pub memory_mib: u32,
    pub cpus: u32,
    pub emulation: Emulation,
    pub limit: Duration,
}

/// How its processors are emulated.
#[derive(Clone, Debug)]
pub enum Emulation {
    /// Each on a thread of its own: for a machine that has a processor for each.
    AtOnce,
    /// In turns on one thread. They wait for each other a thousand times a second, for translated code to be dropped
    /// everywhere or for a lock, and where one of two threads has no processor such a wait takes a slice of the scheduler's.
    InTurns,
    /// Their instructions are counted, by a plugin.
    Counted(Counted),
}

/// How instructions are counted: what the plugin is and where it writes its marks.
#[derive(Clone, Debug)]
pub struct Counted {
    pub plugin: PathBuf,
    pub marks: PathBuf,
    /// Its clock goes by instructions, so that a run repeats; otherwise by time, and each virtual CPU has a thread.
    pub by_instructions: bool,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEnded {
    Exited(i32),
    /// It restarted or went off by itself: a kernel panic, as a rule.
    Panicked,
    TimedOut,
    /// QEMU itself failed.
    Broken(i32),
}

impl Guest {
    /// Runs it to its end and hands over the command's output line by line.
    pub fn run(&self, on_line: impl FnMut(&str)) -> Result<GuestEnded> {
        let mut qemu = process::bound_to_us(PROGRAM);
        qemu.args(["-M", "q35"]);
        match &self.emulation {
            Emulation::AtOnce => qemu.args(["-accel", "tcg,thread=multi", "-cpu", PROCESSOR]),
            Emulation::InTurns => qemu.args(["-accel", "tcg,thread=single", "-cpu", PROCESSOR]),
            Emulation::Counted(counted) => {
                match counted.by_instructions {
                    true => qemu.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]),
                    false => qemu.args(["-accel", "tcg,thread=multi"]),
                };
                let mut plugin = std::ffi::OsString::from("file=");
                plugin.push(&counted.plugin);
                plugin.push(",out=");
                plugin.push(&counted.marks);
                // Without ERMS the kernel copies by instructions that can be counted.
                qemu.args(["-cpu", "max,-erms", "-plugin"]).arg(plugin)
            }
        };
        qemu.args(["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string()]);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x01"]);
        qemu.arg("-chardev").arg({
            let mut file = std::ffi::OsString::from("file,id=console,path=");
            file.push(&self.console);
            file
        });
        qemu.args(["-serial", "chardev:console", "-serial", "stdio"]);
        qemu.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.image).args(["-append", KERNEL_ARGUMENTS]);
        match process::watch(&mut qemu, self.limit, on_line)? {
            Ended::TimedOut => Ok(GuestEnded::TimedOut),
            Ended::Exited(status) => Ok(meaning(status.code())),
        }
    }

    /// The last that the kernel said.
    pub fn console_tail(&self) -> Result<String> {
        Ok(process::tail(&self.console()?))
    }

    /// All that the kernel of the last run said.
    pub fn console(&self) -> Result<String> {
        let bytes = std::fs::read(&self.console).with_context(|| format!("read {}", self.console.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// isa-debug-exit makes QEMU exit with twice the value plus one, and `init.rs` gives it the exit status plus one, because
/// QEMU's own errors are 1 as well, which is value 0.
fn meaning(code: Option<i32>) -> GuestEnded {
    match code {
        Some(0) => GuestEnded::Panicked,
        Some(odd) if odd % 2 == 1 && odd > 1 => GuestEnded::Exited((odd >> 1) - 1),
        Some(other) => GuestEnded::Broken(other),
        None => GuestEnded::Broken(-1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_went_off_by_itself_has_not_passed() {
        assert_eq!(meaning(Some(0)), GuestEnded::Panicked);
        assert_eq!(meaning(Some(1)), GuestEnded::Broken(1));
        assert_eq!(meaning(Some(3)), GuestEnded::Exited(0));
        assert_eq!(meaning(Some(5)), GuestEnded::Exited(1));
        assert_eq!(meaning(Some(255)), GuestEnded::Exited(126));
        assert_eq!(meaning(None), GuestEnded::Broken(-1));
    }
}
