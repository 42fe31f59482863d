//! The integration tests: one binary, so that it links once and its tests share their throwaway servers.
#![allow(clippy::unwrap_used)]

mod binary;
mod cli;
mod crash;
mod endurance;
mod engine;
mod eventbridge;
mod harness;
mod schema;
mod scripted;
mod servers;
mod shop;
mod stream;
mod stub;
mod support;
