//! The contract of a sink, the code for one kind of destination.
//!
//! - [`cloudevent`]: the events that consumers receive, as JSON and as fields.
//! - [`drive`](mod@drive): the request loop. [`rounds`] splits a batch into requests and keeps the order of each key.
//! - [`handler`](fn@handler): a function of the application as a destination.
//! - [`spec`]: the list of the kinds, and how each is configured.
//! - [`redis`] with [`redis_stream`] and [`redis_pubsub`], [`eventbridge`], [`stdout`], [`file`](mod@file): the kinds.

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

/// The events that one call of [`Sink::publish`] publishes.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    /// The events. Those of one key are in order.
    pub events: &'a [&'a Event],
    /// The time after which no request begins and no request is waited for.
    pub deadline: Instant,
    /// The claim that the events belong to. If a sink can find out that an earlier claim has published an event already, it does
    /// not send the event again. `None`: every event is sent.
    pub claim: Option<ClaimContext<'a>>,
}

impl<'a> Batch<'a> {
    /// Returns a batch without a claim.
    pub fn new(events: &'a [&'a Event], deadline: Instant) -> Self {
        Self { events, deadline, claim: None }
    }
}

/// The claim that a batch belongs to. Sinks that publish exactly once need it.
#[derive(Clone, Copy)]
pub struct ClaimContext<'a> {
    /// The destination's name.
    pub destination: &'a str,
    /// The identity of the claim.
    pub id: &'a ClaimId,
    /// The outbox, which knows whether the claim is still held.
    pub check: &'a dyn ClaimCheck,
}

/// The part of the outbox that a sink may ask.
#[async_trait]
pub trait ClaimCheck: Send + Sync {
    /// Returns an epoch above `floor`, and the events of `noted` that still wait for `destination`. `None`: the claim is lost or
    /// may be lost, and the sink must publish nothing more for it.
    async fn renew(&self, floor: i64, noted: &[SentBefore], destination: &str) -> Option<RenewedClaim>;
}

/// The answers of one publish call.
pub struct Published {
    /// One outcome for each event, in order.
    pub outcomes: Vec<Outcome>,
    /// Runs when all outcomes are settled, and is dropped if they cannot be settled. Nothing waits for its end.
    pub after_settle: Option<BoxFuture<'static, ()>>,
}

impl Published {
    /// Returns answers after which nothing is left to do.
    pub fn of(outcomes: Vec<Outcome>) -> Self {
        Self { outcomes, after_settle: None }
    }
}

/// One configured place to publish to.
///
/// Several lanes call an implementation at once, with different keys. Implementations classify failures and leave all decisions
/// about retries, breaker and dead letters to the engine. They reconnect by themselves at the next call.
#[async_trait]
pub trait Sink: Send + Sync {
    /// Publishes the events of `batch` and answers for each, in the same order.
    ///
    /// - [`Outcome::Delivered`] means that this event's own reply was a success.
    /// - A key stops at its first failure in the call: its later events are [`Outcome::Held`]. (Within one `PutEvents`
    ///   request later entries of a key may succeed; that is reported as it happened.)
    /// - The sink splits the batch so that each request is within the destination's limits.
    /// - Events that were not sent by the deadline are [`Outcome::Held`]. Events that were sent and not answered are
    ///   [`Fault::Unknown`](crate::event::Fault::Unknown).
    async fn publish(&self, batch: &Batch<'_>) -> Published;

    /// Returns the place to which this event is published: a stream, a channel, a bus, a file. Empty: the sink has one place.
    fn place(&self, _event: &Event) -> String {
        String::new()
    }

    /// Ends with the reason when this process can never publish here again.
    async fn ended(&self) -> String {
        std::future::pending().await
    }

    /// Returns the kind of the sink and what it publishes to, without address and secrets. Two relays that return different texts
    /// for the same name have different configurations.
    fn target(&self) -> String {
        String::new()
    }

    /// Tries the destination without publishing. On success returns a short description of what it found.
    ///
    /// # Errors
    /// The destination cannot be used. The message says why, and what to do.
    async fn check(&self) -> Result<String, PublishError>;
}
