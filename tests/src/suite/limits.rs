//! Limits that an operator names, and what the machine runs out of: each is felt by those who exceed it, and by nobody
//! else.

use crate::client::handshake::{Offer, TLS12_AES_256, TLS13_AES_128, TLS13_AES_256};
use crate::client::{Client, How};
use crate::environment::{Environment, Relay};
use crate::exchange::{self, Plan, Setup};
use crate::pattern::Pattern;
use crate::process::free_port;
use crate::proxy::{Settings, loopback};
use crate::run::{Context, Test};
use crate::scrape::Descriptors;
use crate::suite::slow_readers::small_socket;
use crate::talk;
use crate::upstream::{Kind, PeerEnd, THREAD_STACK_BYTES, Upstream, exchange as serve};
use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use socket2::{Domain, Socket, Type};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |name, run| tests.extend(Test::some_guests(env, name, run));
    add("a_connection_above_the_cap_is_refused_and_the_next_below_it_served", cap);
    add("a_client_that_does_not_finish_its_handshake_is_cut", handshake_timeout);
    add("a_client_that_leaves_without_a_byte_is_no_failed_handshake", health_check);
    add("a_quiet_connection_is_probed_by_tcp", keepalive);
    add("an_idle_connection_is_cut_and_a_busy_one_is_not", idle_timeout);
    add("a_client_that_takes_slowly_what_is_queued_is_not_idle", slow_is_not_idle);
    add("an_upstream_that_refuses_ends_the_connection_without_a_clean_end", refused);
    add("an_upstream_that_does_not_answer_is_given_up", connect_timeout);
    add("out_of_descriptors_it_waits_and_serves_on", out_of_descriptors);
    add("slow_upstreams_behind_random_records_lose_nothing", slow_upstreams);
    add("a_pipe_full_of_small_pieces_is_not_taken_for_all_that_there_is", small_pieces);
    if env.offload {
        // By "auto" an upload may need no pipe at all.
        for relay in [Relay::Inline, Relay::Ring] {
            let name = format!("past_the_cap_of_pipe_memory_transfers_copy[{}]", relay.name());
            tests.push(Test::new(env, &name, move |ctx| pipe_memory(ctx, relay)));
        }
    }
    tests
}

fn exchanging(ctx: &Context, relay: Relay, limits: &[&str]) -> Result<Setup> {
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    Setup::with(ctx, relay, &[0], upstream, |s| limits.iter().fold(s, |s, line| s.limit(line)))
}

fn cap(ctx: &Context, relay: Relay) -> Result<()> {
    const CAP: usize = 4;
    let setup = exchanging(ctx, relay, &["connections = 4"])?;
    let open = || setup.client(ctx, 0, TLS13_AES_128);
    let mut held = (0..CAP).map(|_| open()).collect::<Result<Vec<_>>>()?;
    setup.proxy.wait_for("four connections", |m| m.live() == CAP as u64)?;
    for _ in 0..3 {
        ensure!(open().is_err(), "a fifth connection was served");
    }
    let refused = |m: &crate::scrape::Metrics| m.sum("tlsplice_connections_refused_total", &[("reason", "limit")]);
    setup.proxy.wait_for("three refusals", |m| refused(m) == 3)?;
    for _ in 0..2 {
        held.pop().context("four are held")?.finish()?;
        setup.upstream.served()?;
    }
    setup.proxy.wait_for("two connections", |m| m.live() == 2)?;
    let ended = exchange::run(open()?, &Plan::new(1_000, 1_000))?.ended;
    ensure!((ended.bytes, ended.how) == (1_000, How::CloseNotify), "{ended:?}");
    drop(held);
    setup.finish(ctx).map(drop)
}

