//! The commands and their exit codes: 0 fine, 1 a check found something, 2 usage or configuration, 3 the host refuses.

use crate::environment::{Environment, Relay};
use crate::process::free_port;
use crate::proxy::{Settings, loopback};
use crate::run::{Context, Test};
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

pub fn tests(env: &Environment) -> Vec<Test> {
    let mut tests = vec![
        Test::new(env, "what_is_wrong_in_the_file_exits_2_and_is_named", wrong_file),
        Test::new(env, "a_port_in_use_exits_3", port_in_use),
        Test::new(env, "doctor_says_what_this_kernel_offers", doctor),
        Test::new(env, "demo_once_fetches_its_own_page", demo),
    ];
    if env.kernel == crate::environment::Kernel::Host {
        tests.push(Test::new(env, "offload_required_without_ktls_exits_3", require_without_ktls));
    }
    tests
}

fn tlsplice(ctx: &Context, arguments: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command = Command::new(&ctx.environment.bin);
    let Output { status, stdout, stderr } = command.args(arguments).stdin(Stdio::null()).output()?;
    let words = String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr);
    Ok((status.code(), words))
}

fn run(ctx: &Context, text: &str) -> Result<(Option<i32>, String)> {
    let file = ctx.environment.tmp.join("wrong.toml");
    fs::write(&file, text)?;
    tlsplice(ctx, &["run", "--config", &file.display().to_string()])
}

fn settings(ctx: &Context) -> Result<Settings> {
    let relay = if ctx.environment.offload { Relay::Auto } else { Relay::Userspace };
    Settings::new(ctx, relay)?.listen(0, &loopback(free_port()?).to_string())
}

fn wrong_file(ctx: &Context) -> Result<()> {
    let good = settings(ctx)?.text();
    let cases = [
        (good.replace("[limits]", "[limits]\nno_such_key = 1"), "no_such_key"),
        (good.replace("mode = \"tcp\"", "mode = \"gopher\""), "gopher"),
        (good.replace("upstream = \"u0\"", "upstream = \"nobody\""), "nobody"),
        (good.replace("[tls]", "[tls]\npolicy = \"b-minus\""), "labs-100"),
        (good.replace("[tls]", "[tls]\nsuites = [\"TLS_RSA_WITH_AES_128_CBC_SHA\"]"), "grade is B"),
        ("no TOML".to_owned(), "1"),
    ];
    for (text, word) in cases {
        let (code, words) = run(ctx, &text)?;
        ensure!(code == Some(2) && words.contains(word), "exit {code:?}, and no {word:?} in: {words}");
    }
    for arguments in [&["run", "--config", "/no/such/file"][..], &["no-such-command"], &["grade"]] {
        let (code, words) = tlsplice(ctx, arguments)?;
        ensure!(code == Some(2), "{arguments:?}: exit {code:?}: {words}");
    }
    Ok(())
}

fn port_in_use(ctx: &Context) -> Result<()> {
    let settings = settings(ctx)?;
    let taken = TcpListener::bind(settings.listeners[0].address)?;
    let (code, words) = run(ctx, &settings.text())?;
    ensure!(code == Some(3), "exit {code:?}: {words}");
    drop(taken);
    Ok(())
}

fn require_without_ktls(ctx: &Context) -> Result<()> {
    let mut settings = settings(ctx)?;
    settings.listeners[0].offload = "require";
    let (code, words) = run(ctx, &settings.text())?;
    ensure!(code == Some(3), "exit {code:?}: {words}");
    settings.listeners[0].offload = "auto";
    let mut proxy = crate::proxy::Proxy::start(ctx, settings)?;
    proxy.signal(rustix::process::Signal::TERM)?;
    let status = proxy.wait_exit()?;
    proxy.check_end(status)
}

fn doctor(ctx: &Context) -> Result<()> {
    let (code, words) = tlsplice(ctx, &["doctor"])?;
    ensure!(matches!(code, Some(0 | 1)) && !words.is_empty(), "exit {code:?}: {words}");
    let (code, words) = tlsplice(ctx, &["doctor", "--json"])?;
    ensure!(matches!(code, Some(0 | 1)), "exit {code:?}: {words}");
    let report: serde_json::Value = serde_json::from_str(&words).with_context(|| words.clone())?;
    let rekey = find(&report, "rekey").context("doctor --json says nothing of rekey")?;
    if ctx.environment.offload {
        let can = rekey.as_bool().unwrap_or_else(|| rekey.to_string().contains("true"));
        ensure!(can == ctx.environment.rekeys(), "rekey is {rekey} on {}", ctx.environment.kernel.name());
        let probed = ["short_splice_safe", "opens_in_place", "partial_record_wakes"];
        let probed = probed.map(|key| find(&report, key).map_or(format!("{key}?"), |value| format!("{key} {value}")));
        ctx.note(&probed.join(", "));
    }
    Ok(())
}

/// The first value of that key, however deep.
fn find<'a>(value: &'a serde_json::Value, key: &str) -> Option<&'a serde_json::Value> {
    match value {
        serde_json::Value::Object(map) => map.get(key).or_else(|| map.values().find_map(|v| find(v, key))),
        serde_json::Value::Array(items) => items.iter().find_map(|v| find(v, key)),
        _ => None,
    }
}

fn demo(ctx: &Context) -> Result<()> {
    let (code, words) = tlsplice(ctx, &["demo", "--once"])?;
    ensure!(code == Some(0), "exit {code:?}: {words}");
    ensure!(words.contains("TLS"), "it does not say what was negotiated: {words}");
    Ok(())
}
