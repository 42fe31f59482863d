//! The integration tests: one binary, so that it links once and its tests share their throwaway servers.
#![allow(clippy::unwrap_used)]

mod crash;
mod engine;
mod eventbridge;
mod harness;
mod scripted;
mod servers;
mod shop;
mod stub;
mod support;
