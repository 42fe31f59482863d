//! What the metrics say of a store: the lag of events, and what waits in it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use outbox_relay::outbox::sample::{DestinationSample, Sample, Sampling};
use outbox_relay::outbox::{Operate, OutboxConfig};
use outbox_relay::secret::Secret;
use tokio_util::sync::CancellationToken;

use super::{STDOUT, Served};
use crate::harness::{Setup, emit, eventually, sql};
use crate::scripted::ScriptedSink;
use crate::servers::database;
use crate::stores::{Postgres, Sqlite, Store};

/// The figure of one series.
#[track_caller]
fn figure(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.and_then(|figure| figure.parse().ok()).unwrap_or_else(|| panic!("{series} is missing in\n{text}"))
}

async fn the_lag_counts_from_the_commit_or_from_the_time_of_a_delayed_event<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for (created, available) in [(-100_000, -100_000), (-3_600_000, -8000), (0, 0)] {
        let (created, available) = (S::in_ms(created), S::in_ms(available));
        let values = format!("'e', {created}, {available}");
        sql(
            &mut connection,
            format!("insert into event_outbox (event_type, created_at, available_at) values ({values})"),
        )
        .await;
    }
    let relay = Setup::new(&store, vec![("a", ScriptedSink::accepting())]).relay();
    relay.drain(CancellationToken::new()).await.unwrap();
    let text = relay.metrics().encode();
    let bucket =
        |le: &str| figure(&text, &format!("outbox_relay_lag_seconds_bucket{{le=\"{le}\",destination=\"a\"}}")) as u64;
    let counts = ["5.0", "10.0", "30.0", "60.0", "300.0", "+Inf"].map(bucket);
    assert!(counts == [1, 2, 2, 2, 3, 3] || counts == [1, 1, 2, 2, 3, 3], "{counts:?}\n{text}");
    let sum = figure(&text, "outbox_relay_lag_seconds_sum{destination=\"a\"}");
    assert!((108.0..170.0).contains(&sum), "{sum}");
}

#[tokio::test]
async fn the_lag_is_by_the_clock_of_the_database() {
    the_lag_counts_from_the_commit_or_from_the_time_of_a_delayed_event::<Postgres>().await;
    the_lag_counts_from_the_commit_or_from_the_time_of_a_delayed_event::<Sqlite>().await;
}

fn outbox<S: Store>(store: &S) -> S::Outbox {
    S::outbox(OutboxConfig { worker: "test:1".to_owned(), ..OutboxConfig::new(Secret::inline(store.url())) })
}

/// The figures, which this outbox must be the one to get.
async fn taken(outbox: &impl Operate, names: &[String]) -> Sample {
    match outbox.sample(names).await.unwrap() {
        Sampling::Taken(sample) => sample,
        other => panic!("it did not sample: {other:?}"),
    }
}

fn of<'a>(sample: &'a Sample, name: &str) -> &'a DestinationSample {
    sample.destinations.iter().find(|there| there.name == name).unwrap()
}

/// Rows of the outbox, as a relay leaves them.
async fn wait<S: Store>(connection: &mut S::Connection, destination: &str, available: &str, more: (&str, &str)) {
    let (columns, values) = more;
    let insert = format!(
        "insert into event_outbox (event_type, status, destination, created_at, available_at, aggregate_type, aggregate_id{columns})
         values ('e', 'scheduled', '{destination}', {}, {available}, 'order', '7'{values})",
        S::in_ms(-90_000)
    );
    sql(connection, insert).await;
}

