//! The code that all Redis destinations share: a connection that is opened again after an error, and publishing in chunks.
//!
//! - `spec`: the fields that give the address of a Redis.
//! - `address`: the address of one server, of a cluster, or of the master that Sentinels name.
//! - `connection`: a connection to any of them.
//! - `command`: the command that publishes one event.
//! - `publish`: a batch in chunks. `isolate` finds the event on which Redis closes the connection.
//! - `script`: a chunk as one call of a script, which stops a key at its first error.
//! - `once`: makes sure that an event that is published again arrives once. `state` is the content of its notes, `state_key`
//!   their keys.
//! - `check`: the tests that `relay check` makes.
//! - `read`: reads a stream back.
//! - `fault`: classifies errors.

mod address;
mod check;
mod command;
mod connection;
mod fault;
#[cfg(fuzzing)]
pub mod fuzzing;
mod isolate;
mod once;
mod publish;
mod read;
mod script;
pub(in crate::sink) mod spec;
mod state;
mod state_key;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, Semaphore, SemaphorePermit};

use crate::event::PublishError;
pub use address::RedisAddress;
pub(super) use command::{Command, Commands};
use connection::Connection;
use fault::connect_error;
use isolate::Suspects;
pub use read::StreamReader;
use script::PUBLISH;
use state_key::Replaced;

/// The most kibibytes of chunks in flight from all lanes together. While a call is sent, memory holds it three times: as it is
/// made, as it is packed, and in the connection's buffer.
const IN_FLIGHT_KIB: u32 = 8 * 1024;

/// A connection to one Redis, or to a cluster, shared by all lanes.
pub(super) struct Redis {
    address: RedisAddress,
    timeout: Duration,
    connection: Mutex<Option<(u64, Connection)>>,
    suspects: Suspects,
    in_flight: Arc<Semaphore>,
    replaced: Arc<Replaced>,
}

impl Redis {
    /// Returns a Redis that connects at the first use. `timeout` bounds the wait for each answer.
    pub(super) fn new(address: RedisAddress, timeout: Duration) -> Self {
        let in_flight = Arc::new(Semaphore::new(IN_FLIGHT_KIB as usize));
        Self {
            address,
            timeout,
            connection: Mutex::new(None),
            suspects: Suspects::default(),
            in_flight,
            replaced: Arc::default(),
        }
    }

    /// Returns another value for the same server, with its own connection.
    fn with_own_connection(&self) -> Self {
        let (in_flight, replaced) = (Arc::clone(&self.in_flight), Arc::clone(&self.replaced));
        Self { in_flight, replaced, ..Self::new(self.address.clone(), self.timeout) }
    }

    /// Waits until a call of so many bytes may be in flight. `None`: there was no room until the deadline.
    async fn room(&self, bytes: usize, deadline: Instant) -> Option<SemaphorePermit<'_>> {
        let kib = u32::try_from(bytes / 1024 + 1).map_or(IN_FLIGHT_KIB, |kib| kib.min(IN_FLIGHT_KIB));
        tokio::time::timeout_at(deadline.into(), self.in_flight.acquire_many(kib)).await.ok()?.ok()
    }

    /// Returns the connection, and its number for [`give_up`](Self::give_up).
    async fn connection(&self) -> Result<(u64, Connection), PublishError> {
        let mut current = self.connection.lock().await;
        if let Some((number, connection)) = current.as_ref() {
            return Ok((*number, connection.clone()));
        }
        let mut connection = Connection::open(&self.address, self.timeout).await?;
        connection.load(&PUBLISH).await.map_err(connect_error)?;
        let connected = (fastrand::u64(..), connection);
        *current = Some(connected.clone());
        Ok(connected)
    }

    /// Gives a connection up, unless another lane has replaced it already.
    async fn give_up(&self, number: u64) {
        let mut current = self.connection.lock().await;
        if current.as_ref().is_some_and(|(current, _)| *current == number) {
            *current = None;
        }
    }
}
