//! EventBridge's HTTP interface with scripted answers, for what moto cannot do: throttling, lost answers and the like.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use axum::serve::{IncomingStream, Listener};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::Barrier;

/// The answer to one request.
#[derive(Clone)]
pub(crate) enum Reply {
    /// Every entry is accepted. `DescribeEventBus` describes the bus.
    Ok,
    /// As `Ok`, but no request is answered before as many have come as the barrier counts.
    OkTogether(Arc<Barrier>),
    /// As `Ok`, after this time.
    Slow(Duration),
    ThrottleRequest,
    AccessDenied,
    /// The request is refused with this code and message.
    Refused(&'static str, &'static str),
    /// Requests signed with this access key are refused as expired, others are accepted.
    Expired(&'static str),
    /// `ValidationException` with this message.
    Invalid(&'static str),
    ServerError,
    /// One answer per entry, as given.
    Entries(Vec<EntryReply>),
    /// The entry at this index fails with this code, the others are accepted.
    FailEntry(usize, &'static str),
    /// The answer has one entry fewer than the request.
    WrongCount,
    /// Status 200 with broken JSON that quotes the request.
    Garbled,
    /// Status 200 with this body.
    Body(String),
    /// Status 200 with fewer bytes than its `Content-Length`.
    Truncated,
    /// The request is read, then the connection is closed without an answer.
    CutAfterRequest,
    /// The request is read, then the connection is reset.
    ResetAfterRequest,
}

/// The answer for one entry.
#[derive(Clone, Copy)]
pub(crate) enum EntryReply {
    Accepted,
    Failed(&'static str),
    /// It has neither an `EventId` nor an `ErrorCode`.
    Blank,
}

/// A server on a port of its own, with one bus, `orders`. Dropping this value closes its connections too.
pub(crate) struct EventBridgeStub {
    url: String,
    script: Arc<Script>,
    runtime: Option<Runtime>,
}

#[derive(Default)]
struct Script(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    replies: VecDeque<Reply>,
    descriptions: VecDeque<Reply>,
    requests: Vec<Vec<Value>>,
    /// Entries of this source fail with this code, whatever is scripted.
    refused: Option<(&'static str, &'static str)>,
    event_count: usize,
    in_flight: usize,
    peak: usize,
}

impl EventBridgeStub {
    pub(crate) async fn start() -> Self {
        let script = Arc::new(Script::default());
        // It has a runtime of its own, which closes every connection when it is dropped.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let app = Router::new().route("/", post(serve)).layer(DefaultBodyLimit::disable()).with_state(script.clone());
        let listener = runtime.spawn(TcpListener::bind("127.0.0.1:0")).await.unwrap().unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let service = app.into_make_service_with_connect_info::<Connection>();
        runtime.spawn(async move { axum::serve(CuttableListener(listener), service).await });
        Self { url, script, runtime: Some(runtime) }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Queues answers to the next requests to describe the bus. When the queue is empty, [`Reply::Ok`] is the answer.
    pub(crate) fn script_descriptions(&self, replies: impl IntoIterator<Item = Reply>) {
        self.script.lock().descriptions.extend(replies);
    }

    /// Queues answers to the next `PutEvents`. When the queue is empty, [`Reply::Ok`] is the answer.
    pub(crate) fn script(&self, replies: impl IntoIterator<Item = Reply>) {
        self.script.lock().replies.extend(replies);
    }

    /// From now on entries of this source fail with this code; `None` ends that.
    pub(crate) fn refuse_source(&self, refused: Option<(&'static str, &'static str)>) {
        self.script.lock().refused = refused;
    }

    /// The entries of every `PutEvents` request so far, in order of arrival.
    pub(crate) fn requests(&self) -> Vec<Vec<Value>> {
        self.script.lock().requests.clone()
    }

    /// The highest number of requests that were in progress at the same time.
    pub(crate) fn peak(&self) -> usize {
        self.script.lock().peak
    }
}

impl Drop for EventBridgeStub {
    fn drop(&mut self) {
        let runtime = self.runtime.take();
        // Dropping a runtime waits for its threads, which tokio allows only outside of async code.
        std::thread::spawn(move || drop(runtime)).join().unwrap();
    }
}

impl Script {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }
}

type Response = (StatusCode, [(&'static str, &'static str); 1], String);

fn response(status: u16, body: impl ToString) -> Response {
    (StatusCode::from_u16(status).unwrap(), [("content-type", "application/x-amz-json-1.1")], body.to_string())
}

fn error(status: u16, code: &str, message: &str) -> Response {
    response(status, json!({ "__type": code, "message": message }))
}

async fn serve(
    State(script): State<Arc<Script>>,
    ConnectInfo(connection): ConnectInfo<Connection>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let request: Value = serde_json::from_slice(&body).unwrap();
    let entries = match headers["x-amz-target"].to_str().unwrap() {
        "AWSEvents.PutEvents" => Some(request["Entries"].as_array().unwrap().clone()),
        "AWSEvents.DescribeEventBus" => None,
        other => return error(400, "UnknownOperationException", other),
    };
    let reply = {
        let mut script = script.lock();
        script.requests.extend(entries.clone());
        script.in_flight += 1;
        script.peak = script.peak.max(script.in_flight);
        let replies = if entries.is_some() { &mut script.replies } else { &mut script.descriptions };
        replies.pop_front().unwrap_or(Reply::Ok)
    };
    // If the client closes the connection, this future is dropped at its await.
    let _in_flight = InFlight(&script);
    match &reply {
        Reply::OkTogether(barrier) => _ = barrier.wait().await,
        Reply::Slow(duration) => tokio::time::sleep(*duration).await,
        Reply::ThrottleRequest => return error(400, "ThrottlingException", "Rate exceeded"),
        Reply::AccessDenied => return error(400, "AccessDeniedException", "User is not authorized"),
        Reply::Refused(code, message) => return error(400, code, message),
        Reply::Expired(key) if headers["authorization"].to_str().unwrap().contains(&format!("Credential={key}/")) => {
            return error(400, "ExpiredTokenException", "The security token included in the request is expired");
        }
        Reply::Invalid(message) => return error(400, "ValidationException", message),
        Reply::ServerError => return response(503, "<html>Service Unavailable</html>"),
        Reply::Garbled => return response(200, &String::from_utf8_lossy(&body)[..body.len() - 1]),
        Reply::Body(body) => return response(200, body),
        Reply::Truncated => connection.truncate.store(true, Ordering::SeqCst),
        Reply::CutAfterRequest => connection.cut.store(true, Ordering::SeqCst),
        Reply::ResetAfterRequest => {
            connection.reset.store(true, Ordering::SeqCst);
            connection.cut.store(true, Ordering::SeqCst);
        }
        Reply::Ok | Reply::Expired(_) | Reply::Entries(_) | Reply::FailEntry(..) | Reply::WrongCount => {}
    }
    match entries {
        Some(entries) => response(200, script.answer(&entries, &reply)),
        None if request["Name"] == "orders" => {
            response(200, json!({ "Name": "orders", "Arn": "arn:aws:events:eu-west-1:123456789012:event-bus/orders" }))
        }
        None => error(400, "ResourceNotFoundException", "Event bus does not exist."),
    }
}

impl Script {
    fn answer(&self, entries: &[Value], reply: &Reply) -> Value {
        let mut replies = vec![EntryReply::Accepted; entries.len()];
        match reply {
            Reply::Entries(entries) => replies.clone_from(entries),
            Reply::FailEntry(index, code) => replies[*index] = EntryReply::Failed(code),
            Reply::WrongCount => _ = replies.pop(),
            _ => {}
        }
        if let Some((source, code)) = self.lock().refused {
            let refused = replies.iter_mut().zip(entries).filter(|(_, entry)| entry["Source"] == source);
            refused.for_each(|(reply, _)| *reply = EntryReply::Failed(code));
        }
        let failed = replies.iter().filter(|reply| !matches!(reply, EntryReply::Accepted)).count();
        let mut script = self.lock();
        let mut entry = |reply: EntryReply| match reply {
            EntryReply::Accepted => {
                script.event_count += 1;
                json!({ "EventId": format!("stub-{}", script.event_count) })
            }
            EntryReply::Failed(code) => json!({ "ErrorCode": code, "ErrorMessage": format!("{code}, says the stub") }),
            EntryReply::Blank => json!({}),
        };
        let entries: Vec<Value> = replies.into_iter().map(&mut entry).collect();
        json!({ "FailedEntryCount": failed, "Entries": entries })
    }
}

struct InFlight<'a>(&'a Script);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.lock().in_flight -= 1;
    }
}

/// The connection of a request, which a handler may cut when the answer is about to be written.
#[derive(Clone, Default)]
struct Connection {
    cut: Arc<AtomicBool>,
    reset: Arc<AtomicBool>,
    truncate: Arc<AtomicBool>,
}

impl Connected<IncomingStream<'_, CuttableListener>> for Connection {
    fn connect_info(stream: IncomingStream<'_, CuttableListener>) -> Self {
        stream.io().connection.clone()
    }
}

struct CuttableListener(TcpListener);

impl Listener for CuttableListener {
    type Io = CuttableStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (CuttableStream, SocketAddr) {
        let (stream, address) = Listener::accept(&mut self.0).await;
        (CuttableStream { stream, connection: Connection::default() }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

struct CuttableStream {
    stream: TcpStream,
    connection: Connection,
}

impl AsyncRead for CuttableStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for CuttableStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, mut buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.connection.reset.load(Ordering::SeqCst) {
            self.stream.set_zero_linger()?;
        }
        if self.connection.cut.load(Ordering::SeqCst) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if self.connection.truncate.load(Ordering::SeqCst) {
            buf = &buf[..buf.len() - 1];
            self.connection.cut.store(true, Ordering::SeqCst);
        }
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
