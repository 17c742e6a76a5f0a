//! What a configuration file may say, and what is said about one that is wrong.

use super::*;
use proptest::prelude::*;
use std::path::Path;

const LEAST: &str = r#"
[tls]
certificates = ["/etc/tlsplice/tls"]
[[listener]]
address = "[::]:443"
upstream = "app"
[[upstream]]
name = "app"
servers = ["127.0.0.1:8080", "unix:/run/app.sock"]
"#;

fn parse(text: &str) -> Result<Config, Invalid> {
    Config::parse(Path::new("tlsplice.toml"), text)
}

fn valid(text: &str) -> Config {
    parse(text).unwrap_or_else(|invalid| panic!("{invalid}"))
}

/// The whole complaint about a file.
fn said(text: &str) -> String {
    parse(text).expect_err("something is wrong with it").to_string()
}

/// `LEAST` with `line` as one more line of `[section]`.
fn with(section: &str, line: &str) -> String {
    let head = format!("[{section}]");
    if LEAST.contains(&head) {
        LEAST.replace(&head, &format!("{head}\n{line}"))
    } else {
        format!("{head}\n{line}\n{LEAST}")
    }
}

#[test]
fn the_least_file_has_every_default_of_the_contract() {
    let config = valid(LEAST);
    assert_eq!(config.server.workers, std::thread::available_parallelism().expect("known"));
    assert_eq!((config.server.admin, config.server.user), (None, None));
    assert_eq!((config.server.drain_delay, config.server.drain_timeout), (Duration::ZERO, Duration::from_secs(30)));
    assert_eq!(config.server.splice, SpliceMode::Auto);
    assert_eq!(config.tls.policy, Policy::APlus);
    assert!(config.tls.suites.is_empty() && config.tls.groups.is_empty() && config.tls.alpn.is_empty());
    assert_eq!(config.limits.handshake_timeout, Duration::from_secs(10));
    assert_eq!(config.limits.connect_timeout, Duration::from_secs(5));
    assert_eq!(config.limits.idle_timeout, Duration::from_secs(3600));
    assert_eq!((config.limits.connections, config.limits.pipe_memory_bytes), (100_000, 64 << 20));
    assert_eq!(config.limits.send_memory_bytes, 128 << 20);
    assert_eq!(config.limits.records_per_key, 1 << 24);
    assert_eq!((config.log.format, config.log.level), (LogFormat::Json, tracing::Level::INFO));
    let listener = &config.listeners[0];
    assert_eq!((listener.offload, listener.offload_after), (Offload::Auto, OffloadAfter::Auto));
    assert_eq!(listener.upstream().expect("mode tcp").servers[1], ServerAddress::Unix("/run/app.sock".into()));
}

