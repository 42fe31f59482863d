//! F20: a PgBouncer that gives each transaction another server connection.

use sqlx::{Connection, PgConnection, Row};

use crate::binary::{Running, finished, relay};
use crate::harness::{column, count, eventually, sql};
use crate::servers::{database, pgbouncer, postgres, redis};
use crate::stream;
use crate::support::unique;

#[tokio::test(flavor = "multi_thread")]
async fn f20_eight_lanes_behind_two_pooled_connections_publish_everything_once_and_leave_nothing_behind() {
    const EVENTS: i64 = 4000;
    let database = database().await;
    let (_, name) = database.url().rsplit_once('/').unwrap();
    let pool = pgbouncer(postgres());
    let (base, _) = pool.url().rsplit_once('/').unwrap();
    let (pooled, stream) = (format!("{base}/{name}"), unique("pooled"));
    let variables = [
        ("DATABASE_URL", pooled.as_str()),
        ("RELAY_DATABASE_POOLED", "true"),
        ("REDIS_URL", redis().url()),
        ("RELAY_REDIS_STREAM", &stream),
        ("RELAY_LANES", "8"),
        ("EVENT_OUTBOX_BATCH_SIZE", "100"),
        ("EVENT_OUTBOX_POLLING_INTERVAL", "50"),
    ];
    let mut connection = database.connect().await;
    let insert = |events: i64| {
        format!(
            "insert into event_outbox (event_type, aggregate_id, payload)
             select 'a', 'k' || i % 100, to_jsonb(i) from generate_series(1, {events}) i"
        )
    };
    finished(&["check"], &variables).exited(0);
    let running = Running::start(relay(&["run"], &variables));
    for _ in 0..4 {
        sql(&mut connection, insert(EVENTS / 4)).await;
        eventually("everything is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    }
    running.signal("TERM");
    running.finish().exited(0);
    let entries = stream::entries(&mut stream::connect(redis().url()), &stream);
    let sequences: Vec<i64> = entries.iter().map(stream::Entry::sequence).collect();
    for key in 0..100 {
        let of_key = sequences.iter().filter(|sequence| **sequence % 100 == key);
        assert!(of_key.is_sorted(), "key {key}");
    }
    let mut all = sequences;
    all.sort_unstable();
    assert_eq!(all, (1..=EVENTS).collect::<Vec<_>>());

    // Other clients use the pool's connections now. At most two were open, and nothing of the relay's is left in them.
    let sessions = "pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()";
    assert!(count(&mut connection, sessions).await <= 2);
    assert_eq!(count(&mut connection, &format!("{sessions} and state <> 'idle'")).await, 0);
    let own = "pg_locks where locktype = 'advisory' and database = (select oid from pg_database where datname = current_database())";
    assert_eq!(count(&mut connection, own).await, 0);
    let left = "select concat_ws(' ', (select count(*) from pg_prepared_statements), (select count(*) from pg_cursors),
                                 (select count(*) from pg_listening_channels()),
                                 (select count(*) from pg_class where relpersistence = 't'),
                                 (select string_agg(name, ',' order by name) from pg_settings
                                  where source = 'session' and name not in ('application_name', 'client_encoding',
                                        'DateStyle', 'TimeZone', 'standard_conforming_strings')))";
    for _ in 0..4 {
        // It uses the simple protocol, so that it prepares no statement itself.
        let mut client = PgConnection::connect(&pooled).await.unwrap();
        let found = sqlx::raw_sql(left).fetch_one(&mut client).await.unwrap();
        assert_eq!(found.get::<String, _>(0), "0 0 0 0");
    }
    assert_eq!(column(&mut connection, "select distinct status from event_processing_log").await, ["published"]);
}
