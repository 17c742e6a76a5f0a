//! 250 readers with small buffers, for each clean way of ending: the last byte and the close_notify arrive, also when
//! the client's own bytes or KeyUpdates lie unread (every proxy that we tried cuts some of them).

use crate::client::handshake::{Offer, TLS12_AES_256, TLS13_AES_128, TLS13_AES_256};
use crate::client::record::{ALERT, DATA};
use crate::client::{Client, How};
use crate::environment::{Environment, Relay};
use crate::exchange::Setup;
use crate::pattern::Pattern;
use crate::run::{Context, Test};
use crate::upstream::{Request, THREAD_STACK_BYTES};
use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, Socket, Type};
use std::net::SocketAddr;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |name, run| tests.extend(Test::each_relay(env, name, run));
    add("slow_readers_get_all_when_the_upstream_ends", |ctx, relay| readers(ctx, relay, Way::UpstreamEnds));
    add("slow_readers_get_all_when_they_have_ended_first", |ctx, relay| readers(ctx, relay, Way::ClientEnds));
    add("slow_readers_get_all_when_their_own_bytes_lie_unread", |ctx, relay| readers(ctx, relay, Way::BytesUnread));
    if env.rekeys() {
        add("slow_readers_get_all_when_their_key_updates_lie_unread", |ctx, relay| {
            readers(ctx, relay, Way::UpdatesUnread)
        });
    }
    tests
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    UpstreamEnds,
    ClientEnds,
    /// Behind the client's close_notify, where nothing is read any more.
    BytesUnread,
    UpdatesUnread,
}

const DOWN_BYTES: u64 = 200_000;
const RECEIVE_BUFFER_BYTES: usize = 4_096;

/// A socket whose receive buffer was small before it had a window to offer.
pub fn small_socket(address: SocketAddr, bytes: usize) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_recv_buffer_size(bytes)?;
    socket.connect(&address.into()).with_context(|| format!("connect to {address}"))?;
    Ok(socket.into())
}

fn readers(ctx: &Context, relay: Relay, way: Way) -> Result<()> {
    let count = ctx.environment.scale(250, 40);
    let setup = Setup::exchanging(ctx, relay, &[0, 16_384])?;
    let resets = AtomicU64::new(0);
    let suites =
        if way == Way::UpdatesUnread { [TLS13_AES_128, TLS13_AES_256] } else { [TLS13_AES_256, TLS12_AES_256] };
    let offers = suites.map(|suite| Offer::new(ctx, suite));
    let offers = offers.into_iter().collect::<Result<Vec<_>>>()?;
    let one = |n: usize| -> Result<()> {
        let socket = small_socket(setup.proxy.address(n / 2 % 2), RECEIVE_BUFFER_BYTES)?;
        let client = Client::connect_on(ctx, socket, &offers[n % 2])?;
        let what = || {
            format!(
                "TLS 1.3: {}, offload_after {}",
                n.is_multiple_of(2),
                setup.proxy.settings.listeners[n / 2 % 2].offload_after
            )
        };
        let fin = read_slowly(ctx, client, way).with_context(what)?;
        resets.fetch_add(u64::from(!fin), Relaxed);
        Ok(())
    };
    let failures: Vec<String> = thread::scope(|scope| {
        let one = &one;
        let start = |n| thread::Builder::new().stack_size(THREAD_STACK_BYTES).spawn_scoped(scope, move || one(n));
        let running = (0..count).map(start).collect::<std::io::Result<Vec<_>>>()?;
        let ends = running.into_iter().map(|t| t.join().expect("a reader does not panic"));
        Ok::<_, anyhow::Error>(ends.filter_map(|end| end.err().map(|e| format!("{e:#}"))).collect())
    })?;
    ensure!(failures.is_empty(), "{} of {count} readers; the first: {}", failures.len(), failures[0]);
    ctx.note(&format!("{} of {count} saw a reset after their close_notify", resets.into_inner()));
    let metrics = setup.finish(ctx)?;
    let down = DOWN_BYTES * count as u64;
    ensure!(metrics.moved("out") == down, "out: moved {down}, counted {}", metrics.moved("out"));
    Ok(())
}

/// Whether a FIN and no reset came behind the close_notify.
fn read_slowly(ctx: &Context, mut client: Client, way: Way) -> Result<bool> {
    client.rx.read_bytes = 4_096;
    client.rx.rest = Duration::from_micros(ctx.environment.scale(800, 3_000));
    let hold = way != Way::UpstreamEnds;
    let mut bytes = Vec::new();
    let request = Request { hold, ..Request::new(0, DOWN_BYTES) };
    client.tx.seal_data(&mut bytes, &request.encode(), 0)?;
    if hold {
        bytes.extend(client.tx.seal(ALERT, &[1, 0], 0)?);
    }
    if way == Way::BytesUnread {
        bytes.extend(client.tx.seal(DATA, Pattern::up().at(0, 16_000), 0)?);
    }
    if way == Way::UpdatesUnread {
        (0..10).try_for_each(|_| client.tx.seal_key_update(&mut bytes, true))?;
    }
    client.tx.write(&bytes)?;
    let ended = client.rx.drain(Some(Pattern::down()))?;
    ensure!(ended.bytes == DOWN_BYTES && ended.how == How::CloseNotify, "{ended:?}");
    if !hold {
        // It may have closed the connection already.
        let _ = client.tx.close_notify();
    }
    Ok(ended.fin)
}
