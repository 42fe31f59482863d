//! A transactional-outbox relay: it publishes the committed rows of `event_outbox` to Redis and Amazon EventBridge, in order,
//! records the results, and loses nothing.
//!
//! Applications need only [`emit`](fn@emit) and [`NewEvent`], which the features `postgres` and `sqlite` bring. The rest is the
//! program `relay`. Its engine is the feature `relay`, destinations are `redis` and `eventbridge`, the command line is `cli`.
//!
//! ```text
//!             claim                    publish                       settle
//!   outbox ───────────▶ relay: lanes ───────────▶ sinks ─▶ outcomes ────────▶ outbox, processing log, dead letters
//!   (PostgreSQL, SQLite) route, breaker            (Redis, EventBridge, stdout)  one transaction
//!                                     retry: outcome ─▶ verdict
//! ```
//!
//! - **Nothing is lost.** A row leaves the outbox in the transaction that records how its event ended.
//! - **Order per key.** A key lives in one partition, a partition has one owner at a time, and a key stops at its first
//!   failure.
//! - **Repeats only after a fault**, because a crash between publish and settle leaves the row pending.
//! - **Not promised**: order on EventBridge, that anyone received a Pub/Sub message, durability beyond the destination's own.
//!
//! The modules, in the order of the flow. Arrows between them point one way: only [`relay`] knows stores, sinks and rules
//! at once.
//!
//! - `emit`: the function by which applications insert events.
//! - [`event`]: the types that all other modules share, such as an event, an outcome and a verdict.
//! - [`outbox`]: the contract of a store, with one door for the engine and one for the operator. [`outbox::postgres`] and
//!   [`outbox::sqlite`] have all SQL except that of `emit`.
//! - [`route`], [`retry`], [`breaker`]: pure decisions; time and randomness are passed in.
//! - [`sink`]: the contract of a destination, and its kinds.
//! - [`relay`](mod@relay): the engine.
//! - [`audit`]: compares the events that arrived with those that were emitted.
//! - [`config`], [`secret`], [`redact`], [`shutdown`], [`cli`], [`http`], `stderr`: the program around it.
//! - `text`: escapes and cuts foreign text for a log or an error.
//! - `units`: times and sizes as people write them.
//!
//! How to use it: the [`guide`], whose chapters are part of this documentation only.

#![cfg_attr(
    not(all(feature = "cli", feature = "postgres", feature = "sqlite", feature = "redis", feature = "eventbridge")),
    allow(dead_code, reason = "what stores share, or destinations, may be of no use to one of them alone")
)]
#![cfg_attr(
    not(any(feature = "postgres", feature = "sqlite")),
    allow(unreachable_code, unused_imports, unused_variables, reason = "without a store nothing is done to one")
)]

#[cfg(feature = "relay")]
pub mod audit;
#[cfg(feature = "relay")]
pub mod breaker;
#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "cli")]
pub mod config;
mod emit;
#[cfg(feature = "relay")]
pub mod event;
#[cfg(feature = "relay")]
mod failpoint;
// Documentation only: it is compiled by rustdoc alone.
#[cfg(all(doc, feature = "relay"))]
pub mod guide;
#[cfg(feature = "relay")]
mod hosts;
#[cfg(feature = "cli")]
pub mod http;
#[cfg(feature = "relay")]
pub mod outbox;
#[cfg(feature = "relay")]
pub mod redact;
#[cfg(feature = "relay")]
pub mod relay;
#[cfg(feature = "relay")]
pub mod retry;
#[cfg(feature = "relay")]
pub mod route;
#[cfg(feature = "relay")]
pub mod secret;
#[cfg(feature = "cli")]
pub mod shutdown;
#[cfg(feature = "relay")]
pub mod sink;
#[cfg(feature = "cli")]
mod stderr;
#[cfg(feature = "relay")]
mod text;
#[cfg(feature = "relay")]
mod units;

pub use emit::{EmitError, NewEvent, NewEventError, OutboxDatabase, emit};
pub use emit::{MAX_EVENT_TYPE_CHARS, MAX_HEADERS_BYTES, MAX_TEXT_BYTES, RESERVED_HEADERS};
