//! The relay's states beside streams, when another program has put something else at their keys.

use std::sync::Arc;
use std::time::Duration;

use outbox_relay::sink::redis_pubsub::{RedisPubSub, RedisPubSubConfig};
use outbox_relay::sink::{Format, Sink};

use crate::exactly_once::{Lossy, Trouble, address, arrived, sink};
use crate::harness::{Setup, column, count, emit};
use crate::servers::redis;
use crate::stores::{Client, Postgres, Sqlite, Store};
use crate::stream;
use crate::support::unique;

/// Commands that put something else at the key of a state.
const FOREIGN: [&[&str]; 8] = [
    &["SET", "{key}", "somebody's"],
    &["RPUSH", "{key}", "somebody's"],
    &["XADD", "{key}", "*", "a", "b"],
    &["HSET", "{key}", "somebody's", "hash"],
    &["HSET", "{key}", "owner", "somebody"],
    &["HSET", "{key}", "owner", "1 2", "1", "what no relay writes"],
    // The largest number but one, and a number that a claim's epoch does not reach in one step.
    &["HSET", "{key}", "owner", "9223372036853775806 1"],
    &["HSET", "{key}", "owner", "99999999999999 1", "1", ""],
];

fn states(beside: &str) -> Vec<String> {
    let mut redis = stream::connect(redis().url());
    redis::cmd("KEYS").arg(format!("{beside}:relay:*")).query(&mut redis).unwrap()
}

fn dump(key: &str) -> Vec<u8> {
    redis::cmd("DUMP").arg(key).query(&mut stream::connect(redis().url())).unwrap()
}

/// Replaces a state with something else.
fn replace(state: &str, by: &[&str]) {
    let mut redis = stream::connect(redis().url());
    redis::cmd("DEL").arg(state).exec(&mut redis).unwrap();
    let mut command = redis::Cmd::new();
    by.iter().for_each(|word| {
        command.arg(word.replace("{key}", state));
    });
    command.exec(&mut redis).unwrap();
}

async fn drain<S: Store>(store: &S, sink: Arc<dyn Sink>) {
    let mut setup = Setup::new(store, vec![("redis", sink)]);
    setup.relay.lanes = 1;
    setup.policy.breaker.threshold = 1;
    setup.drain().await;
}

async fn what_is_no_state_is_left_alone<S: Store>(epoch: &str) {
    for foreign in FOREIGN {
        let (store, name) = (S::new().await, unique("states"));
        let mut connection = store.connect().await;
        emit(&mut connection, "e1", "k").await;
        drain(&store, Arc::new(sink(redis(), &name))).await;
        let [state] = states(&format!("{{{name}}}")).try_into().unwrap();
        replace(&state, foreign);
        let before = dump(&state);
        emit(&mut connection, "e2", "k").await;
        emit(&mut connection, "e3", "k").await;
        // An answer is lost under the new key, which two relays choose independently.
        drain(&store, Lossy::new(&name, &[Trouble::Unknown])).await;
        drain(&store, Arc::new(sink(redis(), &name))).await;
        assert_eq!(arrived(&name), ["e1", "e2", "e3"], "{foreign:?}");
        assert_eq!(count(&mut connection, "event_outbox").await, 0, "{foreign:?}");
        assert_eq!(count(&mut connection, "event_dead_letter").await, 0, "{foreign:?}");
        assert_eq!(dump(&state), before, "{foreign:?}");
        let epoch = connection.number(epoch).await;
        assert!(epoch < 1_000_000, "{epoch}");
    }
}

#[tokio::test]
async fn f97_f98_a_state_of_another_type_or_content_is_left_alone_and_replaced() {
    what_is_no_state_is_left_alone::<Postgres>("select last_value from event_outbox_epoch").await;
}

#[tokio::test]
async fn f97_f98_the_same_of_a_sqlite_file() {
    what_is_no_state_is_left_alone::<Sqlite>("select epoch from event_outbox_epoch").await;
}

#[tokio::test]
async fn f97_the_state_of_channels_is_replaced_as_well() {
    let (store, name) = (Postgres::new().await, unique("channel"));
    let mut connection = store.connect().await;
    let sink = || -> Arc<dyn Sink> {
        let channel = name.parse().unwrap();
        let timeout = Duration::from_secs(30);
        Arc::new(RedisPubSub::new(RedisPubSubConfig {
            address: address(redis()),
            channel,
            format: Format::Payload,
            source: "outbox".into(),
            timeout,
            exactly_once: true,
        }))
    };
    let id = column(&mut connection, "select relay_outbox_id()").await.remove(0);
    emit(&mut connection, "e1", "k").await;
    drain(&store, sink()).await;
    let mut redis_connection = stream::connect(redis().url());
    let states: Vec<String> =
        redis::cmd("KEYS").arg(format!("relay:{{*}}:{id}:*")).query(&mut redis_connection).unwrap();
    let [state] = states.try_into().unwrap();
    replace(&state, FOREIGN[0]);
    let mut listener = stream::connect(redis().url());
    let mut listening = listener.as_pubsub();
    listening.subscribe(&name).unwrap();
    emit(&mut connection, "e2", "k").await;
    drain(&store, sink()).await;
    listening.get_message().unwrap();
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

async fn an_event_cannot_name_a_state<S: Store>() {
    let (store, stream) = (S::new().await, unique("types"));
    let mut connection = store.connect().await;
    emit(&mut connection, &stream, "k").await;
    drain(&store, Arc::new(sink(redis(), "{event_type}"))).await;
    let [state] = states(&format!("{{{stream}}}")).try_into().unwrap();
    // The name of a state, the key that would replace it, and a state of another outbox; the events of each key are in order.
    for name in [state.clone(), format!("{state}:v2"), "{x}:relay:0123456789ab-5:redis:576".to_owned()] {
        emit(&mut connection, &name, "k").await;
    }
    emit(&mut connection, &stream, "k").await;
    drain(&store, Arc::new(sink(redis(), "{event_type}"))).await;
    assert_eq!(arrived(&stream).len(), 2);
    let codes = column(&mut connection, "select error_code from event_dead_letter").await;
    assert_eq!(codes, ["reserved_name"; 3]);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    let kind: String = redis::cmd("TYPE").arg(&state).query(&mut stream::connect(redis().url())).unwrap();
    assert_eq!(kind, "hash");
}

#[tokio::test]
async fn f97_a_template_cannot_give_a_stream_the_name_of_a_state() {
    an_event_cannot_name_a_state::<Postgres>().await;
}

#[tokio::test]
async fn f97_nor_from_a_sqlite_file() {
    an_event_cannot_name_a_state::<Sqlite>().await;
}
