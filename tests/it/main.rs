//! The integration tests: one binary, so that it links once.
#![allow(clippy::unwrap_used)]

mod eventbridge;
mod stub;
mod support;
