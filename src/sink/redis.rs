//! What the destinations of Redis share: a connection that is opened again after an error, and publishing in chunks.
//!
//! - `spec`: the fields that say where a Redis is.
//! - `address`: one server, a cluster, or the master that Sentinels name.
//! - `connection`: a connection to any of them.
//! - `command`: one event's command.
//! - `publish`: a batch in chunks. `isolate` finds the event on which Redis closes the connection.
//! - `script`: a chunk as one call of a script, which stops a key at its first error.
//! - `once`: keeps an event that is published again from arriving twice. `state` and `state_key` say what its notes hold and
//!   where they lie.
//! - `check`: what `relay check` tries.
//! - `read`: reads a stream back.
//! - `fault`: whose fault an error is.

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

/// Kibibytes of chunks in flight from all lanes together. A call is held three times while it is sent: as it is made, as it
/// is packed, and in the connection's buffer.
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
    /// Connects at the first use. `timeout` bounds the wait for any one answer.
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

    /// Another one for the same server, with a connection of its own.
    fn with_own_connection(&self) -> Self {
        let (in_flight, replaced) = (Arc::clone(&self.in_flight), Arc::clone(&self.replaced));
        Self { in_flight, replaced, ..Self::new(self.address.clone(), self.timeout) }
    }

    /// Waits until a call of so many bytes may be in flight. `None`: the deadline came first.
    async fn room(&self, bytes: usize, deadline: Instant) -> Option<SemaphorePermit<'_>> {
        let kib = u32::try_from(bytes / 1024 + 1).map_or(IN_FLIGHT_KIB, |kib| kib.min(IN_FLIGHT_KIB));
        tokio::time::timeout_at(deadline.into(), self.in_flight.acquire_many(kib)).await.ok()?.ok()
    }

    /// The connection and its number, by which it can be given up.
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