async fn what_waits_is_sampled_by_destination<S: Store>(forever: &str) {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let outbox = outbox(&store);
    let names = ["a".to_owned(), "b".to_owned()];
    let empty = taken(&outbox, &names).await;
    assert_eq!(empty.destinations.iter().map(|there| there.name.as_str()).collect::<Vec<_>>(), ["", "a", "b"]);
    for there in &empty.destinations {
        assert_eq!(*there, DestinationSample { name: there.name.clone(), ..DestinationSample::default() });
    }

    let pending = format!(
        "insert into event_outbox (event_type, available_at) select 'e', {} from {}",
        S::in_ms(-20_000),
        S::numbers(3)
    );
    sql(&mut connection, pending).await;
    let failed = (", attempts, last_error, first_failed_at", format!(", 1, 'X: no', {}", S::in_ms(-60_000)));
    wait::<S>(&mut connection, "", &S::in_ms(60_000), ("", "")).await; // delayed
    wait::<S>(&mut connection, "a", &S::in_ms(-1000), ("", "")).await; // for its destination
    for _ in 0..2 {
        wait::<S>(&mut connection, "a", &S::in_ms(60_000), (failed.0, &failed.1)).await;
        wait::<S>(&mut connection, "a", &S::in_ms(60_000), ("", "")).await; // behind it
    }
    wait::<S>(&mut connection, "b", &format!("'{forever}'"), (failed.0, &failed.1)).await; // parked
    wait::<S>(&mut connection, "elsewhere", &S::in_ms(-1000), ("", "")).await; // another relay's
    let sample = taken(&outbox, &names).await;
    let counts = |name| {
        let there = of(&sample, name);
        [there.pending, there.retrying, there.waiting_behind, there.parked, there.blocked_keys]
    };
    assert_eq!(counts(""), [3, 0, 1, 0, 0]);
    assert_eq!(counts("a"), [1, 2, 2, 0, 1]);
    assert_eq!(counts("b"), [0, 0, 0, 1, 0]);
    let due = ["", "a", "b"].map(|name| of(&sample, name).oldest_due.as_secs());
    assert!((20..60).contains(&due[0]) && (90..150).contains(&due[1]) && due[2] == 0, "{due:?}");

    let many = format!("insert into event_outbox (event_type) select 'e' from {}", S::numbers(5000));
    sql(&mut connection, many).await;
    let capped = taken(&outbox, &names).await;
    assert!((900..=1100).contains(&of(&capped, "").pending), "{}", of(&capped, "").pending);
}

#[tokio::test]
async fn what_waits_is_sampled_and_counts_have_an_end() {
    what_waits_is_sampled_by_destination::<Postgres>("infinity").await;
    what_waits_is_sampled_by_destination::<Sqlite>("9999-12-31 23:59:59").await;
}

async fn one_relay_samples_for_all_and_another_takes_over<S: Store>() {
    let store = S::new().await;
    let (first, second) = (outbox(&store), outbox(&store));
    for _ in 0..2 {
        taken(&first, &[]).await;
        assert_eq!(second.sample(&[]).await.unwrap(), Sampling::ByAnother);
    }
    drop(first);
    eventually("the other takes over", async || matches!(second.sample(&[]).await.unwrap(), Sampling::Taken(_))).await;
}

#[tokio::test]
async fn one_relay_samples_for_all() {
    one_relay_samples_for_all_and_another_takes_over::<Postgres>().await;
    one_relay_samples_for_all_and_another_takes_over::<Sqlite>().await;
}

#[tokio::test]
async fn the_database_tells_who_holds_the_oldest_snapshot_and_what_maintenance_has_done() {
    let database = database().await;
    let mut holder = database.connect().await;
    sql(&mut holder, "set application_name = 'nightly \"report\"'; begin isolation level repeatable read; select 1")
        .await;
    tokio::time::sleep(Duration::from_millis(1100)).await; // the age of the snapshot
    let outbox = outbox(&database);
    outbox.maintain().await.unwrap();
    let sample = taken(&outbox, &[]).await.database;
    assert_eq!(sample.snapshot_holder.as_deref(), Some("nightly \"report\""));
    assert!(sample.oldest_snapshot >= Duration::from_secs(1) && sample.oldest_snapshot < Duration::from_secs(100));
    assert_eq!(sample.days_ahead, 7);
    sql(&mut holder, "rollback").await;
    eventually("the snapshot is gone", async || {
        taken(&outbox, &[]).await.database.snapshot_holder.as_deref() != Some("nightly \"report\"")
    })
    .await;
}

