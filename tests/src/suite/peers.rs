//! The harness against programs that are not tlsplice: what fails here is a fault of the tests.

use crate::client::handshake::{Offer, SUITES, prepare};
use crate::client::{Client, How};
use crate::environment::{Environment, Kernel};
use crate::pattern::Pattern;
use crate::process::{Guarded, find_program, free_port};
use crate::proxy::loopback;
use crate::run::{Context, Test};
use anyhow::{Context as _, Result, ensure};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

pub fn tests(env: &Environment) -> Vec<Test> {
    // It is the same client everywhere.
    if env.kernel != Kernel::Host {
        return Vec::new();
    }
    vec![Test::new(env, "our_client_speaks_to_openssl_in_each_suite", our_client_speaks_to_openssl_in_each_suite)]
}

/// `s_server -rev` sends each line back reversed; with KeyUpdates in between.
fn our_client_speaks_to_openssl_in_each_suite(ctx: &Context) -> Result<()> {
    let openssl = find_program("openssl").context("no openssl")?;
    let port = free_port()?;
    let certificate = &ctx.certificates.ecdsa;
    let mut command = Command::new(openssl);
    command.args(["s_server", "-quiet", "-rev", "-naccept", "6", "-accept", &format!("127.0.0.1:{port}"), "-cert"]);
    command.arg(&certificate.chain).arg("-key").arg(&certificate.key).stdin(Stdio::null()).stdout(Stdio::null());
    let mut server = Guarded::spawn(command.stderr(Stdio::null()))?;
    std::thread::sleep(Duration::from_millis(ctx.environment.scale(200, 3_000)));
    for suite in SUITES {
        speak(ctx, port, suite).with_context(|| suite.name)?;
    }
    server.wait(ctx.environment.patience()).map(drop)
}

fn speak(ctx: &Context, port: u16, suite: crate::client::handshake::Suite) -> Result<()> {
    let prepared = prepare(ctx, loopback(port), &Offer::new(ctx, suite)?)?;
    ensure!(prepared.last_flight.is_empty() != suite.tls13, "the last flight is {} bytes", prepared.last_flight.len());
    let mut client: Client = prepared.complete()?;
    let text: Vec<u8> = Pattern::digits().bytes(1_000).into_iter().filter(|b| *b != b'\n').collect();
    for round in 0..5 {
        if suite.tls13 && round > 0 {
            client.tx.key_update(round % 2 == 0)?;
        }
        let mut line = text.clone();
        line.push(b'\n');
        client.tx.data(&line)?;
        let mut want: Vec<u8> = text.iter().rev().copied().collect();
        want.push(b'\n');
        let mut got = Vec::new();
        client.rx.read(want.len() as u64, |_, data| {
            got.extend_from_slice(data);
            Ok(())
        })?;
        ensure!(got == want, "round {round}: {} bytes came back", got.len());
    }
    if suite.tls13 {
        ensure!(client.rx.key_updates == 2, "openssl answered {} of 2 KeyUpdates", client.rx.key_updates);
    }
    let _: &TcpStream = client.socket();
    let ended = client.finish()?;
    ensure!(matches!(ended.how, How::CloseNotify | How::Truncated), "{ended:?}");
    Ok(())
}
