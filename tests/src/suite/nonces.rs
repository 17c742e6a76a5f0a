//! The explicit nonces of whole TLS 1.2 connections, read from the wire across the door: none twice under one key.
//!
//! A repeat under AES-GCM gives away the key of its authentication (RFC 5288 section 3); the crate that builds the
//! kernel's structures repeats that of the server's Finished unless its iv is corrected.

use crate::client::handshake::{Offer, Suite, TLS12_AES_128, TLS12_AES_256, TLS12_RSA_AES_128, TLS12_RSA_AES_256};
use crate::client::record::{CHANGE_CIPHER_SPEC, Seen};
use crate::client::{Client, How};
use crate::environment::{Environment, Relay};
use crate::exchange::{self, DOORS, Plan, Setup};
use crate::run::{Context, Test};
use crate::upstream::{Kind, Upstream, exchange as serve};
use anyhow::{Context as _, Result, bail, ensure};
use std::collections::HashMap;

pub fn tests(env: &Environment) -> Vec<Test> {
    Test::each_relay(env, "no_explicit_nonce_of_tls12_gcm_comes_twice", no_nonce_twice)
}

fn no_nonce_twice(ctx: &Context, relay: Relay) -> Result<()> {
    let ecdsa = Setup::exchanging(ctx, relay, &DOORS)?;
    let mut records = whole_connections(ctx, &ecdsa, &[TLS12_AES_128, TLS12_AES_256])?;
    ecdsa.finish(ctx)?;
    let upstream = Upstream::serve(&ctx.environment, Kind::V4, serve)?;
    let rsa = Setup::with(ctx, relay, &DOORS, upstream, |mut settings| {
        settings.certificates = vec![ctx.certificates.rsa.chain.clone(), ctx.certificates.rsa.key.clone()];
        settings
    })?;
    records += whole_connections(ctx, &rsa, &[TLS12_RSA_AES_128, TLS12_RSA_AES_256])?;
    ctx.note(&format!("{records} records"));
    rsa.finish(ctx).map(drop)
}

fn whole_connections(ctx: &Context, setup: &Setup, suites: &[Suite]) -> Result<usize> {
    let mut records = 0;
    for suite in suites {
        let offer = Offer::new(ctx, *suite)?.resuming();
        // Every second one under emulation.
        for (listener, door) in DOORS.into_iter().enumerate().step_by(ctx.environment.scale(1, 2)) {
            // The second one resumes the session: there the server's Finished comes first.
            for round in 0..2 {
                let client = Client::connect(ctx, setup.proxy.address(listener), &offer)?;
                let plan = Plan::new(door + 200_000, door + 400_000).ragged(door + round);
                let outcome = exchange::run(client, &plan)?;
                ensure!(outcome.ended.how == How::CloseNotify, "{:?}", outcome.ended);
                setup.upstream.served()?;
                let what = || format!("{}, offload_after {door}, connection {round}", suite.name);
                records += check(&outcome.client.rx.seen).with_context(what)?;
            }
        }
    }
    Ok(records)
}

/// How many sealed records there are: all behind the server's ChangeCipherSpec, Finished the first.
fn check(seen: &[Seen]) -> Result<usize> {
    let start = seen.iter().position(|r| r.outer_kind == CHANGE_CIPHER_SPEC).context("no ChangeCipherSpec")? + 1;
    let mut places = HashMap::new();
    for (place, record) in seen[start..].iter().enumerate() {
        if let Some(first) = places.insert(record.first8, place) {
            bail!("sealed records {first} and {place} have the same explicit nonce {:02x?}", record.first8);
        }
    }
    ensure!(places.len() > 20, "only {} sealed records", places.len());
    Ok(places.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_that_comes_twice_is_found() {
        let record = |outer_kind, n: u8| Seen { outer_kind, len: 100, first8: [n; 8] };
        let mut seen = vec![record(22, 1), record(20, 1)];
        seen.extend((1..40).map(|n| record(23, n)));
        assert_eq!(check(&seen).expect("each is another"), 39);
        seen.push(record(23, 7));
        let why = check(&seen).expect_err("one comes twice").to_string();
        assert!(why.contains("records 6 and 39"), "{why}");
    }
}
