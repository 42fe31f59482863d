//! x
pub mod breaker;
pub mod event;
pub mod retry;
pub mod route;
pub mod sink;
pub use event::{NewEvent, NewEventError};
