//! What applications add to the relay's tables: it works, or the start and `relay check` refuse it with the reason.

use std::sync::Arc;

use outbox_relay::outbox::Usage;
use tokio_util::sync::CancellationToken;

use super::settle::failures;
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Act, ScriptedSink};
use crate::stores::{Client, Postgres, Sqlite, Store};

const ONE: Usage = Usage { several_destinations: false, history: false };
const SEVERAL: Usage = Usage { several_destinations: true, history: false };

/// Emits an event that `a` refuses once while `b` is down, so that its row is moved and copied.
async fn an_event_refused_by_two<S: Store>(store: &S, connection: &mut S::Connection) {
    let (a, b) = (ScriptedSink::new(|_| Act::Refuse), ScriptedSink::new(|_| Act::Refuse));
    let mut setup = Setup::new(store, vec![("a", Arc::clone(&a) as _), ("b", Arc::clone(&b) as _)]);
    setup.policy.retry.base = std::time::Duration::from_millis(300);
    let running = setup.run();
    let copies = "event_outbox where status = 'scheduled' and last_error is not null";
    eventually("it is owed to both", async || count(connection, copies).await == 2).await;
    a.then(|_| Act::Accept);
    b.then(|_| Act::Accept);
    eventually("both took it", async || count(connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert_eq!((a.accepted().len(), b.accepted().len()), (1, 1));
}

async fn what_was_added_travels_with_copies<S: Store>(additions: &str, insert: &str, copied: &str) {
    let store = S::new().await;
    let mut connection = store.connect().await;
    sql(&mut connection, additions).await;
    assert_eq!(failures(&store, SEVERAL).await, "");
    sql(&mut connection, insert).await;
    an_event_refused_by_two(&store, &mut connection).await;
    assert_eq!(column(&mut connection, copied).await, ["acme 2"], "each of two rows had the application's value");
}

#[tokio::test(flavor = "multi_thread")]
async fn f67_columns_of_the_application_travel_with_copies() {
    what_was_added_travels_with_copies::<Postgres>(
        "create table app_gone (tenant text, doubled text);
         create table app_tenant (name text primary key);
         insert into app_tenant values ('acme');
         alter table event_outbox add column \"Tenant Name\" text not null references app_tenant,
             add column doubled text generated always as (event_type || event_type) stored,
             add column format_of_mine text not null default 'x';
         create index on event_outbox (\"Tenant Name\", created_at);
         create unique index on event_outbox (event_id, destination);
         alter table event_outbox add exclude using btree (event_id with =, destination with =);
         create function keep() returns trigger language plpgsql as $$
         begin insert into app_gone values (old.\"Tenant Name\", old.doubled); return old; end $$;
         create trigger keep before delete on event_outbox for each row execute function keep()",
        "insert into event_outbox (event_type, \"Tenant Name\") values ('e', 'acme')",
        "select tenant || ' ' || count(*) from app_gone where doubled = 'ee' group by tenant",
    )
    .await;
    what_was_added_travels_with_copies::<Sqlite>(
        "create table app_gone (tenant text, doubled text);
         alter table event_outbox add column \"Tenant Name\" text;
         alter table event_outbox add column doubled text generated always as (event_type || event_type) virtual;
         create unique index mine on event_outbox (event_id, destination);
         create trigger mine after delete on event_outbox
         begin insert into app_gone values (old.\"Tenant Name\", old.doubled); end",
        "insert into event_outbox (event_type, \"Tenant Name\") values ('e', 'acme')",
        "select tenant || ' ' || count(*) from app_gone where doubled = 'ee' group by tenant",
    )
    .await;
}

/// A row that is moved is updated in place, so that one destination needs no second row.
async fn a_unique_event_id_works_with_one_destination_and_is_refused_with_two<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    sql(&mut connection, "create unique index mine on event_outbox (event_id)").await;
    assert_eq!(failures(&store, ONE).await, "");
    for index in 0..102 {
        emit(&mut connection, if index == 3 { "poison" } else { "e" }, &format!("k{}", index % 7)).await;
    }
    let sink = ScriptedSink::new(|event| if event.event_type == "poison" { Act::Refuse } else { Act::Accept });
    Setup::new(&store, vec![("a", Arc::clone(&sink) as _)]).drain().await;
    let running = Setup::new(&store, vec![("a", Arc::clone(&sink) as _)]).run();
    eventually("all is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert_eq!(sink.accepted().len(), 101, "nothing arrived twice");
    assert_eq!(count(&mut connection, "event_dead_letter where attempts = 4").await, 1);

    let failures = failures(&store, SEVERAL).await;
    assert!(failures.to_lowercase().contains("unique"), "{failures}");
    emit(&mut connection, "e", "").await;
    let relay = Setup::new(&store, vec![("a", Arc::clone(&sink) as _), ("b", Arc::clone(&sink) as _)]).relay();
    let error = relay.drain(CancellationToken::new()).await.unwrap_err().explain();
    assert!(error.to_lowercase().contains("unique"), "{error}");
    assert_eq!(sink.accepted().len(), 101);
}

#[tokio::test(flavor = "multi_thread")]
async fn f67_a_unique_event_id_works_with_one_destination_and_is_refused_with_two() {
    a_unique_event_id_works_with_one_destination_and_is_refused_with_two::<Postgres>().await;
    a_unique_event_id_works_with_one_destination_and_is_refused_with_two::<Sqlite>().await;
}

/// The table refuses a plain insert, so the proof uses existing rows.
#[tokio::test(flavor = "multi_thread")]
async fn f67_a_table_that_refuses_a_plain_insert_is_drained_and_swallowed_deletes_are_seen_all_the_same() {
    let store = Postgres::new().await;
    let mut connection = store.connect().await;
    sql(&mut connection, "alter table event_outbox add column tenant text not null").await;
    let insert = "insert into event_outbox (event_type, tenant) select 'e', 'acme' from generate_series(1, 10)";
    sql(&mut connection, insert).await;
    assert_eq!(failures(&store, ONE).await, "");
    let sink = ScriptedSink::accepting();
    assert!(!Setup::new(&store, vec![("a", sink.clone())]).drain().await.undelivered);
    assert_eq!(sink.accepted().len(), 10);
    sql(&mut connection, insert).await;
    sql(
        &mut connection,
        "create function gives_new() returns trigger language plpgsql as $$ begin return new; end $$;
         create trigger zz before delete on event_outbox for each row execute function gives_new()",
    )
    .await;
    assert!(failures(&store, ONE).await.contains("trigger zz on event_outbox"));
    let relay = Setup::new(&store, vec![("a", sink.clone())]).relay();
    assert!(relay.drain(CancellationToken::new()).await.is_err());
    assert_eq!(sink.accepted().len(), 10);
    assert_eq!(connection.number("select count(*) from event_outbox").await, 10);
}
