//! One test or more for each fault. A test is named after its fault's number in the catalogue, `FAULTS.md`, as in `f03_`.
//! Faults that concern every store are tested in `contract`, those of one sink beside that sink's other tests.

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

/// Counts the partitions that are claimed by a lane.
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

/// The log says `published` once for each event, with attempt 1, and has no other rows.
async fn assert_logged_once(connection: &mut PgConnection, events: i64) {
    let log = "select concat_ws(' ', count(*), count(distinct event_id), status, attempt)
               from event_processing_log group by status, attempt";
    assert_eq!(column(connection, log).await, [format!("{events} {events} published 1")]);
    assert_eq!(count(connection, "event_outbox").await, 0);
    assert_eq!(count(connection, "event_dead_letter").await, 0);
}

/// Checks events, given as keys with ids, in order of arrival: the first copies of each key's events must come in order.
/// Returns how many different events arrived, and how many arrived again.
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

/// A database, a stream in Redis, and the variables of a relay between them.
struct Line {
    database: Database,
    redis_url: String,
    stream: String,
}

impl Line {
    /// On the shared servers.
    async fn new() -> Self {
        Self::from(database().await)
    }

    fn from(database: Database) -> Self {
        Self { database, redis_url: redis().url().to_owned(), stream: unique("faults") }
    }

    async fn connect(&self) -> PgConnection {
        self.database.connect().await
    }

    /// Starts the relay, with more variables.
    fn start(&self, more: &[(&str, &str)]) -> Running {
        self.start_with(&["run"], more)
    }

    fn start_with(&self, args: &[&str], more: &[(&str, &str)]) -> Running {
        let mut variables = vec![
            ("DATABASE_URL", self.database.url()),
            ("REDIS_URL", &self.redis_url),
            ("RELAY_REDIS_STREAM", &self.stream),
        ];
        // A later variable overrides an earlier one.
        variables.extend(more);
        Running::start(program(args, &variables))
    }

    fn length(&self) -> usize {
        stream::length(&mut stream::connect(&self.redis_url), &self.stream)
    }

    /// All events arrived, each key's in order, and are logged. Returns how many arrived again.
    async fn assert_delivered(&self, events: i64) -> usize {
        let entries = stream::entries(&mut stream::connect(&self.redis_url), &self.stream);
        let arrived = entries.iter().map(|entry| (entry.fields["subject"].clone(), entry.sequence()));
        let (distinct, repeats) = assert_first_in_order(arrived);
        assert_eq!(distinct, usize::try_from(events).unwrap(), "events that arrived");
        assert_logged_once(&mut self.connect().await, events).await;
        repeats
    }
}

/// Stops the relay with SIGTERM.
#[track_caller]
fn stop(running: Running) {
    running.signal("TERM");
    running.finish().exited(0);
}
