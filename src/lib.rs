//! A transactional-outbox relay: committed rows of `event_outbox` reach Redis and Amazon EventBridge, in order, recorded,
//! nothing lost.
//!
//! Applications need [`emit`] and [`NewEvent`] only. The rest is the program `relay`:
//!
//! ```text
//!             claim                    publish                       settle
//!   outbox ───────────▶ relay: lanes ───────────▶ sinks ─▶ outcomes ────────▶ outbox, processing log, dead letters
//!   (PostgreSQL, SQLite) route, breaker            (Redis, EventBridge, stdout)  one transaction
//!                                     retry: outcome ─▶ verdict
//! ```
//!
//! - **Nothing is lost.** A row leaves the outbox in the transaction that records what became of it.
//! - **Order per key.** A key lives in one partition, a partition has one owner at a time, and a key stops at its first
//!   failure.
//! - **Repeats only after a fault**, because a crash between publish and settle leaves the row pending.
//! - **Not promised**: order on EventBridge, that anyone heard a Pub/Sub message, durability beyond the destination's own.
//!
//! The modules, in the order of the flow. Arrows between them point one way: only [`relay`] knows stores, sinks and rules
//! at once.
//!
//! - [`event`]: the vocabulary.
//! - [`outbox`]: the contract of a store; [`outbox::postgres`] and [`outbox::sqlite`] have all SQL.
//! - [`route`], [`retry`], [`breaker`]: pure decisions; time and randomness are passed in.
//! - [`sink`]: the contract of a destination, and its kinds.
//! - [`relay`](mod@relay): the engine.
//! - [`audit`]: whether what arrived is what was emitted.
//! - [`config`], [`secret`], [`redact`], [`shutdown`], [`cli`], `stderr`: the program around it.
//! - `text`: what others wrote, as it may stand in a log.

pub mod audit;
pub mod breaker;
pub mod cli;
pub mod config;
pub mod event;
mod failpoint;
mod hosts;
pub mod outbox;
pub mod redact;
pub mod relay;
pub mod retry;
pub mod route;
pub mod secret;
pub mod shutdown;
pub mod sink;
mod stderr;
mod text;

pub use event::{NewEvent, NewEventError};
pub use outbox::emit::{EmitError, OutboxDatabase, emit};
