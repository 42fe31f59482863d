//! The destinations on which the contract runs.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use outbox_relay::event::Event;
use outbox_relay::secret::Secret;
use outbox_relay::sink::eventbridge::EventBridge;
use outbox_relay::sink::file::{FileConfig, FileSink};
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_pubsub::{RedisPubSub, RedisPubSubConfig};
use outbox_relay::sink::redis_stream::{RedisStream, RedisStreamConfig};
use outbox_relay::sink::stdout::StdoutSink;
use outbox_relay::sink::{Format, HandlerError, Sink, cloudevent, handler};
use tokio::io::AsyncWrite;

use super::{Arrival, Limited, Mortal, Place};
use crate::moto::MotoBus;
use crate::readback::{RedisClient, Subscriber};
use crate::servers::{self, Server};
use crate::stub::EventBridgeStub;
use crate::support::{eventbridge_config, sdk, unique};

/// The shared server, or one of the test's own.
enum Host {
    Shared(&'static Server),
    Own(Server),
}

impl Host {
    fn server(&self) -> &Server {
        match self {
            Self::Shared(server) => server,
            Self::Own(server) => server,
        }
    }

    fn own(&mut self) -> &mut Server {
        match self {
            Self::Shared(_) => panic!("a shared server cannot go down"),
            Self::Own(server) => server,
        }
    }
}

fn over_the_header_limit(event: Event) -> Event {
    let headers = (0..=1000).map(|n| (format!("header{n}"), String::new())).collect();
    Event { headers, ..event }
}

pub(super) struct StreamPlace {
    host: Host,
    sink: RedisStream,
    stream: String,
}

impl StreamPlace {
    fn on(host: Host) -> Self {
        let (address, stream) = (RedisAddress::Url(Secret::inline(host.server().url())), unique("stream"));
        let sink = RedisStream::new(RedisStreamConfig {
            address,
            stream: stream.parse().unwrap(),
            max_length: None,
            source: "outbox".into(),
            timeout: Duration::from_secs(30),
            exactly_once: true,
        });
        Self { host, sink, stream }
    }
}

impl Place for StreamPlace {
    async fn start() -> Self {
        Self::on(Host::Shared(servers::redis()))
    }

    fn sink(&self) -> &dyn Sink {
        &self.sink
    }

    fn arrived(&mut self) -> Vec<Arrival> {
        let mut client = RedisClient::connect(self.host.server());
        let entries = client.entries(&self.stream);
        client.tell(&format!("DEL {}", self.stream));
        entries
            .iter()
            .map(|entry| Arrival {
                id: entry.field("id").into(),
                source: entry.field("source").into(),
                r#type: entry.field("type").into(),
                subject: entry.get("subject").map(str::to_owned),
                sequence: entry.field("sequence").into(),
                partitionkey: entry.get("partitionkey").map(str::to_owned),
                data: serde_json::from_str(entry.field("data")).unwrap(),
            })
            .collect()
    }
}

impl Mortal for StreamPlace {
    async fn start_alone() -> Self {
        Self::on(Host::Own(Server::start("redis", &[])))
    }

    fn go_down(&mut self) {
        self.host.own().stop();
    }

    async fn come_back(&mut self) {
        self.host.own().start_again();
    }
}

impl Limited for StreamPlace {
    const REFUSAL: &str = "too_many_headers";

    fn over_the_limit(event: Event) -> Event {
        over_the_header_limit(event)
    }
}

pub(super) struct ChannelPlace {
    host: Host,
    sink: RedisPubSub,
    channel: String,
    subscriber: Subscriber,
}

impl ChannelPlace {
    fn on(host: Host) -> Self {
        let (address, channel) = (RedisAddress::Url(Secret::inline(host.server().url())), unique("channel"));
        let (template, timeout) = (channel.parse().unwrap(), Duration::from_secs(30));
        let sink = RedisPubSub::new(RedisPubSubConfig {
            address,
            channel: template,
            format: Format::CloudEvents,
            source: "outbox".into(),
            timeout,
            exactly_once: true,
        });
        let subscriber = Subscriber::new(host.server(), &channel);
        Self { host, sink, channel, subscriber }
    }
}

impl Place for ChannelPlace {
    async fn start() -> Self {
        Self::on(Host::Shared(servers::redis()))
    }

