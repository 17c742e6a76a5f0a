//! Takes the kernel's ELF file out of the compressed image that distributions ship.
//!
//! QEMU starts an ELF kernel directly (PVH), which skips the firmware and the decompression: two seconds a boot under
//! emulation. Where the payload lies and how long it is stands in the image's header (Documentation/arch/x86/boot.rst,
//! protocol 2.08); what it is compressed with shows in its first bytes.

use crate::process;
use anyhow::{Context, Result, bail, ensure};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

const SECTOR_BYTES: usize = 512;
/// The header's fields, as offsets from the start of the image.
const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The first protocol that names the payload.
const FIRST_VERSION: u16 = 0x0208;

/// Writes the ELF kernel inside `image` to `elf`.
pub fn extract(image: &Path, elf: &Path) -> Result<()> {
    let bytes = std::fs::read(image).with_context(|| format!("read {}", image.display()))?;
    let payload = payload(&bytes).with_context(|| format!("{} is no kernel image", image.display()))?;
    let program = decompressor(payload).with_context(|| image.display().to_string())?;
    let kernel = decompress(program, payload)?;
    ensure!(kernel.starts_with(b"\x7fELF"), "{}: the payload is no ELF file", image.display());
    std::fs::write(elf, kernel).with_context(|| format!("write {}", elf.display()))
}

/// The compressed part of an image.
fn payload(image: &[u8]) -> Result<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    ensure!(image.get(MAGIC..MAGIC + 4) == Some(b"HdrS"), "it has no setup header");
    let version = u16::from_le_bytes([image[VERSION], image[VERSION + 1]]);
    ensure!(version >= FIRST_VERSION, "its boot protocol is {version:#x}, older than 2.08");
    // The kernel proper begins behind the setup sectors; 0 means 4, for reasons of history.
    let setup_sectors = match image[SETUP_SECTS] {
        0 => 4,
        count => usize::from(count),
    };
    let start = (setup_sectors + 1) * SECTOR_BYTES + word(PAYLOAD_OFFSET).context("it is cut short")?;
    let length = word(PAYLOAD_LENGTH).context("it is cut short")?;
    image.get(start..start + length).context("it is shorter than its header says")
}

fn decompressor(payload: &[u8]) -> Result<&'static str> {
    let known: [(&[u8], &str); 4] =
        [(b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ", "xz"), (b"\x02\x21\x4c\x18", "lz4"), (b"\x1f\x8b", "gzip")];
    match known.iter().find(|(magic, _)| payload.starts_with(magic)) {
        Some((_, program)) => Ok(program),
        None => {
            bail!("its payload begins {:02x?}, which is no compression known here", &payload[..payload.len().min(6)])
        }
    }
}

fn decompress(program: &str, payload: &[u8]) -> Result<Vec<u8>> {
    let mut command = Command::new(program);
    command.arg("-dcq").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().with_context(|| format!("start {program}"))?;
    let mut input = child.stdin.take().context("its stdin is a pipe")?;
    // Four bytes with the size follow the stream, and the program complains about them: what counts is the output.
    std::thread::scope(|scope| {
        scope.spawn(move || input.write_all(payload));
        Ok(child.wait_with_output().with_context(|| process::shown(&command))?.stdout)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0_u8; 3 * SECTOR_BYTES + 64];
        image[SETUP_SECTS] = 2;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&64_u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn the_payload_is_where_the_header_says() {
        assert_eq!(payload(&image(b"compressed")).unwrap(), b"compressed");
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_its_reason() {
        assert!(payload(b"short").is_err());
        let mut cut = image(b"compressed");
        cut.truncate(cut.len() - 1);
        assert!(payload(&cut).unwrap_err().to_string().contains("shorter"));
        assert!(decompressor(b"plain text").is_err());
    }
}
