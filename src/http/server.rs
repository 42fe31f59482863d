//! Accepts connections and answers one request on each, within limits of number, size and time.
//!
//! It is hyper by itself: five fixed paths need no router, and a router's server has no limits of its own.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::task::AbortHandle;

use crate::http::address::is_loopback_host;
use crate::http::page::{self, Format, Page, Source};

/// The most connections at a time. The oldest gives way to a new one, so that whoever keeps connections open locks nobody out.
const MAX_CONNECTIONS: usize = 64;

/// How long a client may take to send its request's head, and how long a connection may last.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// The largest head of a request, in bytes, and the most headers in it.
const MAX_HEAD: usize = 16 << 10;
const MAX_HEADERS: usize = 64;

/// How many bytes of a request's body are read and thrown away. A client that is still sending would not read the answer.
const MAX_BODY: usize = 2 << 20;

/// After this time an accept that failed, for lack of file descriptors for example, is tried again.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The headers of every answer. Nothing of it is kept, framed, or read by pages of other origins.
const HEADERS: [(header::HeaderName, &str); 5] = [
    (header::CACHE_CONTROL, "no-store"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// A server that is bound to its port and answers nothing yet.
pub(crate) struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Takes the port.
    pub(crate) fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers requests from now until the process ends, on a thread of its own.
    pub(crate) fn serve(self, source: Arc<dyn Source>) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let serve = move || runtime.block_on(accept(self, source));
        std::thread::Builder::new().name("http".to_owned()).spawn(serve).map(drop)
    }
}

async fn accept(server: Server, source: Arc<dyn Source>) {
    let is_loopback = server.address.ip().is_loopback();
    let listener = match tokio::net::TcpListener::from_std(server.listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "the HTTP server cannot listen; the relay goes on without it"),
    };
    let mut connections: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "no HTTP connection can be accepted now");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        connections.retain(|connection| !connection.is_finished());
        if connections.len() >= MAX_CONNECTIONS
            && let Some(oldest) = connections.pop_front()
        {
            oldest.abort();
        }
        let source = Arc::clone(&source);
        let answer = service_fn(move |request| {
            let source = Arc::clone(&source);
            async move { Ok::<_, Infallible>(answer(request, &*source, is_loopback).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), answer);
        let task = tokio::spawn(async {
            if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await {
                tracing::debug!(%error, "an HTTP connection ended early");
            }
        });
        connections.push_back(task.abort_handle());
    }
}

async fn answer(request: Request<Incoming>, source: &dyn Source, is_loopback: bool) -> Response<Full<Bytes>> {
    let (head, mut body) = request.into_parts();
    let mut read = 0;
    while let Some(Ok(frame)) = body.frame().await {
        read += frame.data_ref().map_or(0, Bytes::len);
        if read > MAX_BODY {
            return response(Page::text(StatusCode::PAYLOAD_TOO_LARGE, "a request has no body here\n"));
        }
    }
    if is_loopback && !hosts(&head.headers, head.uri.authority()).all(is_loopback_host) {
        return response(Page::text(
            StatusCode::FORBIDDEN,
            "this server listens on loopback, and answers only requests to localhost, 127.0.0.1 or [::1]; a proxy before it \
             must set the header Host so\n",
        ));
    }
    if head.method != Method::GET && head.method != Method::HEAD {
        let mut refused = response(Page::text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n"));
        refused.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }
    response(page::page(head.uri.path(), format(head.uri.query(), &head.headers), source).await)
}

/// The hosts that a request names. Text that is not ASCII counts as a foreign host.
fn hosts<'a>(
    headers: &'a HeaderMap,
    authority: Option<&'a hyper::http::uri::Authority>,
) -> impl Iterator<Item = &'a str> {
    let hosts = headers.get_all(header::HOST).iter().map(|host| host.to_str().unwrap_or("not ASCII"));
    hosts.chain(authority.map(|authority| authority.as_str()))
}

/// The format that a request asks for: by `format=json` or `format=text`, or by its `Accept` header.
fn format(query: Option<&str>, headers: &HeaderMap) -> Format {
    let named = query.unwrap_or_default().split('&').find_map(|field| field.strip_prefix("format="));
    let accepts = headers.get_all(header::ACCEPT).iter().filter_map(|accept| accept.to_str().ok());
    match named {
        Some("json") => Format::Json,
        Some(_) => Format::Text,
        None if accepts
            .flat_map(|accept| accept.split(','))
            .any(|kind| kind.trim().starts_with("application/json")) =>
        {
            Format::Json
        }
        None => Format::Text,
    }
}

fn response(page: Page) -> Response<Full<Bytes>> {
    let policy = page.policy.and_then(|policy| HeaderValue::from_str(&policy).ok());
    let mut response = Response::new(Full::new(Bytes::from(page.body)));
    *response.status_mut() = page.status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(page.content_type));
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if let Some(policy) = policy {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    response
}
