//! `tlsplice demo`: no configuration, a certificate made on the spot, a built-in page, on loopback.
//!
//!   browser ─TLS─▶ terminator on 127.0.0.1:8443 ─HTTP─▶ the page, on a port that the kernel gives
//!
//! The terminator is the ordinary one, with an ordinary configuration; only its certificate never was in a file.

use super::show;
use crate::config::Config;
use crate::control;
use crate::control::start::{Loaded, Terminator};
use crate::exit::{FINE, Failure};
use crate::tls::certificates::Certificates;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;

mod fetch;

const PAGE: &str = include_str!("demo/page.html");
const NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Serves the page until a signal ends it; with `once`, fetches it, tells what was negotiated, and ends.
///
/// # Errors
/// `Host`: the port is in use, or, with `once`, whatever went wrong with the fetch.
pub fn demo(port: u16, once: bool) -> Result<u8, Failure> {
    let (certificate, key) = make_certificate()?;
    let page = listen_for_page()?;
    let upstream = page.local_addr().map_err(|e| Failure::Host(format!("getsockname: {e}")))?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let config = Config::parse(Path::new("demo"), &configuration(address, upstream, once))
        .map_err(|e| Failure::Usage(e.to_string()))?;
    let certificates = Certificates::from_der(vec![certificate.clone()], key).map_err(Failure::Host)?;
    let loaded = Loaded { certificates, source: None, instead_of: None };
    let terminator = Terminator::start(config, loaded, None)?;
    let counters = terminator.counters();
    let runtime = control::runtime()?;
    runtime.block_on(async {
        let page =
            tokio::net::TcpListener::from_std(page).map_err(|e| Failure::Host(format!("serve the page: {e}")))?;
        tokio::spawn(serve_page(page));
        if !once {
            show(&format!("\n  curl -k https://{address}/\n\nor look at it with a browser. Control-C ends it.\n\n"));
            return terminator.run(std::future::pending::<()>()).await.map(|_| ());
        }
        let fetch = tokio::task::spawn_blocking(move || fetch::fetch(address, certificate, PAGE, &counters));
        match terminator.run(fetch).await? {
            Some(Ok(fetched)) => fetched.map(|report| show(&report)).map_err(Failure::Host),
            Some(Err(error)) => Err(Failure::Host(format!("fetch the page: {error}"))),
            None => Err(Failure::Host("ended by a signal before the page was fetched".to_owned())),
        }
    })?;
    runtime.shutdown_background();
    Ok(FINE)
}

/// Offload at once: a small page would never pay for it, and shall show it all the same.
fn configuration(address: SocketAddr, upstream: SocketAddr, once: bool) -> String {
    let level = if once { "error" } else { "info" };
    format!(
        r#"
        [server]
        workers = 1
        drain_timeout = "2s"
        [limits]
        connections = 1000
        [tls]
        certificates = ["made by the demo"]
        alpn = ["http/1.1"]
        [metrics]
        kernel = "off"
        [log]
        format = "text"
        level = "{level}"
        [[listener]]
        address = "{address}"
        offload_after = 0
        upstream = "page"
        [[upstream]]
        name = "page"
        servers = ["{upstream}"]
        "#
    )
}

/// ECDSA P-256, self-signed.
fn make_certificate() -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), Failure> {
    let made = || -> Result<_, rcgen::Error> {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut parameters = rcgen::CertificateParams::new(NAMES.map(str::to_owned))?;
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "tlsplice demo");
        let certificate = parameters.self_signed(&key)?;
        Ok((certificate.der().clone(), PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
    };
    made().map_err(|e| Failure::Host(format!("make a certificate: {e}")))
}

fn listen_for_page() -> Result<TcpListener, Failure> {
    let listen = || {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    listen().map_err(|e: std::io::Error| Failure::Host(format!("listen for the page: {e}")))
}

async fn serve_page(listener: tokio::net::TcpListener) {
    use hyper::header::{CONTENT_TYPE, HeaderValue};
    let page = hyper::service::service_fn(|_| async {
        let mut response =
            hyper::Response::new(http_body_util::Full::new(hyper::body::Bytes::from_static(PAGE.as_bytes())));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        Ok::<_, Infallible>(response)
    });
    while let Ok((stream, _)) = listener.accept().await {
        let connection =
            hyper::server::conn::http1::Builder::new().serve_connection(hyper_util::rt::TokioIo::new(stream), page);
        // A visitor who leaves in the middle is no concern of the page.
        tokio::spawn(async move { drop(connection.await) });
    }
}