#[tokio::test]
async fn a_lock_on_the_table_holds_up_a_sample_for_a_second_and_the_limits_of_the_session_come_back() {
    let database = database().await;
    let mut holder = database.connect().await;
    let outbox = outbox(&database);
    taken(&outbox, &[]).await;
    sql(&mut holder, "begin; lock table event_outbox in access exclusive mode").await;
    let begun = Instant::now();
    let refused = outbox.sample(&[]).await;
    assert!(refused.is_err() && begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    sql(&mut holder, "rollback").await;
    // The session whose limits were changed is gone.
    eventually("it samples again", async || matches!(outbox.sample(&[]).await, Ok(Sampling::Taken(_)))).await;
}

/// The names of all metrics that are exported, as in a query.
fn exported(text: &str) -> BTreeSet<String> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let named = types.map(|line| {
        let (name, kind) = line.split_once(' ').unwrap();
        match kind {
            "counter" => format!("{name}_total"),
            "info" => format!("{name}_info"),
            _ => name.to_owned(),
        }
    });
    named.collect()
}

#[tokio::test]
async fn a_relay_that_serves_exports_every_metric_of_the_guide_and_no_other() {
    let database = database().await;
    let mut connection = database.connect().await;
    let relay = Served::start(&[("DATABASE_URL", database.url()), STDOUT]);
    relay.until("/metrics", 200, "outbox_relay_sampling 1\n");
    emit(&mut connection, "a", "").await;
    let text = relay.until("/metrics", 200, "outbox_relay_lag_seconds_count{destination=\"stdout\"} 1\n").body;
    assert!(figure(&text, "outbox_relay_resident_memory_bytes") > 1e6);
    assert!(figure(&text, "outbox_relay_start_timestamp_seconds") > 1e9);
    assert!((figure(&text, "outbox_relay_days_ahead") - 7.0).abs() < 0.1);
    let guide = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/metrics.md")).unwrap();
    let in_guide: BTreeSet<String> = guide
        .lines()
        .filter_map(|line| line.strip_prefix("| `outbox_relay_")?.split('`').next())
        .map(|name| format!("outbox_relay_{name}"))
        .collect();
    assert_eq!(exported(&text), in_guide);
    for line in text.lines().filter(|line| line.starts_with("outbox_relay_")) {
        for label in
            line.split_once('{').map_or("", |(_, labels)| labels).split(',').filter(|label| label.contains('='))
        {
            let name = label.split('=').next().unwrap();
            let known = ["destination", "verdict", "code", "le", "version", "application"];
            assert!(known.contains(&name), "{line}");
        }
    }
    let mut fastest = Duration::MAX;
    for _ in 0..20 {
        let begun = Instant::now();
        relay.get("/metrics");
        fastest = fastest.min(begun.elapsed());
    }
    println!("{} bytes, a scrape takes {fastest:?}", text.len());
    assert!(fastest < Duration::from_millis(50), "{fastest:?}");
}

#[tokio::test]
async fn a_cause_that_keeps_events_from_moving_is_a_metric_by_its_code() {
    let database = database().await;
    let mut connection = database.connect().await;
    let relay = Served::start(&[("DATABASE_URL", database.url()), STDOUT]);
    relay.until("/metrics", 200, "outbox_relay_standstills{code=\"destination_unconfigured\"} 0\n");
    let owed = "insert into event_outbox (event_type, status, destination) values ('e', 'scheduled', 'gone')";
    sql(&mut connection, owed).await;
    relay.until("/metrics", 200, "outbox_relay_standstills{code=\"destination_unconfigured\"} 1\n");
    sql(&mut connection, "delete from event_outbox").await;
    relay.until("/metrics", 200, "outbox_relay_standstills{code=\"destination_unconfigured\"} 0\n");
}