fn handshake_timeout(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = exchanging(ctx, relay, &["handshake_timeout = \"2s\""])?;
    let silences: [&[u8]; 3] = [b"", &[22], &[22, 3, 1, 0, 200, 1, 0, 0]];
    for silence in silences {
        let mut socket = TcpStream::connect(setup.proxy.address(0))?;
        socket.set_read_timeout(Some(ctx.environment.patience()))?;
        socket.write_all(silence)?;
        let mut rest = Vec::new();
        match socket.read_to_end(&mut rest) {
            Err(e) if e.kind() != std::io::ErrorKind::ConnectionReset => return Err(e).context("it was not cut"),
            Ok(_) | Err(_) => {}
        }
    }
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("handshake_timeout") == 3, "endings: {}", metrics.endings());
    Ok(())
}

/// As balancers do it: connect, then FIN, or a reset.
fn health_check(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = exchanging(ctx, relay, &[])?;
    for resets in [false, true] {
        let socket = Socket::from(TcpStream::connect(setup.proxy.address(0))?);
        if resets {
            socket.set_linger(Some(Duration::ZERO))?;
        }
    }
    let metrics = setup.proxy.wait_for("both ends", |m| m.ended("no_hello") == 2)?;
    let failed = metrics.sum("tlsplice_handshakes_total", &[("result", "failed")]);
    ensure!(failed == 0, "{failed} handshakes failed; endings: {}", metrics.endings());
    setup.finish(ctx).map(drop)
}

/// The kernel's list says of each socket which timer runs.
fn keepalive(ctx: &Context, relay: Relay) -> Result<()> {
    const PROBES: &str = "02";
    let setup = exchanging(ctx, relay, &[])?;
    let address = setup.proxy.address(0);
    let client = setup.client(ctx, 0, TLS13_AES_256)?;
    let local = format!(":{:04X}", address.port());
    let timer = || -> Result<Option<String>> {
        let list = std::fs::read_to_string("/proc/net/tcp")?;
        let mut rows = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = rows.find(|row| row.get(1).is_some_and(|it| it.ends_with(&local)) && row.get(3) == Some(&"01"));
        Ok(row.and_then(|row| row.get(5)?.split(':').next().map(str::to_owned)))
    };
    // Until what was sent is acknowledged another timer runs.
    let deadline = Instant::now() + ctx.environment.patience();
    while timer()?.as_deref() != Some(PROBES) {
        ensure!(Instant::now() < deadline, "no probes: timer {:?}", timer()?);
        thread::sleep(Duration::from_millis(20));
    }
    drop(client);
    setup.finish(ctx).map(drop)
}

fn idle_timeout(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = Setup::with(ctx, relay, &[0, 16_384], upstream, |s| s.limit("idle_timeout = \"2s\""))?;
    for listener in 0..2 {
        let (mut idle, idle_stream) = setup.open(ctx, listener, TLS13_AES_256, 40_000)?;
        let (mut busy, busy_stream) = setup.open(ctx, listener, TLS12_AES_256, 40_000)?;
        let until = Instant::now() + Duration::from_secs(4);
        while Instant::now() < until {
            setup.check_bystander(&mut busy, &busy_stream)?;
            thread::sleep(Duration::from_millis(200));
        }
        let ended = idle.rx.drain(None)?;
        ensure!(ended.bytes == 0, "{ended:?}");
        let (_, end) = idle_stream.drain(Pattern::up(), 40_000)?;
        ctx.note(&format!("an idle client saw {:?}, its upstream {end:?}", ended.how));
        setup.check_bystander(&mut busy, &busy_stream)?;
    }
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("idle_timeout") == 2, "endings: {}", metrics.endings());
    Ok(())
}

