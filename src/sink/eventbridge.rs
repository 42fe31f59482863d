//! Amazon EventBridge: `PutEvents` on a classic event bus.
//!
//! Every entry has its own answer, and HTTP 200 says nothing about any of them. EventBridge keeps no order and drops no
//! repeats. The only order is that a key's events are sent one after the other.
//!
//! - `client`: the AWS client and its credentials.
//! - `entry`: makes an entry of an event, and checks whether EventBridge can take it.
//! - `fault`: classifies failures.

mod client;
mod entry;
mod fault;
mod spec;

use std::error::Error;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use aws_config::{Region, SdkConfig};
use aws_sdk_eventbridge::config::http::HttpResponse;
use aws_sdk_eventbridge::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_eventbridge::types::PutEventsRequestEntry;
use tokio::sync::Semaphore;

use client::CurrentClient;

use crate::event::{Event, Fault, Outcome, PublishError};
use crate::sink::drive::{Answer, Requests, drive};
use crate::sink::rounds::Limits;
use crate::sink::{Batch, Format, Published, Sink};

pub use spec::Spec;

/// The most entries that `PutEvents` takes.
const REQUEST_ENTRIES: usize = 10;

/// The variables that name another endpoint, the more specific one first.
pub const ENDPOINT_VARIABLES: [&str; 2] = ["AWS_ENDPOINT_URL_EVENTBRIDGE", "AWS_ENDPOINT_URL"];

/// EventBridge's limit of an entry in bytes, since January 2026.
pub const DEFAULT_MAX_ENTRY_BYTES: usize = 1_048_576;
/// The most `PutEvents` calls in flight. 8,000 events/s at 40 ms a call need 32 calls of 10 events; twice that leaves room for
/// slower calls.
pub const DEFAULT_REQUESTS_IN_FLIGHT: usize = 64;

/// The settings of one event bus.
#[derive(Debug, Clone)]
pub struct EventBridgeConfig {
    /// The name or the ARN of the bus.
    pub bus: String,
    /// The `Source` of events that have no source.
    pub source: String,
    /// The content of `Detail`.
    pub format: Format,
    /// The region. It overrides the AWS environment and profile.
    pub region: Option<String>,
    /// The endpoint for EventBridge. It overrides the AWS environment and profile.
    pub endpoint_url: Option<String>,
    /// The most bytes of an entry, and of all entries of a request together. In some AWS partitions it is still 262,144.
    pub max_entry_bytes: usize,
    /// The most `PutEvents` calls in flight within one publish, from 1.
    pub requests_in_flight: usize,
    /// The longest wait for one `PutEvents` call.
    pub timeout: Duration,
}

/// The most kibibytes of entries in flight from all lanes together. Memory holds several copies of each entry while its request
/// is made and sent.
const IN_FLIGHT_KIB: u32 = 8 * 1024;

/// The time after which it is checked again that the bus exists.
const VERIFY_INTERVAL: Duration = Duration::from_secs(600);

/// The destination. All calls share the client, its connections and its credentials.
pub struct EventBridge {
    client: CurrentClient,
    config: EventBridgeConfig,
    /// When it was last checked that the bus exists.
    verified: Mutex<Option<Instant>>,
    in_flight: Semaphore,
}

impl EventBridge {
    /// Returns a sink with credentials, region and endpoint from AWS's usual places. If one is missing, the first call fails with
    /// [`Fault::Misconfigured`].
    pub async fn new(config: EventBridgeConfig) -> Self {
        let client = CurrentClient::from_environment(&config).await;
        Self::with_client(client, config)
    }

    /// Returns a sink with the settings of `sdk` that `config` does not override. Retries and timeouts of `sdk` are ignored.
    pub fn with_sdk_config(sdk: &SdkConfig, config: EventBridgeConfig) -> Self {
        Self::with_client(CurrentClient::with_sdk_config(sdk, &config), config)
    }

    fn with_client(client: CurrentClient, config: EventBridgeConfig) -> Self {
        Self { client, config, verified: Mutex::new(None), in_flight: Semaphore::new(IN_FLIGHT_KIB as usize) }
    }

    /// Makes one `PutEvents` call. Returns an outcome for each entry, or one error for all.
    async fn put(
        &self,
        entries: Vec<PutEventsRequestEntry>,
        bytes: usize,
        deadline: Instant,
    ) -> Result<Vec<Outcome>, PublishError> {
        let sent = entries.len();
        let kib = u32::try_from(bytes / 1024 + 1).map_or(IN_FLIGHT_KIB, |kib| kib.min(IN_FLIGHT_KIB));
        let room = tokio::time::timeout_at(deadline.into(), self.in_flight.acquire_many(kib)).await;
        if room.is_err() || Instant::now() >= deadline {
            return Ok(vec![Outcome::Held; sent]); // the round began in time, and building its other requests took the rest
        }
        let request = self.client.get().put_events().set_entries(Some(entries)).send();
        let answers = self.call(request, deadline).await?.entries.unwrap_or_default();
        if answers.len() != sent {
            let message = format!("{sent} entries were sent, and {} answers came back", answers.len());
            return Err(PublishError::new(Fault::Unknown, "wrong_entry_count", message));
        }
        Ok(answers.into_iter().map(fault::of_entry).collect())
    }

    /// Waits for the answer to a request until its timeout or `deadline`, whichever is earlier.
    async fn call<T, E: ProvideErrorMetadata + Error + 'static>(
        &self,
        request: impl Future<Output = Result<T, SdkError<E, HttpResponse>>>,
        deadline: Instant,
    ) -> Result<T, PublishError> {
        let until = deadline.min(Instant::now() + self.config.timeout);
        match tokio::time::timeout_at(until.into(), request).await {
            Ok(answer) => answer.map_err(fault::of_request).inspect_err(|error| {
                if error.fault == Fault::Misconfigured {
                    self.client.refused();
                }
            }),
            Err(_) => Err(PublishError::new(Fault::Unknown, "timeout", "no answer in time")),
        }
    }
}

