//! Every mode is counted under its listener and its upstream, by the kernel where it sees the socket and by user space
//! where it does not; handshakes that fail are counted by their alerts.

use super::kernel_metrics::{Pins, all_closed};
use crate::certificate::NAME;
use crate::counted::{Counting, Side, client_config};
use crate::environment::{Environment, Relay};
use crate::process::free_port;
use crate::proxy::{Proxy, Settings};
use crate::run::{Context, Test};
use crate::scrape::Metrics;
use anyhow::{Context as _, Result, bail, ensure};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = Vec::new();
    if env.counts_in_kernel() {
        tests = Test::one_relay(env, "each_mode_is_counted_under_its_listener_and_upstream", modes);
    }
    tests.push(Test::new(env, "failed_handshakes_are_counted_by_their_alerts", alerts));
    tests
}

const CONNECTIONS: u64 = 20;
/// Nothing of these takes longer between two bytes.
const PATIENCE: Duration = Duration::from_secs(60);

fn modes(ctx: &Context, relay: Relay) -> Result<()> {
    let pins = Pins::mount(ctx)?;
    let upstreams: [Arc<Side>; 3] = std::array::from_fn(|_| Arc::default());
    let socket = |n: usize| ctx.environment.tmp.join(format!("counted-{}-{n}.sock", free_port().unwrap_or(0)));
    let (first, second) = (socket(1), socket(2));
    let tcp = TcpListener::bind("127.0.0.1:0")?;
    let server = tcp.local_addr()?;
    serve(upstreams[0].clone(), move || tcp.accept().map(|(stream, _)| stream));
    for (path, side) in [(&first, &upstreams[1]), (&second, &upstreams[2])] {
        let unix = UnixListener::bind(path)?;
        serve(side.clone(), move || unix.accept().map(|(stream, _)| stream));
    }
    let unix = |path: &std::path::Path| format!("unix:{}", path.display());
    let mut settings = Settings::new(ctx, relay)?.listen(20_000, &server.to_string())?.listen(20_000, &unix(&first))?;
    settings = settings.mode("http").listen(20_000, &unix(&second))?.listen(0, "")?;
    settings.listeners[3].mode = "redirect";
    pins.settings(&mut settings);
    let proxy = Proxy::start(ctx, settings)?;
    let config = client_config(ctx)?;
    let clients: [Side; 4] = Default::default();
    for n in 0..CONNECTIONS {
        for (listener, side) in clients.iter().enumerate().take(3) {
            over_tls(&config, proxy.address(listener), side, n).with_context(|| format!("client {n}"))?;
        }
        in_the_clear(proxy.address(3), &clients[3]).context("a client of mode redirect")?;
    }
    let metrics = all_closed(ctx, || proxy.metrics())?;
    let counted = |labels: &[(&str, &str)]| -> [u64; 3] {
        let bytes = |way| metrics.sum("tlsplice_bytes_total", &[labels, &[("direction", way)]].concat());
        [metrics.sum("tlsplice_connections_opened_total", labels), bytes("in"), bytes("out")]
    };
    for (n, side) in clients.iter().enumerate() {
        let (address, sent) = (proxy.address(n).to_string(), side.figures());
        let found = counted(&[("side", "client"), ("listener", &address), ("source", "kernel")]);
        ensure!(found == sent, "listener {n}: counted {found:?} (opened, in, out), the wire had {sent:?}");
    }
    for (n, (side, source)) in upstreams.iter().zip(["kernel", "user", "user"]).enumerate() {
        let (name, sent) = (format!("u{n}"), side.figures());
        let found = counted(&[("side", "upstream"), ("upstream", &name), ("source", source)]);
        ensure!(found == sent, "upstream {n}: counted {found:?} (opened, in, out), the wire had {sent:?}");
    }
    classes(&metrics, relay)?;
    ctx.note(&format!(
        "opened, in, out: listeners {:?}, upstreams {:?}",
        clients.each_ref().map(Side::figures),
        upstreams.each_ref().map(|side| side.figures())
    ));
    proxy.finish(ctx).map(drop)
}

/// Connections without TLS are in no class, not even in that of broken handshakes.
fn classes(metrics: &Metrics, relay: Relay) -> Result<()> {
    let opened = |labels: &[(&str, &str)]| metrics.sum("tlsplice_tls_connections_opened_total", labels);
    ensure!(opened(&[]) == 3 * CONNECTIONS, "{} connections have a class", opened(&[]));
    ensure!(opened(&[("server_name", NAME), ("version", "TLS1.3")]) == 3 * CONNECTIONS, "some lack name or version");
    let closed = metrics.sum("tlsplice_tls_connections_closed_total", &[("offload", "kernel")]);
    let wanted = if relay.offloads() { 3 * CONNECTIONS } else { 0 };
    ensure!(
        closed == wanted,
        "{closed} were in the kernel at their end, {wanted} have moved enough; {} went there",
        metrics.offloaded()
    );
    Ok(())
}

/// A server of HTTP that counts, for each connection that it is given.
fn serve<S: Read + Write + Send + 'static>(
    side: Arc<Side>,
    mut accept: impl FnMut() -> std::io::Result<S> + Send + 'static,
) {
    thread::spawn(move || {
        while let Ok(stream) = accept() {
            let side = side.clone();
            side.opened.fetch_add(1, Relaxed);
            thread::spawn(move || {
                let mut peer = Counting { stream, side: &side };
                // It ends with its peer; what is wrong shows in the counts.
                while let Ok(Some(head)) = head(&mut peer) {
                    if respond(&mut peer, &head).is_err() {
                        break;
                    }
                }
            });
        }
    });
}