    fn sink(&self) -> &dyn Sink {
        &self.sink
    }

    fn arrived(&mut self) -> Vec<Arrival> {
        self.subscriber.messages().iter().map(|(_, message)| Arrival::parse(message)).collect()
    }
}

impl Mortal for ChannelPlace {
    async fn start_alone() -> Self {
        Self::on(Host::Own(Server::start("redis", &[])))
    }

    fn go_down(&mut self) {
        self.host.own().stop();
    }

    async fn come_back(&mut self) {
        self.host.own().start_again();
        self.subscriber = Subscriber::new(self.host.server(), &self.channel);
    }
}

impl Limited for ChannelPlace {
    const REFUSAL: &str = "too_many_headers";

    fn over_the_limit(event: Event) -> Event {
        over_the_header_limit(event)
    }
}

fn over_the_entry_limit(event: Event) -> Event {
    Event { payload: format!("\"{}\"", "x".repeat(1 << 20)).into(), ..event }
}

pub(super) struct BusPlace {
    host: Host,
    sink: EventBridge,
    name: String,
    bus: MotoBus,
}

impl BusPlace {
    fn on(host: Host) -> Self {
        let name = unique("bus");
        let bus = MotoBus::create(host.server(), &name);
        Self { sink: bus.sink(Format::CloudEvents), host, name, bus }
    }
}

impl Place for BusPlace {
    const MANY: i64 = 120;

    async fn start() -> Self {
        Self::on(Host::Shared(servers::moto()))
    }

    fn sink(&self) -> &dyn Sink {
        &self.sink
    }

    fn arrived(&mut self) -> Vec<Arrival> {
        self.bus.events().iter().map(|event| Arrival::parse(&event["detail"].to_string())).collect()
    }
}

impl Mortal for BusPlace {
    async fn start_alone() -> Self {
        Self::on(Host::Own(Server::start("moto", &[])))
    }

    fn go_down(&mut self) {
        self.host.own().kill();
    }

    async fn come_back(&mut self) {
        self.host.own().start_again();
        self.bus = MotoBus::create(self.host.server(), &self.name);
    }
}

impl Limited for BusPlace {
    const REFUSAL: &str = "entry_too_large";

    fn over_the_limit(event: Event) -> Event {
        over_the_entry_limit(event)
    }
}

pub(super) struct StubPlace {
    stub: EventBridgeStub,
    sink: EventBridge,
    seen: usize,
}

impl Place for StubPlace {
    async fn start() -> Self {
        let stub = EventBridgeStub::start().await;
        let sink = EventBridge::with_sdk_config(&sdk(), eventbridge_config(stub.url()));
        Self { stub, sink, seen: 0 }
    }

    fn sink(&self) -> &dyn Sink {
        &self.sink
    }

    fn arrived(&mut self) -> Vec<Arrival> {
        let requests = self.stub.requests().split_off(self.seen);
        self.seen += requests.len();
        requests.iter().flatten().map(|entry| Arrival::parse(entry["Detail"].as_str().unwrap())).collect()
    }
}

impl Limited for StubPlace {
    const REFUSAL: &str = "entry_too_large";

