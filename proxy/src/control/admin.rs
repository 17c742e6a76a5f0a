//! The HTTP endpoint for machines: `/metrics`, `/connections`, `/live` and `/ready`, on an address of its own.

use crate::observe::live::LISTED;
use crate::observe::metrics::Metrics;
use crate::observe::text;
use crate::worker::Command;
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
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{Semaphore, oneshot};

/// Scrapers at once; a further one waits.
const CONNECTIONS: usize = 64;
/// A client that has not sent its request's head by then is gone.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A worker that has not told of its connections by then is left out.
const LIST_TIMEOUT: Duration = Duration::from_secs(1);
/// A pause after an accept that failed, most likely for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the endpoint answers from.
#[derive(Debug)]
pub struct Admin {
    metrics: Metrics,
    is_draining: AtomicBool,
    workers: Vec<UnboundedSender<Command>>,
}

impl Admin {
    /// Keeps what was counted.
    pub fn keep(&self) {
        self.metrics.keep();
    }

    pub fn new(metrics: Metrics, workers: Vec<UnboundedSender<Command>>) -> Self {
        Self { metrics, is_draining: AtomicBool::new(false), workers }
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
            let admin = Arc::clone(&self);
            async move {
                let response = match request.uri().path() {
                    "/connections" if request.method() == Method::GET => admin.connections().await,
                    _ => admin.answer(&request),
                };
                Ok::<_, Infallible>(response)
            }
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

    /// Every worker tells of its connections; one that drains has no time for it.
    async fn connections(&self) -> Response<Full<Bytes>> {
        let mut connections = Vec::new();
        for worker in &self.workers {
            let (answer, told) = oneshot::channel();
            let left = LISTED - connections.len();
            if worker.send(Command::List { limit: left, answer }).is_ok()
                && let Ok(Ok(mut some)) = tokio::time::timeout(LIST_TIMEOUT, told).await
            {
                connections.append(&mut some);
            }
        }
        match serde_json::to_string(&connections) {
            Ok(json) => typed(StatusCode::OK, json, "application/json"),
            Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
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
            _ => plain(StatusCode::NOT_FOUND, "/metrics, /connections, /live, /ready\n"),
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
