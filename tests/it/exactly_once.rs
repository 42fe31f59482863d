//! Exactly once into Redis: whatever makes a relay publish an event again, the event arrives once.
//!
//! The tests bring a relay into the states that faults cause: a zombie that lost its claim, a lost answer, a settle whose
//! commit was lost, a missing mark.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use outbox_relay::event::{Fault, Outcome, PublishError};
use outbox_relay::secret::Secret;
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_pubsub::{RedisPubSub, RedisPubSubConfig};
use outbox_relay::sink::redis_stream::{RedisStream, RedisStreamConfig};
use outbox_relay::sink::{Batch, Format, Published, Sink};
use sqlx::PgConnection;

use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::Gate;
use crate::servers::{Database, Server, database, redis};
use crate::stores::{Sqlite, Store};
use crate::stream;

/// What happens to a sink's answers.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Trouble {
    /// Every answer arrives, but the mark of the claim is lost.
    NoMark,
    /// All answers are lost, so that every outcome is unknown.
    Unknown,
    /// The first so many answers arrive, the others are lost.
    UnknownAfter(usize),
}

/// A real sink whose answers get lost on the way to the relay, call by call.
pub(crate) struct Lossy {
    sink: RedisStream,
    troubles: Mutex<VecDeque<Trouble>>,
    gate: Option<Arc<Gate>>,
}

impl Lossy {
    pub(crate) fn new(stream: &str, troubles: &[Trouble]) -> Arc<Self> {
        let troubles = Mutex::new(troubles.iter().copied().collect());
        Arc::new(Self { sink: sink(redis(), stream), troubles, gate: None })
    }

    fn gated(stream: &str, gate: &Arc<Gate>) -> Arc<Self> {
        Arc::new(Self { sink: sink(redis(), stream), troubles: Mutex::default(), gate: Some(Arc::clone(gate)) })
    }
}

#[async_trait]
impl Sink for Lossy {
    async fn publish(&self, batch: &Batch<'_>) -> Published {
        if let Some(gate) = &self.gate {
            gate.pass().await;
        }
        let mut published = self.sink.publish(batch).await;
        let trouble = self.troubles.lock().unwrap().pop_front();
        if let Some(trouble) = trouble {
            published.after_settle = None;
            let known = match trouble {
                Trouble::NoMark => batch.events.len(),
                Trouble::Unknown => 0,
                Trouble::UnknownAfter(known) => known,
            };
            for outcome in published.outcomes.iter_mut().skip(known) {
                *outcome = Outcome::Failed(PublishError::new(Fault::Unknown, "lost", "the answer was lost"));
            }
        }
        published
    }

    async fn check(&self) -> Result<String, PublishError> {
        self.sink.check().await
    }
}

pub(crate) fn address(server: &Server) -> RedisAddress {
    RedisAddress::Url(Secret::inline(server.url()))
}

pub(crate) fn sink(server: &Server, stream: &str) -> RedisStream {
    let stream = stream.parse().unwrap();
    RedisStream::new(RedisStreamConfig {
        address: address(server),
        stream,
        max_length: None,
        source: "outbox".into(),
        timeout: Duration::from_secs(30),
        exactly_once: true,
    })
}

/// Returns the types of the events in a stream, in order.
pub(crate) fn arrived(stream: &str) -> Vec<String> {
    stream::entries(&mut stream::connect(redis().url()), stream).into_iter().map(|e| e.fields["type"].clone()).collect()
}

async fn emit_all(connection: &mut PgConnection, names: &[&str]) {
    for name in names {
        emit(connection, name, "k").await;
    }
}

/// Runs one pass of a new relay.
async fn drain(database: &Database, sink: Arc<dyn Sink>, batch: usize) {
    let mut setup = Setup::new(database, vec![("redis", sink)]);
    setup.relay.batch_events = batch;
    setup.relay.lanes = 1;
    setup.policy.breaker.threshold = 1;
    setup.drain().await;
}

#[tokio::test]
async fn lost_answers_add_nothing_twice_though_the_events_come_back_in_smaller_pieces_and_beside_new_ones() {
    let (database, name) = (database().await, "once:pieces");
    let mut connection = database.connect().await;
    emit_all(&mut connection, &["e1", "e2", "e3", "e4"]).await;
    // Two of four answers arrive, and this relay does not publish the others again.
    drain(&database, Lossy::new(name, &[Trouble::UnknownAfter(2), Trouble::Unknown]), 4).await;
    assert_eq!(count(&mut connection, "event_outbox").await, 2);
    assert_eq!(arrived(name), ["e1", "e2", "e3", "e4"]);
    emit_all(&mut connection, &["e5", "e6"]).await;
    // Another relay claims one event at a time, and its answers get lost too.
    drain(&database, Lossy::new(name, &[Trouble::Unknown]), 1).await;
    drain(&database, Lossy::new(name, &[Trouble::Unknown]), 3).await;
    drain(&database, Lossy::new(name, &[Trouble::NoMark]), 2).await;
    assert_eq!(arrived(name), ["e1", "e2", "e3", "e4", "e5", "e6"]);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    assert_eq!(count(&mut connection, "event_processing_log where status = 'published'").await, 6);
    let messages = column(&mut connection, "select message_id from event_processing_log order by outbox_id").await;
    let entries = stream::entries(&mut stream::connect(redis().url()), name);
    assert_eq!(
        messages,
        entries.into_iter().map(|entry| entry.id).collect::<Vec<_>>(),
        "the log has the ids of the entries"
    );
}

