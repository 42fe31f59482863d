//! The HTTP server: metrics, health, and the state of the relay.
//!
//! - [`address`]: where it listens.
//! - `server`: connections, with their limits. No client can make the relay slower or larger than these allow.
//! - `page`: what each path answers. `board`: the page for people.
//!
//! The server has a thread and a runtime of its own, so that it answers even if all threads of the relay are blocked.

pub mod address;
pub(crate) mod board;
pub(crate) mod page;
pub(crate) mod server;
