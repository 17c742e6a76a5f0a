//! The mark that tells the counting plugin where a phase begins and ends: an instruction that does nothing and that no compiler
//! makes, a long no-operation with a number of ours in its displacement.

#![allow(unsafe_code)]

/// The upper bits of the displacement; the lowest two are the phase.
pub const MAGIC: u32 = 0x711c_e0a0;
/// The opcode of `nopl disp32(%rax)`, in front of the displacement.
pub const OPCODE: [u8; 3] = [0x0f, 0x1f, 0x80];
pub const BEGIN: u32 = 1;
pub const END: u32 = 2;

/// A phase begins.
pub fn begin() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a no-operation; its address is never used.
    unsafe {
        std::arch::asm!(".byte 0x0f, 0x1f, 0x80, 0xa1, 0xe0, 0x1c, 0x71", options(nomem, nostack, preserves_flags));
    }
}

/// It ends.
pub fn end() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(".byte 0x0f, 0x1f, 0x80, 0xa2, 0xe0, 0x1c, 0x71", options(nomem, nostack, preserves_flags));
    }
}
