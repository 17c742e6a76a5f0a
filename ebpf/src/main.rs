//! Counts the connections of sockets that user space has begun to count.
//!
//!   connect ─▶ established ─▶ [round trip: account, at most every 100 ms] ─▶ state changes ─▶ closed: account the rest
//!
//! It runs at sockops of the service's cgroup and only observes. A socket's own state is touched under its lock, the
//! sums by atomic additions, because a softirq may interrupt the program on its own CPU. tcp_info counts a FIN as one
//! byte, and an active socket's SYN too; what is accounted here is payload.

#![no_std]
#![no_main]
// The verifier proves every access; the compiler cannot.
#![allow(unsafe_code)]
// Atomic additions exist for this target only as the compiler's intrinsic.
#![feature(core_intrinsics)]
#![allow(internal_features)]

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE, bpf_sock_ops};
use aya_ebpf::btf_maps::{Array, PerCpuArray};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::macros::{btf_map, sock_ops};
use aya_ebpf::programs::SockOpsContext;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use core::ptr::null_mut;
use tlsplice_ebpf::{
    BUCKETS, CLASSES, ClassName, ClassSums, ENDPOINTS, EndpointName, Handshake, Histogram, NO_CLASS, Socket, Sums,
    WORDS, WordName,
};

// include/uapi/linux/bpf.h
const TIMEOUT_INIT: u32 = 1;
const RWND_INIT: u32 = 2;
const CONNECT: u32 = 3;
const ACTIVE_ESTABLISHED: u32 = 4;
const PASSIVE_ESTABLISHED: u32 = 5;
const NEEDS_ECN: u32 = 6;
const BASE_RTT: u32 = 7;
const STATE: u32 = 10;
const RTT: u32 = 12;
const STATE_FLAG: u32 = 1 << 2;
const RTT_FLAG: u32 = 1 << 3;
const CLONE: usize = 1 << 9;

// include/net/tcp_states.h
const ESTABLISHED: u32 = 1;
const SYN_SENT: u32 = 2;
const FIN_WAIT1: u32 = 4;
const FIN_WAIT2: u32 = 5;
const CLOSED: u32 = 7;
const CLOSE_WAIT: u32 = 8;
const LAST_ACK: u32 = 9;
const CLOSING: u32 = 11;

/// How often a connection that lives is accounted at most.
const ACCOUNT_NS: u64 = 100_000_000;

// Flags of Socket.
const FIN_RECEIVED: u32 = 1;
const FIN_ACKNOWLEDGED: u32 = 2;
const FIRST_ACK: u32 = 4;

/// As aya's SkStorage, with flags of its own.
#[repr(C)]
struct Storage<T, const FLAGS: usize> {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; FLAGS],
}

// SAFETY: placeholders that the loader reads as types; nothing dereferences them.
unsafe impl<T, const FLAGS: usize> Sync for Storage<T, FLAGS> {}

