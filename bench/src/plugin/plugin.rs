//! A plugin of QEMU's (API version 1) that counts executed instructions per virtual CPU.
//!
//!   translated block ─▶ how many instructions, user or kernel, with the cipher's instructions or without
//!   executed block   ─▶ added to its CPU's counts          mark ─▶ one line of JSON in the file `out`
//!
//! A string instruction with a repeat prefix is executed once for each element under emulation, and at once by a processor: it
//! counts once, and the bytes that it moves are kept apart. The prototypes are written out here because QEMU's packages
//! bring no header; they are those of qemu-plugin.h, version 1.

#![allow(unsafe_code)]

#[allow(dead_code, reason = "the guest executes what is looked for here")]
#[path = "mark.rs"]
mod mark;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Virtual CPUs that are counted.
const CPUS: usize = 8;
/// No callback here reads or writes registers.
const NO_REGISTERS: c_int = 0;
/// An address that no instruction has.
const NOWHERE: u64 = 1;

type PluginId = u64;
#[repr(C)]
pub struct TranslatedBlock {
    _opaque: [u8; 0],
}
#[repr(C)]
pub struct Instruction {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    fn qemu_plugin_register_vcpu_tb_trans_cb(
        id: PluginId,
        on_translated: extern "C" fn(PluginId, *mut TranslatedBlock),
    );
    fn qemu_plugin_register_vcpu_tb_exec_cb(
        block: *mut TranslatedBlock,
        on_executed: extern "C" fn(c_uint, *mut c_void),
        flags: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_register_vcpu_insn_exec_cb(
        instruction: *mut Instruction,
        on_executed: extern "C" fn(c_uint, *mut c_void),
        flags: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_tb_n_insns(block: *const TranslatedBlock) -> usize;
    fn qemu_plugin_tb_get_insn(block: *const TranslatedBlock, index: usize) -> *mut Instruction;
    fn qemu_plugin_tb_vaddr(block: *const TranslatedBlock) -> u64;
    fn qemu_plugin_insn_data(instruction: *const Instruction) -> *const c_void;
    fn qemu_plugin_insn_size(instruction: *const Instruction) -> usize;
    fn qemu_plugin_insn_vaddr(instruction: *const Instruction) -> u64;
}

/// The version of the API that this was written for; QEMU looks it up by name.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals, reason = "QEMU looks for this name")]
pub static qemu_plugin_version: c_int = 1;

/// What is known of a block before it runs.
struct Block {
    start: u64,
    instructions: u64,
    in_kernel: bool,
    has_cipher: bool,
    /// Where its last instruction lies and how much that moves at a time, if it repeats.
    repeats: Option<(u64, u64)>,
}

/// One CPU's counts. Only that CPU's thread adds to them.
struct Counts {
    user: AtomicU64,
    kernel: AtomicU64,
    user_cipher: AtomicU64,
    kernel_cipher: AtomicU64,
    user_moved: AtomicU64,
    kernel_moved: AtomicU64,
    /// The repeating instruction that was executed last.
    repeating: AtomicU64,
}

static COUNTS: [Counts; CPUS] = [const {
    Counts {
        user: AtomicU64::new(0),
        kernel: AtomicU64::new(0),
        user_cipher: AtomicU64::new(0),
        kernel_cipher: AtomicU64::new(0),
        user_moved: AtomicU64::new(0),
        kernel_moved: AtomicU64::new(0),
        repeating: AtomicU64::new(NOWHERE),
    }
}; CPUS];
static OUT: Mutex<Option<File>> = Mutex::new(None);

fn add(to: &AtomicU64, more: u64) {
    to.store(to.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}

extern "C" fn on_block(cpu: c_uint, data: *mut c_void) {
    // SAFETY: `on_translated` registered this with a block that it leaked.
    let block = unsafe { &*data.cast::<Block>() };
    let Some(counts) = COUNTS.get(cpu as usize) else { return };
    let moved = if block.in_kernel { &counts.kernel_moved } else { &counts.user_moved };
    if let Some((at, bytes)) = block.repeats {
        add(moved, bytes);
        // The same instruction once more, as a block of its own: the next element.
        if block.instructions == 1 && counts.repeating.load(Ordering::Relaxed) == block.start {
            return;
        }
        counts.repeating.store(at, Ordering::Relaxed);
    } else {
        counts.repeating.store(NOWHERE, Ordering::Relaxed);
    }
    let count = match (block.in_kernel, block.has_cipher) {
        (false, false) => &counts.user,
        (true, false) => &counts.kernel,
        (false, true) => &counts.user_cipher,
        (true, true) => &counts.kernel_cipher,
    };
    add(count, block.instructions);
}

extern "C" fn on_mark(_: c_uint, data: *mut c_void) {
    let of = |pick: fn(&Counts) -> &AtomicU64, counts: &Counts| pick(counts).load(Ordering::Relaxed);
    let cpus: Vec<String> = COUNTS
        .iter()
        .map(|c| {
            format!(
                "{{\"user\":{},\"kernel\":{},\"user_cipher\":{},\"kernel_cipher\":{},\"user_moved\":{},\"kernel_moved\":{}}}",
                of(|c| &c.user, c),
                of(|c| &c.kernel, c),
                of(|c| &c.user_cipher, c),
                of(|c| &c.kernel_cipher, c),
                of(|c| &c.user_moved, c),
                of(|c| &c.kernel_moved, c)
            )
        })
        .collect();
    let line = format!("{{\"mark\":{},\"cpus\":[{}]}}\n", data as usize, cpus.join(","));
    if let Ok(mut out) = OUT.lock()
        && let Some(file) = out.as_mut()
    {
        // Nobody is there to be told; a line that is missing is noticed by who reads the file.
        let _ = file.write_all(line.as_bytes());
    }
}

/// Bytes that one turn of a repeated `movs` or `stos` moves; `None` for any other instruction.
fn repeated_bytes(code: &[u8]) -> Option<u64> {
    let (mut repeated, mut short, mut wide) = (false, false, false);
    for byte in code {
        match byte {
            0xf2 | 0xf3 => repeated = true,
            0x66 => short = true,
            0x40..=0x4f => wide = byte & 8 != 0,
            0xa4 | 0xaa => return repeated.then_some(1),
            0xa5 | 0xab => {
                return repeated.then_some(if wide {
                    8
                } else if short {
                    2
                } else {
                    4
                });
            }
            _ => return None,
        }
    }
    None
}

/// Whether an instruction is one of AES or a carry-less multiplication, in the old encoding or with VEX.
fn is_cipher(code: &[u8]) -> bool {
    let aes = |opcode: u8| (0xdb..=0xdf).contains(&opcode);
    if let [0xc4, map, _, opcode, ..] = code {
        return (map & 0x1f == 2 && aes(*opcode)) || (map & 0x1f == 3 && *opcode == 0x44);
    }
    // Up to two prefixes come first: the operand size and REX.
    let head = &code[..code.len().min(5)];
    head.windows(3).any(|three| match three {
        [0x0f, 0x38, opcode] => aes(*opcode),
        [0x0f, 0x3a, 0x44] => true,
        _ => false,
    })
}

/// The phase that an instruction marks.
fn marked(code: &[u8]) -> Option<u32> {
    let displacement = u32::from_le_bytes(code.strip_prefix(&mark::OPCODE)?.try_into().ok()?);
    let phase = displacement ^ mark::MAGIC;
    (phase == mark::BEGIN || phase == mark::END).then_some(phase)
}

extern "C" fn on_translated(_: PluginId, block: *mut TranslatedBlock) {
    // SAFETY: QEMU hands us a block that lives as long as this call, and its instructions with it.
    let (count, start) = unsafe { (qemu_plugin_tb_n_insns(block), qemu_plugin_tb_vaddr(block)) };
    let mut known =
        Block { start, instructions: count as u64, in_kernel: start >> 63 == 1, has_cipher: false, repeats: None };
    for index in 0..count {
        // SAFETY: the index is below the block's count; data and size describe the instruction's bytes.
        let (instruction, code, at) = unsafe {
            let instruction = qemu_plugin_tb_get_insn(block, index);
            let size = qemu_plugin_insn_size(instruction);
            let code = std::slice::from_raw_parts(qemu_plugin_insn_data(instruction).cast::<u8>(), size);
            (instruction, code, qemu_plugin_insn_vaddr(instruction))
        };
        known.has_cipher |= is_cipher(code);
        if index == count - 1 {
            known.repeats = repeated_bytes(code).map(|bytes| (at, bytes));
        }
        if let Some(phase) = marked(code) {
            // SAFETY: the phase is a number, never followed as a pointer.
            unsafe {
                qemu_plugin_register_vcpu_insn_exec_cb(
                    instruction,
                    on_mark,
                    NO_REGISTERS,
                    phase as usize as *mut c_void,
                )
            };
        }
    }
    // Blocks are as many as QEMU translates, and it may run one at any time until its end: they are never freed.
    let known: *mut Block = Box::leak(Box::new(known));
    // SAFETY: `on_block` reads what was leaked just above.
    unsafe { qemu_plugin_register_vcpu_tb_exec_cb(block, on_block, NO_REGISTERS, known.cast()) };
}

/// QEMU calls this once. The argument `out=FILE` names the file of the marks.
///
/// # Safety
/// `arguments` holds `count` strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: PluginId,
    _: *const c_void,
    count: c_int,
    arguments: *const *const c_char,
) -> c_int {
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the caller's promise.
        let argument = unsafe { CStr::from_ptr(*arguments.add(index)) }.to_string_lossy();
        if let Some(path) = argument.strip_prefix("out=") {
            match OpenOptions::new().append(true).create(true).open(path) {
                Ok(file) => *OUT.lock().expect("nobody has held this lock yet") = Some(file),
                Err(error) => {
                    eprintln!("insn-plugin: open {path}: {error}");
                    return -1;
                }
            }
        }
    }
    // SAFETY: the identity is the one that QEMU has just given us.
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, on_translated) };
    0
}