/// Much is read for a client that takes it fast, and then nothing more for longer than the timeout.
fn slow_is_not_idle(ctx: &Context, relay: Relay) -> Result<()> {
    const FAST_BYTES: u64 = 1 << 20;
    const SLOW_BYTES: u64 = 3 << 19;
    const SLOW_READ_BYTES: usize = 16 << 10;
    const SLOW_REST: Duration = Duration::from_millis(60);
    for mode in ["tcp", "http"] {
        let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
        let setup = Setup::with(ctx, relay, &[0], upstream, |s| s.limit("idle_timeout = \"1s\"").mode(mode))?;
        let socket = small_socket(setup.proxy.address(0), 1 << 16)?;
        let mut client = Client::connect_on(ctx, socket, &Offer::new(ctx, TLS13_AES_256)?)?;
        client.tx.data(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")?;
        let stream = setup.upstream.accept()?;
        talk::heard(&stream, "\r\n\r\n")?;
        let sending = thread::spawn(move || -> Result<()> {
            stream.send(b"HTTP/1.1 200 OK\r\n\r\n")?;
            stream.send(&Pattern::down().bytes((FAST_BYTES + SLOW_BYTES) as usize))?;
            stream.fin()
        });
        let mut fast = 0;
        let early = client.rx.read(FAST_BYTES, |at, data| {
            fast = at + data.len() as u64;
            Ok(())
        })?;
        ensure!(early.is_none(), "{mode}: {early:?}");
        (client.rx.read_bytes, client.rx.rest) = (SLOW_READ_BYTES, SLOW_REST);
        let started = Instant::now();
        let ended = client.rx.drain(None)?;
        ctx.note(&format!("{mode}: the rest took {:.1} s", started.elapsed().as_secs_f64()));
        let is_whole = fast + ended.bytes > FAST_BYTES + SLOW_BYTES;
        ensure!(is_whole && ended.how == How::CloseNotify, "{mode}: {fast} bytes and then {ended:?}");
        sending.join().expect("the sender does not panic")?;
        drop(client);
        setup.finish(ctx)?;
    }
    Ok(())
}

fn refused(ctx: &Context, relay: Relay) -> Result<()> {
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let nobody = loopback(free_port()?).to_string();
    let missing = format!("unix:{}", ctx.environment.tmp.join("nobody.sock").display());
    let setup = Setup::with(ctx, relay, &[0, 0, 0], upstream, |mut settings| {
        settings.listeners[1].server = nobody;
        settings.listeners[2].server = missing;
        settings
    })?;
    let (mut bystander, other) = setup.open(ctx, 0, TLS13_AES_128, 1_000)?;
    for listener in [1, 2] {
        for suite in [TLS13_AES_256, TLS12_AES_256] {
            let mut client = setup.client(ctx, listener, suite)?;
            // Nobody will take it.
            let _ = client.tx.data(b"hello");
            let ended = client.rx.drain(None)?;
            ensure!(ended.how != How::CloseNotify && ended.bytes == 0, "{}: {ended:?}", suite.name);
        }
    }
    setup.check_bystander(&mut bystander, &other)?;
    drop((bystander, other));
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("connect_failed") == 4, "endings: {}", metrics.endings());
    Ok(())
}

/// A listening socket whose queue is full drops every SYN.
fn connect_timeout(ctx: &Context, relay: Relay) -> Result<()> {
    let silent = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    silent.bind(&loopback(free_port()?).into())?;
    silent.listen(0)?;
    let address = silent.local_addr()?.as_socket().context("an address")?;
    let fill = |_| -> Result<Socket> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        // In progress, for ever for most of them.
        let _ = socket.connect(&address.into());
        Ok(socket)
    };
    let fillers = (0..4).map(fill).collect::<Result<Vec<_>>>()?;
    thread::sleep(ctx.environment.moment() * 50);
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    let setup = Setup::with(ctx, relay, &[0], upstream, |mut settings| {
        settings.listeners[0].server = address.to_string();
        settings.limit("connect_timeout = \"1s\"")
    })?;
    let mut client = setup.client(ctx, 0, TLS13_AES_128)?;
    let ended = client.rx.drain(None)?;
    ensure!(ended.how != How::CloseNotify, "{ended:?}");
    drop(client);
    let metrics = setup.finish(ctx)?;
    ensure!(metrics.ended("connect_timeout") == 1, "endings: {}", metrics.endings());
    drop(fillers);
    Ok(())
}

