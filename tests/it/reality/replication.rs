//! Logical replication: change data capture beside the relay, and a copy to a new server for an upgrade.

use sqlx::PgConnection;

use crate::binary::finished;
use crate::harness::{Setup, column, count, eventually, refused, sql};
use crate::scripted::{Act, ScriptedSink};
use crate::servers::{Database, Server, database_on};
use crate::stores::{Client, Store};

fn publisher() -> Server {
    Server::start("postgres", &["--fast", "--set", "wal_level=logical"])
}

#[tokio::test(flavor = "multi_thread")]
async fn f70_with_all_tables_published_a_relay_claims_settles_promotes_and_redrives() {
    let server = publisher();
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    sql(&mut connection, "create publication everything for all tables").await;
    let check = [("DATABASE_URL", database.url()), ("RELAY_STDOUT", "true")];
    finished(&["check"], &check).exited(0);
    sql(
        &mut connection,
        "select emit_event('fine', aggregate_id => (n % 7)::text) from generate_series(1, 50) n;
         select emit_event('poison', aggregate_id => 'p'), emit_event('later', delay => '1 ms')",
    )
    .await;
    let sink = ScriptedSink::new(|event| if event.event_type == "poison" { Act::Refuse } else { Act::Accept });
    let running = Setup::new(&database, vec![("a", sink.clone())]).run();
    eventually("the poison is dead-lettered", async || count(&mut connection, "event_dead_letter").await == 1).await;
    sink.then(|_| Act::Accept);
    sql(&mut connection, "select redrive_dead_letter(id) from event_dead_letter").await;
    eventually("all is published", async || count(&mut connection, "event_outbox").await == 0).await;
    assert_eq!(sink.accepted().len(), 52);
    running.stop().await;
    // The application's own statements change waiting events.
    sql(
        &mut connection,
        "select emit_event('changed', delay => '1 hour');
         update event_outbox set priority = 3; update event_outbox set event_type = 'other'; delete from event_outbox",
    )
    .await;
}

/// The waiting events of a database, with their partitions.
async fn waiting(connection: &mut PgConnection) -> Vec<String> {
    let rows = "select row(partition, id, destination, event_id, event_type, status, attempts, payload)::text
                from event_outbox order by id, destination";
    column(connection, rows).await
}