/// Up to the empty line; `None`: the stream is over.
fn head(from: &mut impl Read) -> Result<Option<String>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match from.read(&mut byte) {
            Ok(0) if head.is_empty() => return Ok(None),
            Ok(0) => bail!("a head without its end"),
            Ok(_) => head.push(byte[0]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(Some(String::from_utf8(head)?))
}

fn length(head: &str) -> Option<usize> {
    let mut lines = head.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(name, _)| name.eq_ignore_ascii_case("content-length"))?.1.trim().parse().ok()
}

/// `/counted/N`: with a length. `/chunked/N`: in chunks.
fn respond(peer: &mut (impl Read + Write), head: &str) -> Result<()> {
    skip(peer, length(head).unwrap_or(0))?;
    let path = head.split(' ').nth(1).context("no path")?;
    let (kind, n) = path.trim_start_matches('/').split_once('/').context("no size")?;
    let body = vec![b'b'; n.parse()?];
    let mut text = b"HTTP/1.1 200 OK\r\n".to_vec();
    if kind == "counted" {
        write!(text, "Content-Length: {n}\r\n\r\n")?;
        text.extend_from_slice(&body);
    } else {
        text.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
        for chunk in body.chunks(700) {
            write!(text, "{:x}\r\n", chunk.len())?;
            text.extend_from_slice(chunk);
            text.extend_from_slice(b"\r\n");
        }
        text.extend_from_slice(b"0\r\n\r\n");
    }
    Ok(peer.write_all(&text)?)
}

fn skip(from: &mut impl Read, bytes: usize) -> Result<()> {
    let mut body = vec![0; bytes];
    from.read_exact(&mut body).context("read a body")
}

/// Reads one response to its end.
fn response(from: &mut impl Read) -> Result<String> {
    let head = head(from)?.context("no response")?;
    match length(&head) {
        Some(bytes) => skip(from, bytes)?,
        None => loop {
            let mut line = Vec::new();
            while !line.ends_with(b"\r\n") {
                let mut byte = [0];
                from.read_exact(&mut byte)?;
                line.push(byte[0]);
            }
            let size = usize::from_str_radix(std::str::from_utf8(&line)?.trim(), 16).context("a chunk's size")?;
            skip(from, size + 2)?;
            if size == 0 {
                break;
            }
        },
    }
    Ok(head)
}

fn open<'a>(to: SocketAddr, side: &'a Side) -> Result<Counting<'a, TcpStream>> {
    let stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    side.opened.fetch_add(1, Relaxed);
    Ok(Counting { stream, side })
}

/// Four requests on one connection, a clean end.
fn over_tls(config: &Arc<ClientConfig>, to: SocketAddr, side: &Side, n: u64) -> Result<()> {
    let mut socket = open(to, side)?;
    let mut session = ClientConnection::new(config.clone(), ServerName::try_from(NAME)?)?;
    let mut tls = rustls::Stream::new(&mut session, &mut socket);
    let body = vec![b'u'; 3_000 + n as usize];
    for (path, body) in [("counted/100", &[][..]), ("chunked/5000", &[]), ("counted/7", &body), ("counted/90000", &[])]
    {
        let mut request = format!("POST /{path} HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {}\r\n\r\n", body.len());
        request.push_str(std::str::from_utf8(body)?);
        tls.write_all(request.as_bytes())?;
        let head = response(&mut tls).with_context(|| path.to_owned())?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
    }
    session.send_close_notify();
    while session.wants_write() {
        session.write_tls(&mut socket)?;
    }
    let mut rest = [0; 4096];
    while socket.read(&mut rest)? > 0 {}
    Ok(())
}

fn in_the_clear(to: SocketAddr, side: &Side) -> Result<()> {
    let mut socket = open(to, side)?;
    for _ in 0..2 {
        socket.write_all(b"GET /somewhere HTTP/1.1\r\nHost: test.example\r\n\r\n")?;
        let head = response(&mut socket)?;
        ensure!(head.starts_with("HTTP/1.1 308"), "{head}");
    }
    socket.stream.shutdown(std::net::Shutdown::Write)?;
    let mut rest = [0; 4096];
    while socket.read(&mut rest)? > 0 {}
    Ok(())
}

fn alerts(ctx: &Context) -> Result<()> {
    let relay = ctx.environment.relays()[0];
    let settings = Settings::new(ctx, relay)?.listen(0, "127.0.0.1:9")?.mode("http");
    let proxy = Proxy::start(ctx, settings)?;
    let fails = |config: ClientConfig| -> Result<()> {
        let mut socket = TcpStream::connect(proxy.address(0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut session = ClientConnection::new(Arc::new(config), ServerName::try_from(NAME)?)?;
        ensure!(session.complete_io(&mut socket).is_err(), "the handshake came to its end");
        // The alert goes out with the failure, before the end.
        let _ = session.write_tls(&mut socket);
        Ok(())
    };
    let other = || Ok::<_, anyhow::Error>(Arc::unwrap_or_clone(client_config(ctx)?));
    // A client that knows no root, then one that speaks another protocol.
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let nobody = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    fails(nobody.with_root_certificates(RootCertStore::empty()).with_no_client_auth())?;
    let mut h3 = other()?;
    h3.alpn_protocols = vec![b"h3".to_vec()];
    fails(h3)?;
    let alert = |m: &Metrics, direction: &str, alert: &str| {
        m.sum("tlsplice_handshake_alerts_total", &[("direction", direction), ("alert", alert)])
    };
    let metrics = proxy.wait_for("both alerts", |m| {
        (alert(m, "received", "unknown_ca"), alert(m, "sent", "no_application_protocol")) == (1, 1)
    })?;
    let failed = metrics.sum("tlsplice_handshakes_total", &[("result", "failed")]);
    ensure!(failed == 2, "{failed} handshakes have failed");
    proxy.finish(ctx).map(drop)
}
