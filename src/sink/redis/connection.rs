//! A connection to one server or to a cluster.

use std::time::Duration;

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{
    MultipleNodeRoutingInfo, ResponsePolicy, Route, RoutingInfo, SingleNodeRoutingInfo, SlotAddr,
};
use redis::sentinel::{SentinelClient, SentinelServerType};
use redis::{AsyncConnectionConfig, Client, Cmd, ConnectionInfo, Pipeline, RedisFuture, RedisResult, Script, Value};

use super::address::{RedisAddress, Target};
use super::fault::connect_error;
use crate::event::PublishError;

/// The longest time that connecting to one server may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How often the client library follows MOVED and ASK, and retries after TRYAGAIN, CLUSTERDOWN and the like, before it returns
/// that answer. With the library's defaults a call could last ten minutes.
const CLUSTER_RETRIES: u32 = 4;

/// The longest wait between two of these retries, in milliseconds.
const CLUSTER_RETRY_WAIT: u64 = 100;

/// The number of slots of a cluster.
const SLOTS: u16 = 16384;

/// An open connection; clones share it.
#[derive(Clone)]
pub(super) enum Connection {
    /// A connection to one server.
    Single(MultiplexedConnection),
    /// Connections to the nodes of a cluster.
    Cluster(ClusterConnection),
}

impl Connection {
    /// Connects. It reads the secrets and asks the Sentinels each time. `timeout` bounds the wait for each answer.
    pub(super) async fn open(address: &RedisAddress, timeout: Duration) -> Result<Self, PublishError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(timeout));
        let target = address.target()?;
        let told = target.to_string();
        match target {
            Target::Single(info) => single(info, &config).await.map(Self::Single),
            Target::Sentinel { sentinels, master, node, .. } => {
                let client = SentinelClient::build(sentinels, master, Some(node), SentinelServerType::Master);
                let connected = async { client?.get_async_connection_with_config(&config).await };
                connected.await.map(Self::Single)
            }
            Target::Cluster(nodes) => {
                let client = ClusterClient::builder(nodes.clone())
                    .connection_timeout(CONNECT_TIMEOUT)
                    .response_timeout(timeout)
                    .retries(CLUSTER_RETRIES)
                    .min_retry_wait(CLUSTER_RETRY_WAIT / 10)
                    .max_retry_wait(CLUSTER_RETRY_WAIT)
                    .build();
                match async { client?.get_async_connection().await }.await {
                    Ok(connection) => Ok(Self::Cluster(connection)),
                    Err(error) => Err(reason(&nodes, &config).await.unwrap_or(error)),
                }
            }
        }
        .map_err(|error| {
            let error = connect_error(error);
            PublishError::new(error.fault, error.code, format!("{told}: {}", error.message)).of_destination()
        })
    }

    /// Whether all keys of a call must be in one slot.
    pub(super) fn has_slots(&self) -> bool {
        matches!(self, Self::Cluster(_))
    }

    /// Sends one command and returns its answer. In a cluster it goes to the master of the slot `place`. If the server answers
    /// with an error, that is returned as an error.
    pub(super) async fn call(&mut self, command: &Cmd, place: u16) -> RedisResult<Value> {
        let answer = match self {
            Self::Single(connection) => connection.send_packed_command(command).await,
            Self::Cluster(connection) => {
                let node = SingleNodeRoutingInfo::SpecificNode(Route::new(place, SlotAddr::Master));
                connection.route_command(command.clone(), RoutingInfo::SingleNode(node)).await
            }
        };
        answer.and_then(Value::extract_error)
    }

    /// Loads the script into the server, or into every master of the cluster.
    pub(super) async fn load(&mut self, script: &Script) -> RedisResult<()> {
        match self {
            Self::Single(connection) => script.load_async(connection).await.map(drop),
            Self::Cluster(connection) => script.load_async(&mut EveryMaster(connection)).await.map(drop),
        }
    }
}

async fn single(info: ConnectionInfo, config: &AsyncConnectionConfig) -> RedisResult<MultiplexedConnection> {
    Client::open(info)?.get_multiplexed_async_connection_with_config(config).await
}

/// Returns the error of a node that answers, as the reason why no node of the cluster can be used. The library reports only that
/// none can.
async fn reason(nodes: &[ConnectionInfo], config: &AsyncConnectionConfig) -> Option<redis::RedisError> {
    for node in nodes {
        match single(node.clone(), config).await {
            Err(error) if !error.is_io_error() => return Some(error),
            _ => {}
        }
    }
    None
}

/// Sends commands to every master. The library would also load scripts into replicas, and wait for replicas that are down or
/// loading.
struct EveryMaster<'a>(&'a mut ClusterConnection);

impl ConnectionLike for EveryMaster<'_> {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        let masters = (MultipleNodeRoutingInfo::AllMasters, Some(ResponsePolicy::AllSucceeded));
        Box::pin(self.0.route_command(command.clone(), RoutingInfo::MultiNode(masters)))
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        self.0.req_packed_commands(pipeline, offset, count)
    }

    fn get_db(&self) -> i64 {
        0
    }
}

/// Returns the slot of a key in a cluster: the checksum (CRC-16/XMODEM) of the text between its first `{` and the next `}`, or of
/// the whole key.
pub(super) fn slot_of(key: &[u8]) -> u16 {
    let tag = key.iter().position(|&byte| byte == b'{').and_then(|open| {
        let rest = &key[open + 1..];
        rest.iter().position(|&byte| byte == b'}').filter(|&length| length > 0).map(|length| &rest[..length])
    });
    let crc = tag.unwrap_or(key).iter().fold(0, |crc: u16, &byte| {
        (0..8).fold(crc ^ u16::from(byte) << 8, |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 })
    });
    crc % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_the_one_that_redis_computes() {
        assert_eq!(slot_of(b"123456789"), 0x31c3); // the example of Redis' cluster specification
        for key in ["", "events", "{shop}:orders", "{shop}", "a{}b", "a{b", "a}{b}c}", "{a}{b}", "Ærø{é}"] {
            let route = Route::with_key(key, SlotAddr::Master);
            assert_eq!(Route::new(slot_of(key.as_bytes()), SlotAddr::Master), route, "{key:?}");
        }
        assert_eq!(slot_of(b"{shop}:orders"), slot_of(b"shop"));
    }
}
