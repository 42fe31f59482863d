//! The integration tests: one binary, so that it links once and its tests share their throwaway servers.
#![allow(clippy::unwrap_used)]

mod binary;
mod crash;
mod engine;
mod eventbridge;
mod harness;
mod schema;
mod scripted;
mod servers;
mod shop;
mod stub;
mod support;
