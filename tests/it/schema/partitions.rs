//! The 64 hash partitions of a priority.

use super::{value, values};
use crate::harness::sql;
use crate::servers::database;

#[tokio::test]
async fn each_priority_has_64_partitions_and_the_urgent_ones_come_first() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_id, priority, status)
         select 'a', n::text, p, s
         from generate_series(1, 2000) n, generate_series(0, 9) p, unnest(array['pending', 'scheduled']) s",
    )
    .await;
    let found: Vec<String> = values(
        &mut connection,
        "select concat_ws('|', status, priority, count(distinct partition), min(partition), max(partition))
         from event_outbox group by status, priority order by status, priority",
    )
    .await;
    let expected: Vec<String> = [("pending", 0), ("scheduled", 640)]
        .into_iter()
        .flat_map(|(status, base)| {
            (0..10).map(move |priority| {
                let first = base + (9 - priority) * 64;
                format!("{status}|{priority}|64|{first}|{}", first + 63)
            })
        })
        .collect();
    assert_eq!(found, expected);
    let apart: i64 = value(
        &mut connection,
        "select count(*) from (
             select from event_outbox group by aggregate_id having count(distinct partition % 64) > 1
         ) keys",
    )
    .await;
    assert_eq!(apart, 0, "a key has the same hash for every priority and status");
}

#[tokio::test]
async fn both_halves_of_the_key_count_and_a_null_type_is_an_empty_one() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_type, aggregate_id)
         select 'a', t, n::text from generate_series(1, 1000) n, unnest(array['order', 'invoice', '', null]) t",
    )
    .await;
    let same = |one: &str, other: &str| {
        format!(
            "select count(*) from event_outbox a join event_outbox b using (aggregate_id, partition)
             where a.aggregate_type {one} and b.aggregate_type {other}"
        )
    };
    let by_chance: i64 = value(&mut connection, &same("= 'order'", "= 'invoice'")).await;
    assert!(by_chance < 100, "{by_chance} of 1000 pairs share a partition, but a 64th should");
    assert_eq!(value::<i64>(&mut connection, &same("= ''", "is null")).await, 1000);
}

#[tokio::test]
async fn keyless_events_are_spread_over_all_partitions() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_type) select 'a', 'order' from generate_series(1, 6400)",
    )
    .await;
    let sizes: Vec<i64> =
        values(&mut connection, "select count(*) from event_outbox group by partition order by 1").await;
    assert_eq!(sizes.len(), 64);
    assert!(sizes[0] > 50 && sizes[63] < 180, "each partition should have about 100: {sizes:?}");
}
