//! The contract of a sink, the code for one kind of destination.
//!
//! - [`cloudevent`]: what consumers receive, in JSON and as fields.
//! - [`drive`](mod@drive): the request loop. [`rounds`] splits a batch into requests and keeps the order of each key.
//! - [`handler`](fn@handler): a function of the application.
//! - [`spec`]: the list of the kinds, and how each is configured.
//! - [`redis`] with [`redis_stream`] and [`redis_pubsub`], [`eventbridge`], [`stdout`].

pub mod cloudevent;
pub mod drive;
#[cfg(feature = "eventbridge")]
pub mod eventbridge;
pub mod file;
mod handler;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(feature = "redis")]
pub mod redis_pubsub;
#[cfg(feature = "redis")]
pub mod redis_stream;
pub mod rounds;
pub mod spec;
pub mod stdout;
pub mod template;

use std::time::Instant;

use async_trait::async_trait;
use futures_util::future::BoxFuture;

pub use handler::{HandlerError, handler};

use crate::event::{ClaimId, Event, Outcome, PublishError, RenewedClaim, SentBefore};

/// What a document-shaped destination is given for an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum), value(rename_all = "lower"))]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Structured `CloudEvents` JSON, with the payload as `data`.
    CloudEvents,
    /// The payload alone.
    Payload,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::CloudEvents => "cloudevents",
            Self::Payload => "payload",
        })
    }
}

/// What one call of [`Sink::publish`] is to publish.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    /// In order per key.
    pub events: &'a [&'a Event],
    /// No request begins after it, and none lasts longer.
    pub deadline: Instant,
    /// The claim that the events belong to. A sink that can tell whether an earlier claim has published an event already does
    /// not send it again. `None`: every event is sent.
    pub claim: Option<ClaimContext<'a>>,
}

impl<'a> Batch<'a> {
    /// A batch of no claim.
    pub fn new(events: &'a [&'a Event], deadline: Instant) -> Self {
        Self { events, deadline, claim: None }
    }
}

/// The claim that a batch belongs to, as a sink needs it that publishes exactly once.
#[derive(Clone, Copy)]
pub struct ClaimContext<'a> {
    /// The destination's name.
    pub destination: &'a str,
    /// What sets the claim apart.
    pub id: &'a ClaimId,
    /// Tells whether the claim is still held.
    pub check: &'a dyn ClaimCheck,
}

/// The outbox, as far as a sink may ask it.
#[async_trait]
pub trait ClaimCheck: Send + Sync {
    /// An epoch above `floor`, and which of `noted` still wait for `destination`. `None`: the claim is lost, or may be; nothing more is to be
    /// published for it.
    async fn renew(&self, floor: i64, noted: &[SentBefore], destination: &str) -> Option<RenewedClaim>;
}

/// The answers of one publish call.
pub struct Published {
    /// One for each event, in order.
    pub outcomes: Vec<Outcome>,
    /// What to do when all of that is settled; dropped, if it cannot be. Nothing waits for it.
    pub after_settle: Option<BoxFuture<'static, ()>>,
}

impl Published {
    /// Answers with nothing to do afterwards.
    pub fn of(outcomes: Vec<Outcome>) -> Self {
        Self { outcomes, after_settle: None }
    }
}

/// One configured place to publish to.
///
/// Implementations are called by several lanes at once, with different keys. They classify failures and decide nothing:
/// retries, breaker and dead letters are the engine's. They reconnect by themselves at the next call.
#[async_trait]
pub trait Sink: Send + Sync {
    /// Publishes the events of `batch` and answers for each, in the same order.
    ///
    /// - Delivered means that this very event's reply was a success.
    /// - A key stops at its first failure in the call: its later events are [`Outcome::Held`]. (Within one `PutEvents`
    ///   request later entries of a key may succeed; that is reported as it happened.)
    /// - The sink splits the batch to the destination's limits.
    /// - What was not sent by the deadline is [`Outcome::Held`]; what was sent and not answered is
    ///   [`Fault::Unknown`](crate::event::Fault::Unknown).
    async fn publish(&self, batch: &Batch<'_>) -> Published;

    /// Where it puts this event, as far as the event decides: a stream, a channel, a bus. Empty: it has one place only.
    fn place(&self, _event: &Event) -> String {
        String::new()
    }

    /// Ends, with the reason, when this process can never publish here again.
    async fn ended(&self) -> String {
        std::future::pending().await
    }

    /// What kind it is and what it publishes to, without address and secrets. Two relays with another answer under the same name
    /// have different configurations.
    fn target(&self) -> String {
        String::new()
    }

    /// Tries the destination without publishing; on success says in a few words what is there.
    ///
    /// # Errors
    /// What stands in the way, with what to do about it.
    async fn check(&self) -> Result<String, PublishError>;
}
