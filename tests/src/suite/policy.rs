//! What the policy refuses, and how: protocols, suites and curves by openssl, the fallback signal, unknown names.

use super::programs::program;
use crate::environment::{Environment, Relay};
use crate::exchange::Setup;
use crate::run::{Context, Test};
use anyhow::{Context as _, Result, ensure};
use std::net::SocketAddr;
use std::process::Stdio;

pub fn tests(env: &Environment) -> Vec<Test> {
    if env.is_guest() {
        // Nothing here depends on the kernel.
        return Vec::new();
    }
    vec![
        Test::new(env, "what_is_outside_the_policy_is_refused_with_its_alert", refusals),
        Test::new(env, "strict_sni_refuses_names_that_are_not_served", strict_sni),
        Test::new(env, "modern_and_labs_100_offer_what_they_say", narrower),
    ]
}

fn relay(ctx: &Context) -> Relay {
    ctx.environment.relays()[0]
}

/// What `openssl s_client` says to this offer.
fn offer(ctx: &Context, address: SocketAddr, arguments: &[&str]) -> Result<(bool, String)> {
    let mut command = program("openssl")?;
    command.args(["s_client", "-connect", &address.to_string(), "-CAfile"]).arg(&ctx.certificates.ecdsa.chain);
    if !arguments.contains(&"-noservername") && !arguments.contains(&"-servername") {
        command.args(["-servername", crate::certificate::NAME]);
    }
    let output = command.args(arguments).stdin(Stdio::null()).output().context("run openssl s_client")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    let shaken = said.contains("Cipher is ") && !said.contains("Cipher is (NONE)");
    Ok((shaken, said))
}

fn refusals(ctx: &Context) -> Result<()> {
    let setup = Setup::exchanging(ctx, relay(ctx), &[0])?;
    let address = setup.proxy.address(0);
    let all = "ALL:COMPLEMENTOFALL:@SECLEVEL=0";
    let refused: [(&[&str], &str); 9] = [
        (&["-tls1_1", "-cipher", all], "protocol version"),
        (&["-tls1", "-cipher", all], "protocol version"),
        (&["-tls1_2", "-cipher", "ECDHE-ECDSA-AES256-SHA384"], "handshake failure"),
        (&["-tls1_2", "-cipher", "AES256-GCM-SHA384"], "handshake failure"),
        (&["-tls1_2", "-cipher", "DHE-RSA-AES256-GCM-SHA384"], "handshake failure"),
        (&["-tls1_3", "-groups", "P-521"], "handshake failure"),
        (&["-tls1_2", "-groups", "P-521"], "handshake failure"),
        (&["-tls1_2", "-fallback_scsv"], "inappropriate fallback"),
        (&["-tls1_1", "-fallback_scsv", "-cipher", all], "inappropriate fallback"),
    ];
    for (arguments, alert) in refused {
        let (shaken, said) = offer(ctx, address, arguments)?;
        ensure!(!shaken && said.contains(alert), "{arguments:?} was not refused with \"{alert}\": {said}");
    }
    for arguments in [&["-tls1_2"][..], &["-tls1_3"], &["-fallback_scsv"], &["-tls1_3", "-groups", "P-384"]] {
        let (shaken, said) = offer(ctx, address, arguments)?;
        ensure!(shaken, "{arguments:?}: {said}");
        ensure!(said.contains("Compression: NONE"), "{said}");
        ensure!(!said.contains("Early data was accepted") && !said.contains("Max Early Data: 1"), "{said}");
    }
    let (_, said) = offer(ctx, address, &["-tls1_2"])?;
    ensure!(said.contains("Secure Renegotiation IS supported"), "RFC 5746: {said}");
    ctx.note("nine offers refused, each with its alert");
    end(ctx, setup)
}

/// Connections of a probing client end as they like.
fn end(ctx: &Context, setup: Setup) -> Result<()> {
    while setup.upstream.accept_now().is_some() {}
    let Setup { mut proxy, .. } = setup;
    proxy.settled()?;
    proxy.signal(rustix::process::Signal::TERM)?;
    let status = proxy.wait_exit()?;
    let _ = ctx;
    proxy.check_end(status)
}

fn strict_sni(ctx: &Context) -> Result<()> {
    let setup = Setup::with(ctx, relay(ctx), &[0], upstream(ctx)?, |settings| settings.tls("strict_sni = true"))?;
    let address = setup.proxy.address(0);
    ensure!(offer(ctx, address, &[])?.0, "its own name is refused");
    for arguments in [&["-servername", "other.example"][..], &["-noservername"]] {
        let (shaken, said) = offer(ctx, address, arguments)?;
        ensure!(!shaken && said.contains("unrecognized name"), "{arguments:?}: {said}");
    }
    end(ctx, setup)
}

fn upstream(ctx: &Context) -> Result<crate::upstream::Upstream> {
    crate::upstream::Upstream::manual(&ctx.environment, crate::upstream::Kind::V4)
}

fn narrower(ctx: &Context) -> Result<()> {
    let modern = Setup::with(ctx, relay(ctx), &[0], upstream(ctx)?, |s| s.tls("policy = \"modern\""))?;
    let address = modern.proxy.address(0);
    ensure!(offer(ctx, address, &["-tls1_3"])?.0 && !offer(ctx, address, &["-tls1_2"])?.0, "modern is TLS 1.3 alone");
    end(ctx, modern)?;
    let authority = crate::authority::Authority::make(&ctx.environment.tmp.join("labs"))?;
    let leaf = authority.issue(&crate::authority::Leaf { key: "P-384", ..Default::default() })?;
    let labs = Setup::with(ctx, relay(ctx), &[0], upstream(ctx)?, |mut s| {
        s.certificates = vec![leaf.chain.clone(), leaf.key.clone()];
        s.tls("policy = \"labs-100\"")
    })?;
    let address = labs.proxy.address(0);
    for refused in [&["-tls1_3", "-ciphersuites", "TLS_AES_128_GCM_SHA256"][..], &["-tls1_3", "-groups", "X25519"]] {
        ensure!(!offer(ctx, address, refused)?.0, "{refused:?} is not refused");
    }
    ensure!(offer(ctx, address, &["-tls1_3"])?.0 && offer(ctx, address, &["-tls1_2"])?.0, "labs-100 serves nobody");
    end(ctx, labs)
}