async fn catches_up(old: &mut PgConnection, new: &mut PgConnection) {
    eventually("the new server has what the old one has", async || {
        let (there, here) = (waiting(old).await, waiting(new).await);
        there == here
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f70_a_subscription_takes_all_that_a_relay_does_and_a_relay_works_on_the_new_side() {
    let (old_server, new_server) = (publisher(), publisher());
    let (old, new) = (database_on(&old_server).await, database_on(&new_server).await);
    let (mut there, mut here) = (old.connect().await, new.connect().await);
    sql(&mut there, "select emit_event('before', delay => '1 hour') from generate_series(1, 20)").await;
    // A row older than the rules. Replicated rows are not checked against the rules.
    Database::unruled(&mut there, r#"insert into event_outbox (event_type, headers) values ('old', '{"ID": "x"}')"#)
        .await;
    sql(&mut there, "create publication everything for all tables").await;
    sql(&mut here, &format!("create subscription copy connection '{}' publication everything", old.url())).await;
    catches_up(&mut there, &mut here).await;

    // A running relay inserts, retries, promotes, parks copies, dead-letters and deletes.
    let sink = ScriptedSink::new(|event| match event.attempts {
        0 if event.event_type == "retried" => Act::Refuse,
        _ if event.event_type == "poison" => Act::Refuse,
        _ => Act::Accept,
    });
    let down = ScriptedSink::new(|event| if event.event_type == "parked" { Act::Unreachable } else { Act::Accept });
    let running = Setup::new(&old, vec![("a", sink.clone()), ("b", down.clone())]).run();
    for round in 0..5 {
        sql(
            &mut there,
            &format!(
                "select emit_event(t, aggregate_id => n::text, delay => d * interval '1 ms')
                 from generate_series(1, 20) n, unnest(array['fine', 'retried']) t, unnest(array[0, {round}]) d;
                 select emit_event('poison')"
            ),
        )
        .await;
    }
    eventually("the poison is dead-lettered", async || {
        count(&mut there, "event_dead_letter where error_code <> 'header_name_reserved'").await >= 5
    })
    .await;
    sql(&mut there, "select emit_event('parked', aggregate_id => 'p') from generate_series(1, 10)").await;
    sql(&mut there, "select redrive_dead_letter(id) from event_dead_letter where event_type = 'poison'").await;
    sql(&mut there, "select pause_destination('a')").await;
    sql(&mut there, "select resume_destination('a')").await;
    eventually("what can be published is", async || {
        count(&mut there, "event_outbox where event_type in ('fine', 'retried', 'poison')").await == 0
    })
    .await;
    running.stop().await;
    assert_eq!(count(&mut there, "event_outbox where event_type = 'before'").await, 20);
    catches_up(&mut there, &mut here).await;
    let dead = "select row(id, event_id, error_code, redriven_at)::text from event_dead_letter order by id";
    let expected = column(&mut there, dead).await;
    eventually("the dead letters too", async || column(&mut here, dead).await == expected).await;
    assert_eq!(
        count(&mut here, "pg_stat_subscription where subname = 'copy' and pid is not null").await,
        1,
        "the subscription works on"
    );

    // The new server takes over.
    sql(&mut here, "alter subscription copy disable").await;
    sql(&mut here, "alter subscription copy set (slot_name = none)").await;
    sql(&mut here, "drop subscription copy").await;
    let variables = [("DATABASE_URL", new.url()), ("RELAY_STDOUT", "true")];
    // Rows owed to `b` were copied too. The check fails for them as well, because this relay has no such destination.
    let cure = || {
        let check = finished(&["check"], &variables).exited(1).stdout;
        check.lines().find(|line| line.contains("setval(")).map(str::to_owned)
    };
    let line = cure().unwrap();
    let (_, statement) = line.rsplit_once("; ").unwrap();
    assert!(statement.starts_with("select pg_catalog.setval('public.event_outbox_id_seq', "), "{line}");
    sql(&mut here, statement).await;
    assert_eq!(cure(), None);
    let highest = here.number("select max(id) from event_outbox").await;
    sql(&mut here, "select emit_event('after', aggregate_id => 'p')").await;
    assert!(here.number("select max(id) from event_outbox").await > highest);
    sql(&mut here, "update event_outbox set available_at = now()").await;
    let (sink, other) = (ScriptedSink::accepting(), ScriptedSink::accepting());
    Setup::new(&new, vec![("a", sink.clone()), ("b", other.clone())]).drain().await;
    assert_eq!(count(&mut here, "event_outbox").await, 0);
    let of_key = |sink: &ScriptedSink| -> Vec<String> {
        sink.accepted()
            .into_iter()
            .filter(|event| event.aggregate_id.as_deref() == Some("p"))
            .map(|e| e.event_type)
            .collect()
    };
    let parked = vec!["parked".to_owned(); 10];
    assert_eq!(of_key(&other), [parked, vec!["after".to_owned()]].concat());
    assert_eq!(of_key(&sink).last().map(String::as_str), Some("after"));
}

#[tokio::test]
async fn f70_whatever_a_statement_says_a_row_lies_in_its_partition_and_keeps_its_rules() {
    let server = publisher();
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_id, partition) values ('a', '42', 7), ('a', '42', null), ('a', '42', 1279);
         update event_outbox set partition = 3 where id = 2;
         insert into event_outbox (event_type, aggregate_id) values ('a', '42')",
    )
    .await;
    assert_eq!(connection.number("select count(distinct partition) from event_outbox").await, 1);
    let moved = "select count(distinct partition) from event_outbox where partition between 1088 and 1151";
    sql(&mut connection, "update event_outbox set status = 'scheduled', priority = 2, partition = 0").await;
    assert_eq!(connection.number(moved).await, 1);
    // This also holds for a session in which ordinary triggers do not fire.
    sql(&mut connection, "set session_replication_role = replica; update event_outbox set status = 'pending'").await;
    sql(&mut connection, "insert into event_outbox (event_type, aggregate_id, priority) values ('a', '42', 2)").await;
    assert_eq!(connection.number("select count(distinct partition) from event_outbox").await, 1);
    sql(&mut connection, "reset session_replication_role").await;
    let words = refused(&mut connection, "update event_outbox set priority = 10").await;
    assert!(words.contains("priority_is_0_to_9"), "{words}");
}
