//! F35: a Redis that runs out of memory in the middle of a batch.

use outbox_relay::event::{Event, Fault, Outcome};

use crate::readback::RedisClient;
use crate::redis::sink;
use crate::servers::Server;
use crate::support::{assert_all_delivered, assert_all_failed, event, is_delivered, is_uncharged, keyed, publish};

#[tokio::test]
async fn f35_nothing_of_a_key_follows_its_first_failure_when_redis_is_out_of_memory() {
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    let sink = sink(server.url(), "events");
    assert_all_delivered(&publish(&sink, &[event(1)]).await);
    let used = client.info("used_memory");
    client.tell(&format!("CONFIG SET maxmemory {}", used + 6_000_000));
    // Events of six keys in turn. Their chunks are in flight together: 16 MB in all.
    let large = |id: i64| Event { payload: format!("\"{}\"", "x".repeat(8000)).into(), ..keyed(id, &key_of(id)) };
    fn key_of(id: i64) -> String {
        (id % 6).to_string()
    }
    let batch: Vec<Event> = (2..=2001).map(large).collect();
    let outcomes = publish(&sink, &batch).await;
    let failure = outcomes.iter().find(|outcome| matches!(outcome, Outcome::Failed(_))).unwrap();
    assert_all_failed(std::slice::from_ref(failure), Fault::Destination, "OOM");
    assert!(outcomes.iter().all(|outcome| is_delivered(outcome) || is_uncharged(outcome)));

    let in_stream = client.sequences("events").split_off(1);
    let answered: Vec<i64> = batch
        .iter()
        .zip(&outcomes)
        .filter(|(_, outcome)| is_delivered(outcome))
        .map(|(event, _)| event.row.id)
        .collect();
    assert!(!answered.is_empty());
    let sorted = |mut ids: Vec<i64>| {
        ids.sort_unstable();
        ids
    };
    assert_eq!(sorted(in_stream), answered, "the delivered events are those in the stream");
    for key in 0..6 {
        let of_key = outcomes.iter().zip(&batch).filter(|(_, event)| event.row.id % 6 == key);
        assert!(of_key.map(|(outcome, _)| is_delivered(outcome)).is_sorted_by(|a, b| a >= b), "key {key}");
    }

    client.tell("CONFIG SET maxmemory 0");
    let left: Vec<Event> = batch
        .into_iter()
        .zip(&outcomes)
        .filter(|(_, outcome)| !is_delivered(outcome))
        .map(|(event, _)| event)
        .collect();
    assert_all_delivered(&publish(&sink, &left).await);
    let all = client.sequences("events").split_off(1);
    assert_eq!(all.len(), 2000);
    for key in 0..6 {
        assert!(all.iter().filter(|&id| id % 6 == key).is_sorted(), "key {key}");
    }
}