#[test]
fn every_key_of_this_version_is_read() {
    let config = valid(
        r#"
        [server]
        workers = 3
        admin = "127.0.0.1:9145"
        drain_delay = "20s"
        drain_timeout = "0s"
        splice = "ring"
        user = "www-data"
        [tls]
        policy = "a-plus"
        certificates = ["/a", "b.pem"]
        suites = ["TLS_AES_128_GCM_SHA256", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"]
        groups = ["X25519", "P-256"]
        alpn = ["h2", "http/1.1"]
        ocsp = "off"
        [limits]
        handshake_timeout = "500ms"
        connect_timeout = "1m"
        idle_timeout = "2d"
        connections = 1_000
        pipe_memory = "1 GiB"
        records_per_key = 65536
        [log]
        format = "text"
        level = "debug"
        client_address = "truncated"
        [http]
        head_size = "64 KiB"
        [[listener]]
        address = "0.0.0.0:8443"
        mode = "tcp"
        offload = "require"
        offload_after = "128 KiB"
        accept_proxy = "off"
        upstream = "app"
        [[listener]]
        address = "[::1]:8443"
        mode = "http"
        offload = "off"
        offload_after = 0
        upstream = "app"
        [[upstream]]
        name = "app"
        servers = ["[::1]:80"]
        send_proxy = "off"
        "#,
    );
    assert_eq!((config.server.workers.get(), config.server.splice), (3, SpliceMode::Ring));
    assert_eq!((config.server.drain_delay, config.server.drain_timeout), (Duration::from_secs(20), Duration::ZERO));
    assert_eq!(config.tls.suites[0], Suite(rustls::CipherSuite::TLS13_AES_128_GCM_SHA256));
    assert_eq!(config.tls.groups, [Group(rustls::NamedGroup::X25519), Group(rustls::NamedGroup::secp256r1)]);
    assert_eq!(config.tls.alpn, ["h2", "http/1.1"]);
    assert_eq!(config.limits.handshake_timeout, Duration::from_millis(500));
    assert_eq!((config.limits.connections, config.limits.pipe_memory_bytes), (1000, 1 << 30));
    assert_eq!(config.listeners[0].offload_after, OffloadAfter::Bytes(128 << 10));
    assert_eq!(config.listeners[1].offload_after, OffloadAfter::Bytes(0));
    assert_eq!(config.listeners[1].offload, Offload::Off);
    assert!(matches!(config.listeners[1].mode, Mode::Http(_)));
    assert_eq!((config.log.client_address, config.http.head_bytes), (ClientAddress::Truncated, 64 << 10));
}

#[test]
fn the_file_that_is_shipped_has_the_defaults_that_it_claims() {
    let shipped = valid(include_str!("../../dist/tlsplice.toml"));
    let mut least = valid(&LEAST.replace(", \"unix:/run/app.sock\"", ""));
    // What stands there as an example.
    least.server.admin = shipped.server.admin;
    (least.tls.tickets, least.tls.last_good) = (shipped.tls.tickets.clone(), shipped.tls.last_good.clone());
    assert_eq!(shipped, least);
}

#[test]
fn what_is_not_built_yet_is_refused_by_name() {
    for (section, line) in [
        ("[listener]", "accept_proxy = \"v1\""),
        ("[listener]", "accept_proxy = \"any\""),
        ("[listener]", "trusted = [\"10.0.0.0/8\"]"),
        ("[upstream]", "send_proxy = \"v2\""),
    ] {
        let invalid = parse(&with(section, line)).expect_err(line);
        assert!(invalid.asks_for_what_is_not_built(), "{line}: {invalid}");
        assert_eq!(invalid.problems().len(), 1, "{line}: {invalid}");
        let name = line.split(' ').next().expect("a key");
        let said = invalid.to_string();
        assert!(said.contains(name) && said.ends_with("not in this version"), "{line}: {said}");
    }
}

#[test]
fn the_keys_of_tls_are_read_and_bounded() {
    let tls = |line: &str| valid(&with("tls", line)).tls;
    assert_eq!(tls("policy = \"labs-100\"").policy, Policy::Labs100);
    assert_eq!(tls("ocsp = \"file\"").ocsp, Ocsp::File);
    assert_eq!(tls("tickets = \"/mnt/t\"\nticket_lifetime = \"1h\"").tickets, Some("/mnt/t".into()));
    assert_eq!(tls("poll = \"1s\"\nlast_good = \"/var/l\"").last_good, Some("/var/l".into()));
    assert!(tls("strict_sni = true").strict_sni);
    let defaults = valid(LEAST).tls;
    assert_eq!((defaults.ocsp, defaults.strict_sni, defaults.tickets), (Ocsp::Auto, false, None));
    assert!(said(&with("tls", "ticket_lifetime = \"8d\"")).contains("from 2s to 84h"));
    assert!(said(&with("tls", "strict_sni = 1")).contains("allowed: true or false"));
    if cfg!(not(feature = "fips")) {
        assert!(said(&with("tls", "policy = \"fips\"")).contains("--features fips"));
    }
    let modern = with("tls", "policy = \"modern\"\nsuites = [\"TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256\"]");
    assert!(said(&modern).contains("TLS 1.3 alone"));
}

#[test]
fn a_redirect_has_an_address_and_nothing_else() {
    let text = format!("{LEAST}[[listener]]\naddress = \"[::]:80\"\nmode = \"redirect\"\n");
    let config = valid(&text);
    assert_eq!((&config.listeners[1].mode, config.listeners[1].upstream()), (&Mode::Redirect, None));
    for (key, line) in
        [("upstream", "upstream = \"app\""), ("offload", "offload = \"off\""), ("offload_after", "offload_after = 0")]
    {
        let text = said(&format!("{text}{line}\n"));
        assert!(text.contains(&format!("listener.{key}: mode = \"redirect\" has neither")), "{text}");
    }
}

#[test]
fn http_is_read_with_its_limits() {
    let http = |lines: &str| valid(&format!("{LEAST}[http]\n{lines}")).http;
    let default = http("");
    assert_eq!((default.hsts.as_str(), default.head_bytes), ("max-age=63072000; includeSubDomains", 32 << 10));
    assert_eq!((default.acme_challenge, default.upstream_idle), (None, Duration::from_secs(4)));
    let lines = "hsts = \"max-age=31536000\"\nhead_size = \"8 KiB\"\nacme_challenge = \"/a\"\nhead_timeout = \"1s\"\n\
                 keep_alive = \"2s\"\nresponse_timeout = \"3s\"\nupstream_idle = \"0s\"\n";
    let read = http(lines);
    assert_eq!((read.hsts.as_str(), read.head_bytes), ("max-age=31536000", 8 << 10));
    assert_eq!((read.head_timeout, read.keep_alive), (Duration::from_secs(1), Duration::from_secs(2)));
    assert_eq!((read.response_timeout, read.upstream_idle), (Duration::from_secs(3), Duration::ZERO));
    for (line, why) in [
        ("hsts = \"max-age=86400\"", "no grade is an A+"),
        ("hsts = \"\"", "allowed: \"max-age=SECONDS\""),
        ("head_size = \"1 KiB\"", "from 4096 to"),
        ("keepalive = \"1s\"", "unknown key \"keepalive\" in [http]"),
    ] {
        let text = said(&format!("{LEAST}[http]\n{line}\n"));
        assert!(text.contains(why), "{line}: {text}");
    }
}

#[test]
fn a_problem_has_file_line_column_what_was_found_and_what_is_allowed() {
    assert_eq!(
        said(&with("limits", "connections = \"many\"")),
        "tlsplice.toml:2:15: limits.connections: found \"many\"; allowed: a whole number from 1 to 10000000"
    );
    assert_eq!(
        said(&with("server", "wrokers = 3")),
        "tlsplice.toml:2:1: unknown key \"wrokers\" in [server]; allowed: workers, admin, drain_delay, drain_timeout, splice, user"
    );
}

#[test]
fn all_problems_of_a_file_are_reported_in_its_order() {
    let text = with("limits", "connections = 0\nidle_timeout = \"soon\"\nfoo = 1") + "[what]\nx =\n";
    let invalid = parse(&text).expect_err("five problems");
    let lines: Vec<usize> = invalid.problems().iter().map(|problem| problem.line).collect();
    assert_eq!(lines, [2, 3, 4, 14, 15], "{invalid}");
}

#[test]
fn values_out_of_range_are_refused() {
    for (section, line) in [
        ("server", "workers = 0"),
        ("server", "workers = \"all\""),
        ("server", "workers = -1"),
        ("server", "admin = \"localhost:9145\""),
        ("server", "admin = \"127.0.0.1:0\""),
        ("server", "drain_delay = 20"),
        ("server", "drain_delay = \"61m\""),
        ("server", "drain_timeout = 30"),
        ("server", "drain_timeout = \"30\""),
        ("server", "drain_timeout = \"-1s\""),
        ("server", "splice = \"fast\""),
        ("server", "user = \"\""),
        ("limits", "handshake_timeout = \"0s\""),
        ("limits", "connections = 1.5"),
        ("limits", "pipe_memory = \"64 MB\""),
        ("limits", "pipe_memory = -1"),
        ("limits", "records_per_key = 63"),
        ("limits", "records_per_key = 16777217"),
        ("log", "level = \"loud\""),
        ("[listener]", "offload = true"),
        ("[listener]", "offload_after = \"later\""),
        ("[listener]", "offload_after = -1"),
        ("tls", "alpn = [\"h3\"]"),
        ("tls", "alpn = [\"\"]"),
        ("tls", "alpn = \"h2\""),
    ] {
        let invalid = parse(&with(section, line)).expect_err(line);
        assert_eq!(invalid.problems().len(), 1, "{line}: {invalid}");
        assert!(!invalid.asks_for_what_is_not_built(), "{line}: {invalid}");
    }
}

#[test]
fn what_is_weaker_than_the_policy_is_refused_in_terms_of_the_grade() {
    for (line, reason) in [
        ("suites = [\"TLS_AES_128_GCM_SHA256\", \"TLS_RSA_WITH_AES_128_GCM_SHA256\"]", "forward secrecy"),
        ("suites = [\"TLS_AES_128_GCM_SHA256\", \"TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA\"]", "CBC"),
        ("suites = [\"TLS_AES_128_GCM_SHA256\", \"TLS_ECDHE_RSA_WITH_RC4_128_SHA\"]", "RC4"),
        ("suites = [\"TLS_AES_128_GCM_SHA256\", \"TLS_ECDHE_RSA_WITH_3DES_EDE_CBC_SHA\"]", "Sweet32"),
        ("suites = [\"TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256\"]", "TLS 1.3"),
        ("groups = [\"ffdhe2048\"]", "Diffie-Hellman"),
        ("groups = [\"secp224r1\"]", "256 bits"),
    ] {
        let said = said(&with("tls", line));
        assert!(said.contains(reason), "{line}: {said}");
    }
}

#[test]
fn upstreams_and_listeners_have_to_match() {
    assert!(said(&LEAST.replace("upstream = \"app\"", "upstream = \"other\"")).contains("allowed: \"app\""));
    assert!(said(&LEAST.replace("upstream = \"app\"", "")).contains("listener.upstream: missing"));
    let twice = format!("{LEAST}[[upstream]]\nname = \"app\"\nservers = [\"127.0.0.1:1\"]\n");
    assert!(said(&twice).contains("another upstream"));
    let twice = format!("{LEAST}[[listener]]\naddress = \"[::]:443\"\nupstream = \"app\"\n");
    assert!(said(&twice).contains("another listener"));
    assert!(said(&LEAST.replace("\"127.0.0.1:8080\"", "\"app.internal:8080\"")).contains("unix:"));
    assert!(said(&LEAST.replace("unix:/run", "unix:run")).contains("absolute"));
    let long = format!("unix:/{}", "x".repeat(200));
    assert!(said(&LEAST.replace("unix:/run/app.sock", &long)).contains("107 bytes"));
}

#[test]
fn a_file_of_nothing_names_all_that_is_missing() {
    let said = said("");
    assert!(said.contains("tls.certificates: missing") && said.contains("no [[listener]]"), "{said}");
}

#[test]
fn a_section_of_the_wrong_kind_is_refused() {
    assert!(said(&LEAST.replace("[[listener]]", "[listener]")).contains("[[listener]]"));
    assert!(said(&LEAST.replace("[tls]", "[[tls]]")).contains("[tls]"));
    assert!(said(&format!("server = 1\n{LEAST}")).contains("[server]"));
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,200}") {
        let _ = parse(&text);
    }

    #[test]
    fn no_lines_that_look_like_toml_panic(
        lines in prop::collection::vec("(\\[{0,2}(server|tls|limits|log|listener|upstream|é)\\]{0,2}|[a-z_]{1,12} ?= ?[\"\\[{'a-z0-9.:é/, -]{0,24})", 0..12)
    ) {
        let _ = parse(&lines.join("\n"));
    }

    #[test]
    fn no_damage_to_a_valid_file_panics(at in 0..LEAST.len(), cut in 0usize..12, put in "\\PC{0,6}") {
        let end = (at + cut).min(LEAST.len());
        prop_assume!(LEAST.is_char_boundary(at) && LEAST.is_char_boundary(end));
        let _ = parse(&format!("{}{put}{}", &LEAST[..at], &LEAST[end..]));
    }

    #[test]
    fn no_key_takes_an_odd_value_with_a_panic(
        key in prop::sample::select(vec![
            ("server", "workers"), ("server", "admin"), ("server", "drain_delay"), ("server", "drain_timeout"), ("server", "user"),
            ("tls", "suites"), ("tls", "groups"), ("tls", "alpn"), ("limits", "connections"),
            ("limits", "pipe_memory"), ("limits", "send_memory"), ("limits", "records_per_key"), ("[listener]", "offload_after"),
        ]),
        value in prop_oneof!["-?[0-9_]{1,30}", "\"\\PC{0,30}\"", "\\[\"\\PC{0,9}\"\\]", "0[xob][0-9a-f]{1,20}", "[0-9]{1,5}\\.[0-9]{1,5}"],
    ) {
        let _ = parse(&with(key.0, &format!("{} = {value}", key.1)));
    }
}