#[tokio::test]
async fn a_settle_whose_commit_is_lost_repeats_nothing() {
    let (database, name) = (database().await, "once:commit");
    let mut connection = database.connect().await;
    emit_all(&mut connection, &["e1", "e2", "e3"]).await;
    sql(
        &mut connection,
        // `relay.proof` is excepted: a relay tries its statements with such an event before it publishes anything.
        "create function refuse() returns trigger language plpgsql as $$ begin
             if new.event_type <> 'relay.proof' then raise exception 'no' using errcode = '53100'; end if; return null;
         end $$;
         create constraint trigger refuse after insert on event_processing_log deferrable initially deferred
         for each row execute function refuse()",
    )
    .await;
    let mut setup = Setup::new(&database, vec![("redis", Arc::new(sink(redis(), name)) as Arc<dyn Sink>)]);
    setup.relay.lanes = 1;
    setup.relay().drain(tokio_util::sync::CancellationToken::new()).await.unwrap_err();
    assert_eq!(arrived(name).len(), 3);
    assert_eq!(count(&mut connection, "event_outbox").await, 3);
    sql(&mut connection, "drop trigger refuse on event_processing_log").await;
    emit_all(&mut connection, &["e4"]).await;
    drain(&database, Arc::new(sink(redis(), name)), 2).await;
    assert_eq!(arrived(name), ["e1", "e2", "e3", "e4"]);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

#[tokio::test]
async fn a_relay_that_lost_its_claim_adds_nothing_after_another_has() {
    let (database, name) = (database().await, "once:zombie");
    let mut connection = database.connect().await;
    emit_all(&mut connection, &["e1", "e2"]).await;
    let gate = Gate::new();
    let mut setup = Setup::new(&database, vec![("redis", Lossy::gated(name, &gate) as Arc<dyn Sink>)]);
    setup.outbox.worker = "zombie".to_owned();
    setup.relay.lanes = 1;
    let running = setup.run();
    gate.entered().await;
    let backends = "pg_stat_activity where application_name = 'relay' and datname = current_database()";
    sql(&mut connection, format!("select pg_terminate_backend(pid) from {backends}")).await;
    eventually("the zombie's claim is gone", async || count(&mut connection, backends).await == 0).await;
    drain(&database, Arc::new(sink(redis(), name)), 10).await;
    assert_eq!(arrived(name), ["e1", "e2"]);
    gate.open(1000);
    emit_all(&mut connection, &["e3"]).await;
    eventually("the zombie is ready again", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert_eq!(arrived(name), ["e1", "e2", "e3"]);
    assert_eq!(count(&mut connection, "event_processing_log where worker = 'zombie'").await, 1);
}

#[tokio::test]
async fn a_zombie_that_published_first_is_followed_without_a_repeat() {
    let (database, name) = (database().await, "once:first");
    let mut connection = database.connect().await;
    emit_all(&mut connection, &["e1", "e2"]).await;
    // It publishes and stops before it settles: `Unknown` leaves the same state as a crash.
    drain(&database, Lossy::new(name, &[Trouble::Unknown]), 10).await;
    assert_eq!(count(&mut connection, "event_outbox").await, 2);
    // Meanwhile an event with a lower id commits, of another key in the same partition.
    sql(
        &mut connection,
        "insert into event_outbox (id, event_type, aggregate_type, aggregate_id) overriding system value
         select 0, 'late', 'test', 'k' || i from generate_series(1, 10000) i
         where hashtextextended('k' || i, hashtextextended('test', 0)) & 63 = hashtextextended('k', hashtextextended('test', 0)) & 63
         limit 1",
    )
    .await;
    drain(&database, Lossy::new(name, &[Trouble::Unknown]), 1).await;
    drain(&database, Arc::new(sink(redis(), name)), 1).await;
    assert_eq!(arrived(name), ["e1", "e2", "late"]);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

#[tokio::test]
async fn an_epoch_that_went_back_with_its_database_holds_nobody_up() {
    let (database, name) = (database().await, "once:failover");
    let mut connection = database.connect().await;
    for floor in [1000, 5_000_000] {
        sql(&mut connection, format!("select setval('event_outbox_epoch', {floor})")).await;
        emit_all(&mut connection, &["before"]).await;
        drain(&database, Arc::new(sink(redis(), name)), 10).await;
        sql(&mut connection, "select setval('event_outbox_epoch', 7)").await;
        emit_all(&mut connection, &["after"]).await;
        drain(&database, Arc::new(sink(redis(), name)), 10).await;
    }
    assert_eq!(arrived(name), ["before", "after", "before", "after"]);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    let epoch: i64 =
        sqlx::query_scalar("select last_value from event_outbox_epoch").fetch_one(&mut connection).await.unwrap();
    assert!(epoch > 5_000_000, "{epoch}");
}

#[tokio::test]
async fn events_of_several_streams_and_partitions_come_back_each_to_its_own() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_type, aggregate_id)
         select 'once.s' || i % 3, 't', 'k' || i % 40 from generate_series(1, 300) i",
    )
    .await;
    let lossy = || Lossy::new("{event_type}", &[Trouble::Unknown]);
    drain(&database, lossy(), 300).await;
    drain(&database, lossy(), 100).await;
    drain(&database, Arc::new(sink(redis(), "{event_type}")), 50).await;
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    for stream in ["once.s0", "once.s1", "once.s2"] {
        let mut sequences: Vec<i64> =
            stream::entries(&mut stream::connect(redis().url()), stream).iter().map(stream::Entry::sequence).collect();
        assert_eq!(sequences.len(), 100, "{stream}");
        sequences.sort_unstable();
        sequences.dedup();
        assert_eq!(sequences.len(), 100, "{stream}");
    }
}

