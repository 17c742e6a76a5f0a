//! The HTTP endpoint for machines: `/metrics`, `/live` and `/ready`, on an address of its own.

use crate::observe::metrics::Metrics;
use crate::observe::text;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE as CONTENT_TYPE_HEADER};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Scrapers at once; a further one waits.
const CONNECTIONS: usize = 64;
/// A client that has not sent its request's head by then is gone.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A pause after an accept that failed, most likely for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the endpoint answers from.
#[derive(Debug)]
pub struct Admin {
    metrics: Metrics,
    is_draining: AtomicBool,
}

impl Admin {
    /// Keeps what was counted.
    pub fn keep(&self) {
        self.metrics.keep();
    }

    pub fn new(metrics: Metrics) -> Self {
        Self { metrics, is_draining: AtomicBool::new(false) }
    }

    /// From now on `/ready` says 503, so that balancers send nobody here.
    pub fn drain(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
    }

    /// Serves until the runtime ends.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let slot = Arc::clone(&slots).acquire_owned().await;
            match listener.accept().await {
                Ok((stream, _)) => {
                    let admin = Arc::clone(&self);
                    tokio::spawn(async move {
                        admin.connection(stream).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "admin: accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream) {
        let service = service_fn(move |request| {
            let response = self.answer(&request);
            async move { Ok::<_, Infallible>(response) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service)
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "admin: connection");
        }
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n");
            response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/metrics" => match self.metrics.text() {
                Ok(metrics) if wants_openmetrics(request) => typed(StatusCode::OK, metrics, text::OPENMETRICS),
                Ok(metrics) => typed(StatusCode::OK, text::prometheus(&metrics), text::PROMETHEUS),
                Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            },
            "/live" => plain(StatusCode::OK, "live\n"),
            "/ready" if self.is_draining.load(Ordering::Relaxed) => {
                plain(StatusCode::SERVICE_UNAVAILABLE, "draining\n")
            }
            "/ready" => plain(StatusCode::OK, "ready\n"),
            _ => plain(StatusCode::NOT_FOUND, "/metrics, /live, /ready\n"),
        }
    }
}

/// Several headers of one name are one list (RFC 9110 section 5.3).
fn wants_openmetrics(request: &Request<Incoming>) -> bool {
    request.headers().get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok()).any(text::wants_openmetrics)
}

fn plain(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    typed(status, body, "text/plain; charset=utf-8")
}

fn typed(status: StatusCode, body: impl Into<Bytes>, content_type: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE_HEADER, hyper::header::HeaderValue::from_static(content_type));
    response
}
