//! The plans of the relay's statements, as the server logged them while a relay drained.

use super::value;
use crate::binary::finished;
use crate::harness::sql;
use crate::servers::{Server, database_on};

const EVENTS: usize = 100_000;
const BATCH: f64 = 1000.0;

/// The plans that auto_explain logged, each with its statement.
async fn logged_plans(connection: &mut sqlx::PgConnection) -> Vec<String> {
    let log: String = value(connection, "select pg_read_file(pg_current_logfile())").await;
    log.split("Query Text: ").skip(1).map(str::to_owned).collect()
}

/// How many rows the first node of this kind returned, over all its loops.
fn rows_of(plan: &str, node: &str) -> f64 {
    let line = plan.lines().find(|line| line.contains(node)).unwrap();
    let (_, actual) = line.split_once("(actual ").unwrap();
    let number = |name: &str| -> f64 {
        let (_, rest) = actual.split_once(name).unwrap();
        rest.split([' ', ')']).next().unwrap().parse().unwrap()
    };
    number("rows=") * number("loops=")
}

#[tokio::test]
async fn with_100000_rows_the_claim_reads_by_the_primary_key() {
    let options = ["--fast"].into_iter().chain(
        [
            "session_preload_libraries=auto_explain",
            "auto_explain.log_min_duration=0",
            "auto_explain.log_analyze=on",
            "logging_collector=on",
            "autovacuum=off",
        ]
        .into_iter()
        .flat_map(|setting| ["--set", setting]),
    );
    let server = Server::start("postgres", &options.collect::<Vec<_>>());
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    sql(&mut connection, "set auto_explain.log_min_duration = -1").await;
    for analyzed in [false, true] {
        sql(
            &mut connection,
            &format!(
                "-- Few are large: batches are read in both ways.
                 insert into event_outbox (event_type, aggregate_type, aggregate_id, payload)
                 select 'order.created', 'order', (n % 1000)::text, to_jsonb(repeat('x', case n % 10000 when 0 then 3000 else 1 end))
                 from generate_series(1, {EVENTS}) n;
                 -- Some to look for behind which a key may wait, and which promotion passes by.
                 insert into event_outbox (event_type, aggregate_id, status, available_at, destination)
                 select 'waits', 'w' || n, 'scheduled', now() + interval '1 day', 'stdout' from generate_series(1, 1000) n"
            ),
        )
        .await;
        if analyzed {
            sql(&mut connection, "vacuum analyze event_outbox").await;
        }
        let variables = [
            ("DATABASE_URL", database.url()),
            ("RELAY_STDOUT", "true"),
            ("EVENT_OUTBOX_BATCH_SIZE", &BATCH.to_string()),
        ];
        let drained = finished(&["--once"], &variables).exited(3); // 3: some events wait
        assert_eq!(drained.stdout.lines().count(), EVENTS);

        let plans = logged_plans(&mut connection).await;
        for plan in &plans {
            assert!(!plan.contains("Seq Scan on event_outbox "), "analyzed {analyzed}:\n{plan}");
        }
        for (statement, index) in [
            ("pg_column_size(payload", "Index Scan using event_outbox_pkey on event_outbox"),
            ("bytes_before", "Index Scan using event_outbox_pkey on event_outbox"),
            ("pg_try_advisory_xact_lock('public.event_outbox'", "using event_outbox_pkey on event_outbox"),
            ("for update skip locked", "Index Scan using event_outbox_scheduled_idx on event_outbox"),
            (
                "select exists (select from public.event_outbox where status",
                "event_outbox_scheduled_idx on event_outbox",
            ),
        ] {
            let found: Vec<&String> = plans.iter().filter(|plan| plan.contains(statement)).collect();
            assert!(!found.is_empty(), "no plan was logged for {statement:?}");
            for plan in found {
                assert!(plan.contains(index), "analyzed {analyzed}:\n{plan}");
            }
        }
        for plan in plans.iter().filter(|plan| plan.contains("pg_column_size(payload")) {
            let read = rows_of(plan, "Index Scan using event_outbox_pkey");
            assert!(read < 1.1 * BATCH, "{read} rows read for a batch of {BATCH}:\n{plan}");
        }
        sql(&mut connection, "truncate event_outbox").await;
    }
}