impl<T, const FLAGS: usize> Storage<T, FLAGS> {
    const fn new() -> Self {
        use core::ptr::null;
        Self { r#type: null(), key: null(), value: null(), max_entries: null(), map_flags: null() }
    }

    #[inline(always)]
    fn get(&'static self, ops: *mut bpf_sock_ops) -> Option<&'static mut T> {
        // SAFETY: the context is the kernel's; `sk` is null where there is no full socket.
        let sk = unsafe { (*ops).__bindgen_anon_2.sk };
        if sk.is_null() {
            return None;
        }
        let map = (&raw const *self).cast_mut();
        // SAFETY: the helper gives null or a value that lives as long as the socket, whose lock is held.
        unsafe { bpf_sk_storage_get(map.cast(), sk.cast(), null_mut(), 0).cast::<T>().as_mut() }
    }
}

#[btf_map]
static SOCKETS: Storage<Socket, { BPF_F_NO_PREALLOC as usize | CLONE }> = Storage::new();
#[btf_map]
static HANDSHAKES: Storage<Handshake, { BPF_F_NO_PREALLOC as usize }> = Storage::new();
#[btf_map(name = "ENDPOINTS")]
static ENDPOINT_SUMS: PerCpuArray<Sums, ENDPOINTS> = PerCpuArray::new();
#[btf_map(name = "CLASSES")]
static CLASS_SUMS: PerCpuArray<ClassSums, CLASSES> = PerCpuArray::new();
#[btf_map]
static ENDPOINT_NAMES: Array<EndpointName, ENDPOINTS> = Array::new();
#[btf_map]
static CLASS_NAMES: Array<ClassName, CLASSES> = Array::new();
#[btf_map]
static USER_WORDS: Array<u64, WORDS> = Array::new();
#[btf_map]
static USER_NAMES: Array<WordName, WORDS> = Array::new();

#[sock_ops]
pub fn tlsplice(ctx: SockOpsContext) -> u32 {
    let ops = ctx.ops;
    match ctx.op() {
        CONNECT => {
            if SOCKETS.get(ops).is_some() {
                watch(&ctx, STATE_FLAG);
            }
        }
        ACTIVE_ESTABLISHED | PASSIVE_ESTABLISHED => established(&ctx),
        STATE => changed(ops, ctx.arg(0), ctx.arg(1)),
        RTT => round_trip(ops),
        // Asked for a value: the kernel's own.
        TIMEOUT_INIT | RWND_INIT | NEEDS_ECN | BASE_RTT => ctx.set_reply(u32::MAX),
        _ => {}
    }
    1
}

#[inline(always)]
fn watch(ctx: &SockOpsContext, flags: u32) {
    // Refused only for flags that the kernel does not know.
    let _ = ctx.set_cb_flags((ctx.cb_flags() | flags) as i32);
}

#[inline(always)]
fn established(ctx: &SockOpsContext) {
    let ops = ctx.ops;
    let Some(socket) = SOCKETS.get(ops) else { return };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    socket.since_ns = now;
    socket.flushed_ns = now;
    // SAFETY: fields of the kernel's context.
    unsafe {
        socket.base_received = (*ops).bytes_received;
        socket.base_acked = (*ops).bytes_acked;
    }
    if let Some(sums) = ENDPOINT_SUMS.get_ptr_mut(socket.endpoint) {
        // SAFETY: a row of the map.
        add(unsafe { &raw mut (*sums).opened }, 1);
    }
    watch(ctx, STATE_FLAG | RTT_FLAG);
}

#[inline(always)]
fn changed(ops: *mut bpf_sock_ops, old: u32, new: u32) {
    if new != CLOSED && new != CLOSE_WAIT && new != CLOSING && new != FIN_WAIT2 {
        return;
    }
    let Some(socket) = SOCKETS.get(ops) else { return };
    if socket.since_ns == 0 {
        if old == SYN_SENT && new == CLOSED {
            refused(socket);
        }
        return;
    }
    // SAFETY: fields of the kernel's context.
    let (received, sent_all) = unsafe { ((*ops).bytes_received, (*ops).snd_una == (*ops).snd_nxt) };
    if new == CLOSE_WAIT || new == CLOSING {
        socket.flags |= FIN_RECEIVED;
    } else if new == FIN_WAIT2 {
        socket.flags |= FIN_ACKNOWLEDGED;
        socket.half_received = received;
    } else if new == CLOSED {
        let mut aborted = old == ESTABLISHED || old == FIN_WAIT1 || old == CLOSE_WAIT;
        if old == LAST_ACK || old == CLOSING {
            if sent_all {
                socket.flags |= FIN_ACKNOWLEDGED;
            } else {
                aborted = true;
            }
        } else if old == FIN_WAIT2 && received > socket.half_received {
            // By the peer's FIN, or by a reset behind further data, which would be one byte too few.
            socket.flags |= FIN_RECEIVED;
        }
        closed(ops, socket, aborted);
    }
}

#[inline(always)]
fn refused(socket: &Socket) {
    if let Some(sums) = ENDPOINT_SUMS.get_ptr_mut(socket.endpoint) {
        // SAFETY: a row of the map.
        add(unsafe { &raw mut (*sums).refused }, 1);
    }
}

#[inline(always)]
fn round_trip(ops: *mut bpf_sock_ops) {
    let Some(socket) = SOCKETS.get(ops) else { return };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: fields of the kernel's context.
    let (acked, state) = unsafe { ((*ops).bytes_acked, (*ops).state) };
    if socket.flags & FIRST_ACK == 0 && acked > socket.base_acked {
        socket.flags |= FIRST_ACK;
        if let Some(sums) = ENDPOINT_SUMS.get_ptr_mut(socket.endpoint) {
            // SAFETY: a row of the map.
            observe(unsafe { &raw mut (*sums).first_ack }, now.wrapping_sub(socket.since_ns) / 1000);
        }
    }
    if now.wrapping_sub(socket.flushed_ns) < ACCOUNT_NS {
        // Too early, unless its handshake has just become known.
        if socket.class != 0 || HANDSHAKES.get(ops).is_none() {
            return;
        }
    }
    socket.flushed_ns = now;
    // SAFETY: fields of the kernel's context.
    let sent_all = unsafe { (*ops).snd_una == (*ops).snd_nxt };
    let closing = state == FIN_WAIT1 || state == CLOSING || state == LAST_ACK;
    // The FIN may just have been acknowledged, which the state says only after this.
    account(ops, socket, closing && sent_all, false);
}

#[inline(always)]
fn closed(ops: *mut bpf_sock_ops, socket: &mut Socket, aborted: bool) {
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    account(ops, socket, false, true);
    if let Some(sums) = ENDPOINT_SUMS.get_ptr_mut(socket.endpoint) {
        // SAFETY: a row of the map.
        unsafe {
            observe(&raw mut (*sums).duration, now.wrapping_sub(socket.since_ns) / 1_000_000);
            add(&raw mut (*sums).closed, 1);
            if aborted {
                add(&raw mut (*sums).reset, 1);
            }
        }
    }
}

/// Adds what is new. What was added never has to be taken back, as counters only rise.
#[inline(always)]
fn account(ops: *mut bpf_sock_ops, socket: &mut Socket, fin_acknowledged: bool, last: bool) {
    let flags = socket.flags;
    let fin_in = u64::from(flags & FIN_RECEIVED != 0);
    let fin_out = u64::from(flags & FIN_ACKNOWLEDGED != 0 || fin_acknowledged);
    // SAFETY: fields of the kernel's context.
    let (received, acked, retransmits, srtt) =
        unsafe { ((*ops).bytes_received, (*ops).bytes_acked, (*ops).total_retrans, (*ops).srtt_us) };
    let bytes_in = received.wrapping_sub(socket.base_received).wrapping_sub(fin_in);
    let bytes_out = acked.wrapping_sub(socket.base_acked).wrapping_sub(fin_out);
    if let Some(sums) = ENDPOINT_SUMS.get_ptr_mut(socket.endpoint) {
        // SAFETY: a row of the map.
        unsafe {
            add(&raw mut (*sums).bytes_in, risen(bytes_in, &mut socket.bytes_in));
            add(&raw mut (*sums).bytes_out, risen(bytes_out, &mut socket.bytes_out));
            add(&raw mut (*sums).retransmits, u64::from(retransmits.wrapping_sub(socket.retransmits)));
            socket.retransmits = retransmits;
            if srtt != 0 {
                // The kernel keeps eight times the value.
                observe(&raw mut (*sums).rtt, u64::from(srtt >> 3));
            }
        }
    }
    if socket.class == NO_CLASS {
        return;
    }
    let class = HANDSHAKES.get(ops).map_or(0, |handshake| handshake.class);
    if class == 0 && !last {
        return;
    }
    let Some(sums) = CLASS_SUMS.get_ptr_mut(class) else { return };
    if class != socket.class || (class == 0 && last) {
        if socket.class != 0 {
            // It changes its class, as one does that goes through the door.
            if let Some(before) = CLASS_SUMS.get_ptr_mut(socket.class) {
                // SAFETY: a row of the map.
                add(unsafe { &raw mut (*before).live }, u64::MAX);
            }
        } else {
            // SAFETY: a row of the map.
            add(unsafe { &raw mut (*sums).opened }, 1);
        }
        socket.class = class;
        // SAFETY: a row of the map.
        add(unsafe { &raw mut (*sums).live }, 1);
    }
    // SAFETY: a row of the map.
    unsafe {
        add(&raw mut (*sums).bytes_in, risen(bytes_in, &mut socket.class_in));
        add(&raw mut (*sums).bytes_out, risen(bytes_out, &mut socket.class_out));
        add(&raw mut (*sums).retransmits, u64::from(retransmits.wrapping_sub(socket.class_retransmits)));
        socket.class_retransmits = retransmits;
        if last {
            add(&raw mut (*sums).closed, 1);
            add(&raw mut (*sums).live, u64::MAX);
        }
    }
}

/// By how much the count has risen since the last time.
#[inline(always)]
fn risen(now: u64, before: &mut u64) -> u64 {
    let more = now.wrapping_sub(*before);
    // One byte less than before, where a FIN came to light late: it is found again in what follows.
    if more as i64 <= 0 {
        return 0;
    }
    *before = now;
    more
}

#[inline(always)]
fn observe(histogram: *mut Histogram, value: u64) {
    let mut bucket = 0;
    let mut rest = value.saturating_sub(1);
    // ceil(log2), by halves; a loop of 32 rounds costs the verifier more.
    if rest >> 32 != 0 {
        rest = u32::MAX as u64;
    }
    if rest >> 16 != 0 {
        rest >>= 16;
        bucket += 16;
    }
    if rest >> 8 != 0 {
        rest >>= 8;
        bucket += 8;
    }
    if rest >> 4 != 0 {
        rest >>= 4;
        bucket += 4;
    }
    if rest >> 2 != 0 {
        rest >>= 2;
        bucket += 2;
    }
    bucket += if rest >> 1 != 0 { 2 } else { rest as usize };
    let bucket = if bucket >= BUCKETS { BUCKETS - 1 } else { bucket };
    // SAFETY: a histogram of a row of the map, and an index within it.
    unsafe {
        add(&raw mut (*histogram).sum, value);
        add((&raw mut (*histogram).buckets).cast::<u64>().add(bucket & (BUCKETS - 1)), 1);
    }
}

#[inline(always)]
fn add(word: *mut u64, n: u64) {
    // SAFETY: an aligned word of a map's value, which others change only by additions of the same kind.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(word, n) };
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
