//! The integration tests. They are one binary, so that linking happens once and the tests share throwaway servers.
#![allow(clippy::unwrap_used)]

#[cfg(not(feature = "failpoints"))]
compile_error!("the tests make the relay fail at chosen places: run `make test`, or pass --features failpoints");

mod bad_input;
mod binary;
mod bounds;
mod chaos;
mod cli;
mod contract;
mod crash_loop;
mod drill;
mod endurance;
mod engine;
mod eventbridge;
mod exactly_once;
mod faults;
mod faults_redis;
mod ghost;
mod harness;
mod mend;
mod model;
mod moto;
mod observe;
mod proxy;
mod pubsub;
mod readback;
mod reality;
mod redis;
mod redis_tls;
mod schema;
mod scripted;
mod servers;
mod shop;
mod sinks;
mod sqlite;
mod status;
mod stores;
mod stream;
mod stub;
mod support;
mod webhooks;
