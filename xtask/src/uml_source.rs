//! What is changed in the source of Linux before it becomes user-mode Linux: three small things, each of which stops with
//! an error when the source no longer looks as it did.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;

const GCM_HEAD: &str = include_str!("../uml/gcm_head.c");
const GCM_TAIL: &str = include_str!("../uml/gcm_tail.c");
/// Where the driver's part that is taken begins and ends.
const DRIVER: &str = "arch/x86/crypto/aesni-intel_glue.c";
const DRIVER_FROM: &str = "/* The common part of the x86_64 AES-GCM key struct */";
const DRIVER_TO: &str = "static int __init register_avx_algs(void)";
/// The processor's AES-GCM gets this folder below `crypto`.
const GCM_FOLDER: &str = "host_gcm";

/// Everything that a built kernel depends on, beside the source: to know whether a build is still the right one.
pub fn parts() -> [&'static [u8]; 3] {
    [GCM_HEAD.as_bytes(), GCM_TAIL.as_bytes(), include_bytes!("uml_source.rs")]
}

/// Changes a freshly unpacked tree.
pub fn change(tree: &Path) -> Result<()> {
    add_gcm(tree).context("add the processor's own AES-GCM")?;
    count_system_calls(tree).context("count system calls")?;
    make_the_clock_exact(tree).context("make sched_clock exact")
}

/// Puts the x86 driver's AES-GCM together as a driver of its own, from the tree's own files.
fn add_gcm(tree: &Path) -> Result<()> {
    let driver = read(&tree.join(DRIVER))?;
    let from = driver.find(DRIVER_FROM).context("the driver has no key structures where they were")?;
    let to = from + driver[from..].find(DRIVER_TO).context("the driver has no registration where it was")?;
    let (crypto, folder) = (tree.join("crypto"), tree.join("crypto").join(GCM_FOLDER));
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    write(&folder.join("gcm.c"), &[GCM_HEAD, &driver[from..to], GCM_TAIL].concat())?;
    let mut makefile = "ccflags-y += -w\nobj-y += gcm.o\n".to_owned();
    let assembly = tree.join(DRIVER).parent().context("a driver lies in a folder")?.to_owned();
    for entry in fs::read_dir(&assembly).with_context(|| format!("read {}", assembly.display()))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("aes-gcm-") {
            continue;
        }
        write(&folder.join(&name), &read(&entry.path())?)?;
        if let Some(object) = name.strip_suffix(".S") {
            makefile.push_str(&format!("obj-y += {object}.o\n"));
        }
    }
    ensure!(makefile.contains("vaes"), "the driver has no assembly for VAES");
    write(&folder.join("Makefile"), &makefile)?;
    let parent = crypto.join("Makefile");
    write(&parent, &format!("{}\nobj-y += {GCM_FOLDER}/\n", read(&parent)?))
}

/// Counts each process's system calls in a field of `/proc/PID/io` that has no other use here, `cancelled_write_bytes`.
/// A system call costs far more in user-mode Linux than on the machine itself; a benchmark takes the difference off.
fn count_system_calls(tree: &Path) -> Result<()> {
    let path = tree.join("arch/um/kernel/skas/syscall.c");
    let source = replace_once(&read(&path)?, "\tsyscall = UPT_SYSCALL_NR(r);\n", |found| {
        format!("{found}\tcurrent->ioac.cancelled_write_bytes++;\n")
    })?;
    let source =
        replace_once(&source, "#include <linux/kernel.h>\n", |found| format!("{found}#include <linux/sched.h>\n"))?;
    write(&path, &source)
}

/// The scheduler's clock counts ticks there; with the host's clock the CPU time of a process is exact. The one in the source is
/// only for its simulated time, which is not built: ours stands where it is built whatever the configuration.
fn make_the_clock_exact(tree: &Path) -> Result<()> {
    let path = tree.join("arch/um/kernel/time.c");
    write(&path, &exact_clock(&read(&path)?)?)
}

fn exact_clock(source: &str) -> Result<String> {
    let head = "unsigned long long sched_clock(void)\n{\n";
    let renamed = "static unsigned long long __maybe_unused sched_clock_of_ticks(void)\n{\n";
    let source = replace_once(source, head, |_| renamed.to_owned())?;
    Ok(format!("{source}\nnotrace unsigned long long sched_clock(void)\n{{\n\treturn os_nsecs();\n}}\n"))
}

fn replace_once(text: &str, what: &str, by: impl Fn(&str) -> String) -> Result<String> {
    ensure!(text.matches(what).count() == 1, "{:?} is not there exactly once", what.trim());
    Ok(text.replacen(what, &by(what), 1))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn write(path: &Path, content: &str) -> Result<()> {
    fs::write(path, content).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exact_clock_stands_outside_every_condition() {
        let source = "#ifdef X\nnotrace unsigned long long sched_clock(void)\n{\n\treturn jiffies;\n}\n#endif\n";
        let changed = exact_clock(source).unwrap();
        assert_eq!(changed.matches(" sched_clock(void)").count(), 1);
        assert!(changed.find("return os_nsecs();").unwrap() > changed.find("#endif").unwrap(), "{changed}");
    }

    #[test]
    fn a_change_that_finds_another_source_says_so() {
        assert_eq!(replace_once("a b c", "b", |b| format!("{b}{b}")).unwrap(), "a bb c");
        assert!(replace_once("a b b", "b", str::to_owned).is_err());
        assert!(replace_once("a", "b", str::to_owned).is_err());
    }
}