/// Its limit of descriptors is lowered while it runs; when it is raised again everything is as before.
fn out_of_descriptors(ctx: &Context, relay: Relay) -> Result<()> {
    const ROOM: u64 = 12;
    let setup = Setup::exchanging(ctx, relay, &[0])?;
    setup.transfer(ctx, 0, TLS13_AES_128, &Plan::new(100_000, 100_000))?;
    let pid = Pid::from_raw(i32::try_from(setup.proxy.pid())?);
    let Descriptors { sockets, pipes, others } = Descriptors::of(setup.proxy.pid())?;
    let open = (sockets + pipes + others) as u64;
    let old = prlimit(pid, Resource::Nofile, Rlimit { current: Some(open + ROOM), maximum: Some(20_000) })?;
    let dial = |_| TcpStream::connect(setup.proxy.address(0)).context("a connection is queued");
    let waiting = (0..30).map(dial).collect::<Result<Vec<_>>>()?;
    thread::sleep(Duration::from_millis(1_500));
    drop(waiting);
    prlimit(pid, Resource::Nofile, old)?;
    let before = setup.proxy.log().lines().filter(|l| l.contains("open files") || l.contains("descriptor")).count();
    let client = Client::connect(ctx, setup.proxy.address(0), &Offer::new(ctx, TLS13_AES_128)?)?;
    let ended = exchange::run(client, &Plan::new(100_000, 100_000))?.ended;
    ensure!((ended.bytes, ended.how) == (100_000, How::CloseNotify), "{ended:?}");
    ctx.note(&format!("{before} lines of the log are about descriptors"));
    setup.finish(ctx).map(drop)
}

const SLOW_TRANSFERS: u64 = 8;

/// Pipes that fill, and splices that they cut short: on kernels before 6.12.112 and on 6.18.15 those lose bytes.
fn slow_upstreams(ctx: &Context, relay: Relay) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay, &[0, 16_384])?;
    slow_transfers(ctx, &setup)?;
    setup.finish(ctx).map(drop)
}

fn slow_transfers(ctx: &Context, setup: &Setup) -> Result<()> {
    let bytes = ctx.environment.scale(6 << 20, 3 << 20);
    let listeners = setup.proxy.settings.listeners.len();
    thread::scope(|scope| {
        let one = move |n: u64| -> Result<()> {
            let suite = if n.is_multiple_of(2) { TLS13_AES_256 } else { TLS12_AES_256 };
            let client = setup.client(ctx, n as usize / 2 % listeners, suite)?;
            let plan = Plan::new(bytes, 300_000).ragged(n).with(|request| request.slow = true);
            let plan = if n.is_multiple_of(3) { Plan { records: (1, 3_000), ..plan } } else { plan };
            let ended = exchange::run(client, &plan).with_context(|| format!("transfer {n}"))?.ended;
            ensure!((ended.bytes, ended.how) == (300_000, How::CloseNotify), "transfer {n}: {ended:?}");
            Ok(())
        };
        let start = |n| thread::Builder::new().stack_size(THREAD_STACK_BYTES).spawn_scoped(scope, move || one(n));
        let running = (0..SLOW_TRANSFERS).map(start).collect::<std::io::Result<Vec<_>>>()?;
        running.into_iter().try_for_each(|t| t.join().expect("a client does not panic"))
    })?;
    for _ in 0..SLOW_TRANSFERS {
        let served = setup.upstream.served()?;
        ensure!((served.up, served.end) == (bytes, PeerEnd::Fin), "the upstream saw {served:?}");
    }
    Ok(())
}