#[tokio::test]
async fn settled_lists_are_emptied_and_expire() {
    let (database, name) = (database().await, "once:marks");
    let mut connection = database.connect().await;
    emit_all(&mut connection, &["e1", "e2"]).await;
    drain(&database, Arc::new(sink(redis(), name)), 10).await;
    let mut redis = stream::connect(redis().url());
    let states: Vec<String> = redis::cmd("KEYS").arg("{once:marks}:relay:*").query(&mut redis).unwrap();
    assert_eq!(states.len(), 1, "{states:?}");
    let fields: Vec<String> = redis::cmd("HKEYS").arg(&states[0]).query(&mut redis).unwrap();
    assert_eq!(fields, ["owner"]);
    let lifetime: i64 = redis::cmd("TTL").arg(&states[0]).query(&mut redis).unwrap();
    assert!((86_000..=86_400).contains(&lifetime), "{lifetime}");
}

#[tokio::test]
async fn a_message_of_pubsub_is_published_once_too() {
    let database = database().await;
    let mut connection = database.connect().await;
    emit_all(&mut connection, &["once:ps"]).await;
    let mut listener = redis::Client::open(redis().url()).unwrap().get_connection().unwrap();
    let mut listening = listener.as_pubsub();
    listening.subscribe("once:ps").unwrap();
    listening.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    sql(
        &mut connection,
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'no'; end $$;
         create trigger refuse before insert on event_processing_log for each row execute function refuse()",
    )
    .await;
    let sink = || {
        let channel = "{event_type}".parse().unwrap();
        let timeout = Duration::from_secs(30);
        RedisPubSub::new(RedisPubSubConfig {
            address: address(redis()),
            channel,
            format: Format::CloudEvents,
            source: "outbox".into(),
            timeout,
            exactly_once: true,
        })
    };
    let setup = Setup::new(&database, vec![("redis", Arc::new(sink()) as Arc<dyn Sink>)]);
    setup.relay().drain(tokio_util::sync::CancellationToken::new()).await.unwrap_err();
    sql(&mut connection, "drop trigger refuse on event_processing_log").await;
    drain(&database, Arc::new(sink()), 10).await;
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    listening.get_message().unwrap();
    listening.get_message().unwrap_err();
}

#[tokio::test]
async fn a_sqlite_file_has_it_too() {
    let (store, name) = (Sqlite::new().await, "once:sqlite");
    let mut connection = store.connect().await;
    for event in ["e1", "e2", "e3"] {
        emit(&mut connection, event, "k").await;
    }
    for (troubles, batch) in [
        ([Trouble::UnknownAfter(1), Trouble::Unknown].as_slice(), 3),
        (&[Trouble::Unknown], 1),
        (&[Trouble::NoMark], 2),
    ] {
        let sink: Arc<dyn Sink> = Lossy::new(name, troubles);
        let mut setup = Setup::new(&store, vec![("redis", sink)]);
        setup.relay.batch_events = batch;
        setup.policy.breaker.threshold = 1;
        setup.drain().await;
    }
    assert_eq!(arrived(name), ["e1", "e2", "e3"]);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}
