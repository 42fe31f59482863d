//! What can go wrong, provoked one by one. A test is named after its fault in the catalogue, `FAULTS.md`, as in `f03_`; those
//! that hold on every store are among the contract's, those of one sink beside the sink's others.

mod clock;
mod database;
mod disk;
mod eventbridge;
mod flow;
mod matrix;
mod postgres;
mod relay;
mod rows;

use std::collections::{HashMap, HashSet};

use sqlx::PgConnection;

use crate::binary::{Running, relay as program};
use crate::harness::{column, count, eventually, sql};
use crate::servers::{Database, database, redis};
use crate::stream;
use crate::support::unique;

/// Partitions that some lane holds.
const CLAIMED: &str = "pg_locks where locktype = 'advisory' and classid = 'event_outbox'::regclass and objid < 640
                       and objsubid = 2 and database = (select oid from pg_database where datname = current_database())";

/// Ends the connections of relays, as an operator or a failing server does.
const TERMINATE: &str = "select pg_terminate_backend(pid) from pg_stat_activity
                         where application_name = 'relay' and datname = current_database()";

/// Emits events of `keys` keys in turn.
async fn load(connection: &mut PgConnection, events: i64, keys: i64) {
    let insert = format!(
        "insert into event_outbox (event_type, aggregate_type, aggregate_id, payload)
         select 'a', 'k', (i % {keys})::text, to_jsonb(i) from generate_series(1, {events}) i"
    );
    sql(connection, insert).await;
}

async fn until_empty(connection: &mut PgConnection) {
    eventually("the outbox is empty", async || count(connection, "event_outbox").await == 0).await;
}

/// The log tells of each event once that it was published, by its first attempt, and nothing else.
async fn assert_logged_once(connection: &mut PgConnection, events: i64) {
    let log = "select concat_ws(' ', count(*), count(distinct event_id), status, attempt)
               from event_processing_log group by status, attempt";
    assert_eq!(column(connection, log).await, [format!("{events} {events} published 1")]);
    assert_eq!(count(connection, "event_outbox").await, 0);
    assert_eq!(count(connection, "event_dead_letter").await, 0);
}

/// Of what arrived, as keys with ids: how many events there were, and how many came again. Those of each key came for the
/// first time in their order.
#[track_caller]
fn assert_first_in_order(arrived: impl IntoIterator<Item = (String, i64)>) -> (usize, usize) {
    let (mut last, mut seen, mut repeats) = (HashMap::new(), HashSet::new(), 0);
    for (key, id) in arrived {
        if !seen.insert(id) {
            repeats += 1;
            continue;
        }
        let before = last.insert(key.clone(), id).unwrap_or_default();
        assert!(before < id, "of key {key} {id} came after {before}");
    }
    (seen.len(), repeats)
}

/// A database, and a stream of a Redis that it is relayed to.
struct Line {
    database: Database,
    redis_url: String,
    stream: String,
}

impl Line {
    /// Between shared servers.
    async fn new() -> Self {
        Self::from(database().await)
    }

    fn from(database: Database) -> Self {
        Self { database, redis_url: redis().url().to_owned(), stream: unique("faults") }
    }

    async fn connect(&self) -> PgConnection {
        self.database.connect().await
    }

    /// Runs the program between them.
    fn start(&self, more: &[(&str, &str)]) -> Running {
        self.start_with(&["run"], more)
    }

    fn start_with(&self, args: &[&str], more: &[(&str, &str)]) -> Running {
        let mut variables = vec![
            ("DATABASE_URL", self.database.url()),
            ("REDIS_URL", &self.redis_url),
            ("RELAY_REDIS_STREAM", &self.stream),
        ];
        // The last one counts.
        variables.extend(more);
        Running::start(program(args, &variables))
    }

    fn length(&self) -> usize {
        stream::length(&mut stream::connect(&self.redis_url), &self.stream)
    }

    /// All of `events` arrived, each key's in order, and are recorded. Returns how many came again.
    async fn assert_delivered(&self, events: i64) -> usize {
        let entries = stream::entries(&mut stream::connect(&self.redis_url), &self.stream);
        let arrived = entries.iter().map(|entry| (entry.fields["subject"].clone(), entry.sequence()));
        let (distinct, repeats) = assert_first_in_order(arrived);
        assert_eq!(distinct, usize::try_from(events).unwrap(), "events that arrived");
        assert_logged_once(&mut self.connect().await, events).await;
        repeats
    }
}

/// Stops it in good order.
#[track_caller]
fn stop(running: Running) {
    running.signal("TERM");
    running.finish().exited(0);
}