/// An upload whose upstream does not read holds the only pipe there may be: what others move is copied, and counted.
fn pipe_memory(ctx: &Context, relay: Relay) -> Result<()> {
    const STALLED_BYTES: u64 = 24 << 20;
    let upstream = Upstream::manual(&ctx.environment, Kind::V4)?;
    // The cap is shared out among the workers, and less than a record's pipe is none.
    let one_pipe = |s: Settings| s.server("workers = 1").limit("pipe_memory = \"64 KiB\"");
    let setup = Setup::with(ctx, relay, &[0], upstream, one_pipe)?;
    let (mut client, stream) = setup.open(ctx, 0, TLS13_AES_256, 1_000)?;
    thread::scope(|scope| {
        let Client { tx, .. } = &mut client;
        let sender = scope.spawn(move || -> Result<()> {
            let mut sent = 1_000;
            while sent < STALLED_BYTES {
                let piece = Pattern::up().at(sent, usize::try_from((STALLED_BYTES - sent).min(1 << 16))?);
                tx.data(piece)?;
                sent += piece.len() as u64;
            }
            tx.close_notify()
        });
        thread::sleep(Duration::from_millis(ctx.environment.scale(1_000, 4_000)));
        setup.proxy.wait_for("a pipe to be held", |m| m.sum("tlsplice_pipe_bytes", &[]) > 0)?;
        for n in 0..5 {
            let (other, stream) =
                setup.open(ctx, 0, TLS12_AES_256, 200_000).with_context(|| format!("connection {n}"))?;
            drop((other, stream));
        }
        let (up, end) = stream.drain(Pattern::up(), 1_000)?;
        ensure!((up, end) == (STALLED_BYTES, PeerEnd::Fin), "the upstream saw {up} bytes and {end:?}");
        sender.join().expect("the sender does not panic")
    })?;
    drop((client, stream));
    let metrics = setup.finish(ctx)?;
    let denied = metrics.sum("tlsplice_pipe_denied_total", &[]);
    ctx.note(&format!("{denied} pipes denied, {} bytes spliced, {} copied", metrics.spliced(), metrics.copied()));
    ensure!(denied > 0 && metrics.copied() > 0, "there were pipes enough in 64 KiB");
    Ok(())
}

/// Each piece takes a slot of a pipe, so that one of sixteen is full of less than a record. The last pieces have come
/// when the client begins to read, and nothing new wakes whoever would read on.
fn small_pieces(ctx: &Context, relay: Relay) -> Result<()> {
    const PIECE_BYTES: usize = 100;
    let upstream = Upstream::manual(&ctx.environment, Kind::Unix)?;
    let one_pipe = |s: Settings| s.server("workers = 1").limit("pipe_memory = \"64 KiB\"");
    let setup = Setup::with(ctx, relay, &[0, 16_384], upstream, one_pipe)?;
    for listener in 0..2 {
        let socket = small_socket(setup.proxy.address(listener), 1 << 13)?;
        let mut client = Client::connect_on(ctx, socket, &Offer::new(ctx, TLS13_AES_256)?)?;
        let stream = setup.upstream.accept()?;
        let mut at = 0;
        // Past the door, and past the waits after which epoll tells of edges alone.
        for _ in 0..20 {
            stream.send(Pattern::down().at(at, 1_000))?;
            client.rx.read(1_000, |n, data| Pattern::down().check(at + n, data))?;
            at += 1_000;
        }
        let from = at;
        // Until it has stood still for a while: full from end to end.
        while stream.send_soon(Pattern::down().at(at, PIECE_BYTES), ctx.environment.moment() * 300)? {
            at += PIECE_BYTES as u64;
        }
        ctx.note(&format!("{} bytes in small pieces", at - from));
        let ended = client.rx.read(at - from, |n, data| Pattern::down().check(from + n, data))?;
        ensure!(ended.is_none(), "listener {listener}: {ended:?}");
        drop((client, stream));
    }
    setup.finish(ctx).map(drop)
}
