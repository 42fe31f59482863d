//! The integration tests: one binary, so that it links once and its tests share their throwaway servers.
#![allow(clippy::unwrap_used)]

mod eventbridge;
mod servers;
mod stub;
mod support;