    fn over_the_limit(event: Event) -> Event {
        over_the_entry_limit(event)
    }
}

/// Collects what is written. It accepts small pieces, and nothing while it is stuck.
#[derive(Default)]
struct Page {
    bytes: Vec<u8>,
    /// How many more bytes it accepts before it is stuck.
    room: Option<usize>,
    waiting: Option<Waker>,
}

#[derive(Clone, Default)]
struct Writer(Arc<Mutex<Page>>);

impl AsyncWrite for Writer {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        let mut page = self.0.lock().unwrap();
        let count = bytes.len().min(1000).min(page.room.unwrap_or(usize::MAX));
        if count == 0 {
            page.waiting = Some(cx.waker().clone());
            return Poll::Pending;
        }
        page.room = page.room.map(|room| room - count);
        page.bytes.extend_from_slice(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

pub(super) struct PagePlace {
    writer: Writer,
    sink: StdoutSink,
}

impl Place for PagePlace {
    async fn start() -> Self {
        let writer = Writer::default();
        Self { sink: StdoutSink::with_writer(writer.clone(), "outbox".into()), writer }
    }

    fn sink(&self) -> &dyn Sink {
        &self.sink
    }

    fn arrived(&mut self) -> Vec<Arrival> {
        let text = String::from_utf8(std::mem::take(&mut self.writer.0.lock().unwrap().bytes)).unwrap();
        text.lines().map(Arrival::parse).collect()
    }
}

impl Mortal for PagePlace {
    async fn start_alone() -> Self {
        Self::start().await
    }

    /// The reader stops in the middle of a line.
    fn go_down(&mut self) {
        self.writer.0.lock().unwrap().room = Some(1234);
    }

    async fn come_back(&mut self) {
        let mut page = self.writer.0.lock().unwrap();
        page.room = None;
        if let Some(waiting) = page.waiting.take() {
            waiting.wake();
        }
    }
}

pub(super) struct FilePlace {
    folder: tempfile::TempDir,
    sink: FileSink,
}

impl FilePlace {
    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("events/file.jsonl")
    }
}

impl Place for FilePlace {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events/file.jsonl");
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        let format = Format::CloudEvents;
        let config = FileConfig { path, source: "outbox".into(), format, max_size: None, daily: false, fsync: true };
        Self { sink: FileSink::new(config), folder }
    }

    fn sink(&self) -> &dyn Sink {
        &self.sink
    }

    fn arrived(&mut self) -> Vec<Arrival> {
        let text = std::fs::read_to_string(self.path()).unwrap_or_default();
        drop(std::fs::remove_file(self.path()));
        text.lines().map(Arrival::parse).collect()
    }
}

impl Mortal for FilePlace {
    async fn start_alone() -> Self {
        Self::start().await
    }

    /// The folder is missing, as when a disk is not mounted.
    fn go_down(&mut self) {
        std::fs::rename(self.folder.path().join("events"), self.folder.path().join("away")).unwrap();
    }

    async fn come_back(&mut self) {
        std::fs::rename(self.folder.path().join("away"), self.folder.path().join("events")).unwrap();
    }
}

/// A function of the application that records the events it gets.
pub(super) struct HandlerPlace {
    state: Arc<Mutex<Handled>>,
    sink: Box<dyn Sink>,
}

#[derive(Default)]
struct Handled {
    documents: Vec<Vec<u8>>,
    down: bool,
}

impl Place for HandlerPlace {
    async fn start() -> Self {
        let state = Arc::new(Mutex::new(Handled::default()));
        let shared = Arc::clone(&state);
        let sink = handler(move |event| {
            let state = Arc::clone(&shared);
            async move {
                let mut state = state.lock().unwrap();
                if state.down {
                    return Err(HandlerError::unavailable("the notebook is away"));
                }
                state.documents.push(cloudevent::json(&event, "outbox"));
                Ok(())
            }
        });
        Self { state, sink: Box::new(sink) }
    }

    fn sink(&self) -> &dyn Sink {
        &*self.sink
    }

    fn arrived(&mut self) -> Vec<Arrival> {
        let documents = std::mem::take(&mut self.state.lock().unwrap().documents);
        documents.into_iter().map(|document| Arrival::parse(&String::from_utf8(document).unwrap())).collect()
    }
}

impl Mortal for HandlerPlace {
    async fn start_alone() -> Self {
        Self::start().await
    }

    fn go_down(&mut self) {
        self.state.lock().unwrap().down = true;
    }

    async fn come_back(&mut self) {
        self.state.lock().unwrap().down = false;
    }
}