#[async_trait]
impl Sink for EventBridge {
    async fn publish(&self, &Batch { events, deadline, .. }: &Batch<'_>) -> Published {
        // If no new credentials are found until the deadline, the old ones are tried.
        tokio::time::timeout_at(deadline.into(), self.client.renew_if_refused(&self.config)).await.ok();
        let mut puts = Puts::new(self, events, deadline);
        if Instant::now() < deadline
            && puts.refusals.iter().any(Option::is_none)
            && let Err(error) = self.verify(deadline).await
        {
            return Published::of(vec![Outcome::Failed(error); events.len()]);
        }
        let limits = Limits {
            request_events: REQUEST_ENTRIES,
            request_key_events: REQUEST_ENTRIES,
            request_bytes: self.config.max_entry_bytes,
            requests: self.config.requests_in_flight,
        };
        Published::of(drive(events, limits, deadline, &mut puts).await)
    }

    fn place(&self, _: &Event) -> String {
        self.config.bus.clone()
    }

    fn target(&self) -> String {
        format!("eventbridge {}, format {}", self.config.bus, self.config.format)
    }

    async fn check(&self) -> Result<String, PublishError> {
        self.describe(Instant::now() + self.config.timeout).await
    }
}

impl EventBridge {
    /// Makes sure that the bus exists before an event is published to it. AWS answers `PutEvents` with success if the bus does
    /// not exist, and the events would be lost.
    async fn verify(&self, deadline: Instant) -> Result<(), PublishError> {
        let verified = || self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        let last = *verified();
        if last.is_some_and(|at| at.elapsed() < VERIFY_INTERVAL) {
            return Ok(());
        }
        match self.describe(deadline).await {
            Ok(_) => *verified() = Some(Instant::now()),
            // A bus that existed a while ago does not vanish because this call was throttled.
            Err(error) if last.is_some() && error.fault != Fault::Misconfigured => {}
            Err(error) => {
                *verified() = None;
                return Err(error);
            }
        }
        Ok(())
    }

    fn encryption(&self) -> &'static str {
        let endpoint = self.config.endpoint_url.clone();
        let endpoint = endpoint.or_else(|| ENDPOINT_VARIABLES.iter().find_map(|name| std::env::var(name).ok()));
        let plain = endpoint.is_some_and(|url| url.trim_start().to_ascii_lowercase().starts_with("http:"));
        if plain { "not encrypted" } else { "encrypted (TLS)" }
    }

    /// Asks AWS for the description of the bus.
    async fn describe(&self, deadline: Instant) -> Result<String, PublishError> {
        let bus = &self.config.bus;
        let client = self.client.get();
        let region = client.config().region().map_or("no region", Region::as_ref);
        let request = client.describe_event_bus().name(bus).send();
        let Err(mut error) = self.call(request, deadline).await else {
            return Ok(format!("event bus {bus:?} in {region}, {}", self.encryption()));
        };
        error.fault = match error.fault {
            Fault::Unknown => Fault::Destination, // nothing was published that could have arrived
            Fault::Event => Fault::Misconfigured, // all that it sent is the name of the bus
            fault => fault,
        };
        if error.code == "not_sent" && client.config().region().is_none() {
            error.message = "there is no AWS region: set AWS_REGION".to_owned();
        } else if error.fault == Fault::Misconfigured && !matches!(error.code.as_str(), "not_sent" | "no_credentials") {
            error.message = format!(
                "event bus {bus:?} in {region}: {}; AWS_EVENTBRIDGE_BUS_NAME and AWS_REGION must name an existing bus, \
                 and the relay needs credentials that allow events:DescribeEventBus and events:PutEvents on it",
                error.message
            );
        }
        Err(error)
    }
}

/// One publish call.
struct Puts<'a> {
    bridge: &'a EventBridge,
    events: &'a [&'a Event],
    deadline: Instant,
    /// The `Detail` of each event, until it is in a request.
    details: Vec<String>,
    /// For each event the error if EventBridge cannot take it.
    refusals: Vec<Option<PublishError>>,
}

impl<'a> Puts<'a> {
    fn new(bridge: &'a EventBridge, events: &'a [&'a Event], deadline: Instant) -> Self {
        let (details, refusals) = events
            .iter()
            .map(|event| match bridge.detail(event) {
                Ok(detail) => (detail, None),
                Err(error) => (String::new(), Some(error)),
            })
            .unzip();
        Self { bridge, events, deadline, details, refusals }
    }
}

impl Requests for Puts<'_> {
    type Request = Vec<PutEventsRequestEntry>;

    fn size(&mut self, index: usize) -> Result<usize, PublishError> {
        match self.refusals[index].take() {
            Some(error) => Err(error),
            None => Ok(self.bridge.entry_bytes(self.events[index], self.details[index].len())),
        }
    }

    fn prepare(&mut self, members: &[usize]) -> Self::Request {
        let entry = |&index: &usize| {
            let mut detail = std::mem::take(&mut self.details[index]);
            // The detail was moved into an earlier request.
            if detail.is_empty() {
                detail = self.bridge.detail(self.events[index]).unwrap_or_default();
            }
            self.bridge.entry(self.events[index], detail)
        };
        members.iter().map(entry).collect()
    }

    async fn send(&self, entries: &mut Self::Request, _: &[usize], bytes: usize) -> Answer {
        match self.bridge.put(std::mem::take(entries), bytes, self.deadline).await {
            Ok(outcomes) => Answer::Each(outcomes),
            Err(error) => Answer::Whole(error),
        }
    }
}
