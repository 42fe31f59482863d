//! Migrations, in each way of applying them.

use std::path::PathBuf;

use outbox_relay::outbox::postgres::migrate::SCHEMA_VERSION;

use super::{DEAD_LETTER, try_execute, value, values};
use crate::binary::{Running, drain, finished, relay};
use crate::harness::{eventually, sql};
use crate::servers::{Database, database, empty_database};

fn files() -> Vec<PathBuf> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/postgres");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// The names of all migrations, in order.
fn names() -> Vec<String> {
    files().iter().map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

fn migrate(url: &str) -> String {
    finished(&["migrate"], &[("DATABASE_URL", url)]).exited(0).stdout
}

#[tokio::test]
async fn migrating_twice_applies_every_migration_once() {
    let database = empty_database().await;
    let applied: String = names().iter().map(|name| format!("applied {name}\n")).collect();
    assert_eq!(migrate(database.url()), format!("{applied}schema version {SCHEMA_VERSION}\n"));
    assert_eq!(migrate(database.url()), format!("schema version {SCHEMA_VERSION}, nothing to do\n"));
}

#[tokio::test]
async fn of_several_migrations_at_once_all_succeed_and_each_step_is_applied_once() {
    for count in [2, 5] {
        let database = empty_database().await;
        let variables = [("DATABASE_URL", database.url())];
        let all: Vec<Running> = (0..count).map(|_| Running::start(relay(&["migrate"], &variables))).collect();
        let said: String = all.into_iter().map(|one| one.finish().exited(0).stdout).collect();
        let mut applied: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("applied ")).collect();
        applied.sort_unstable();
        assert_eq!(applied, names(), "{count} at the same time");
    }
}

#[tokio::test]
async fn a_migration_that_waited_for_another_sees_what_that_one_did() {
    let database = empty_database().await;
    let mut other = database.connect().await;
    sql(&mut other, "begin; select pg_advisory_xact_lock(7233173, 1)").await;
    let waiting = Running::start(relay(&["migrate"], &[("DATABASE_URL", database.url())]));
    eventually("the migration waits", async || {
        value(
            &mut other,
            "select exists (select from pg_locks where locktype = 'advisory' and classid = 7233173 and not granted)",
        )
        .await
    })
    .await;
    for file in files() {
        sql(&mut other, &std::fs::read_to_string(file).unwrap()).await;
    }
    sql(&mut other, "commit").await;
    assert_eq!(waiting.finish().exited(0).stdout, format!("schema version {SCHEMA_VERSION}, nothing to do\n"));
}

#[tokio::test]
async fn f22_a_relay_waits_for_the_first_migration_and_works_through_the_next() {
    let database = empty_database().await;
    let mut connection = database.connect().await;
    let variables =
        [("DATABASE_URL", database.url()), ("RELAY_STDOUT", "true"), ("EVENT_OUTBOX_POLLING_INTERVAL", "100")];
    let mut running = Running::start(relay(&[], &variables));
    running.until_log("run `relay migrate`");
    assert!(migrate(database.url()).contains("applied 0006_operator_views"));
    for event_type in ["first", "second"] {
        sql(&mut connection, &format!("select emit_event('{event_type}')")).await;
        eventually("it is published", async || {
            value::<i64>(&mut connection, "select count(*) from event_outbox").await == 0
        })
        .await;
        assert_eq!(migrate(database.url()), format!("schema version {SCHEMA_VERSION}, nothing to do\n"));
    }
    running.signal("TERM");
    assert_eq!(running.finish().exited(0).stdout.lines().count(), 2);
}

#[tokio::test]
async fn other_tables_and_another_migrator_are_left_alone() {
    let database = empty_database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "create table orders (id bigint primary key);
         insert into orders values (42);
         create table _sqlx_migrations (
             version bigint primary key, description text not null, installed_on timestamptz not null default now(),
             success boolean not null, checksum bytea not null, execution_time bigint not null
         );
         insert into _sqlx_migrations values (1, 'orders', now(), true, '\\x00', 1);
         create function schema_version() returns integer language sql as 'select 17'",
    )
    .await;
    migrate(database.url());
    let theirs: Vec<String> = values(
        &mut connection,
        "select row(version, description, success)::text from _sqlx_migrations
         union all select id::text from orders union all select schema_version()::text order by 1",
    )
    .await;
    assert_eq!(theirs, ["(1,orders,t)", "17", "42"]);
    sql(&mut connection, "select emit_event('order.created')").await;
    assert_eq!(drain(database.url()).len(), 1);
}

/// The database's URL with this search path.
fn in_schema(database: &Database, search_path: &str) -> String {
    format!("{}?options=-csearch_path%3D{search_path}", database.url())
}

#[tokio::test]
async fn the_tables_may_lie_in_other_schemas_by_the_urls_search_path() {
    let database = database().await; // the tables in public stay independent
    let mut connection = database.connect().await;
    for (schema, search_path) in [("shop", "shop"), ("\"Other Shop\"", "%22Other%5C%20Shop%22")] {
        sql(&mut connection, &format!("create schema {schema}")).await;
        let url = in_schema(&database, search_path);
        assert!(migrate(&url).starts_with("applied 0001_event_outbox\n"));

        // From here on the session's search path does not have the schema.
        sql(&mut connection, &format!("insert into {schema}.event_outbox (event_type) values ('here')")).await;
        let published = drain(&url);
        assert_eq!(published.len(), 1);
        assert_eq!(published[0]["type"], "here");
        let logged: i64 = value(&mut connection, &format!("select count(*) from {schema}.event_processing_log")).await;
        assert_eq!(logged, 1);

        let added = format!("select {schema}.relay_add_days('event_processing_log', 8)");
        assert!(value::<i32>(&mut connection, &added).await >= 1);
        let dead_letter = DEAD_LETTER.replace("event_dead_letter", &format!("{schema}.event_dead_letter"));
        sql(
            &mut connection,
            format!("{dead_letter}; select {schema}.redrive_dead_letter(max(id)) from {schema}.event_dead_letter"),
        )
        .await;
        assert_eq!(drain(&url)[0]["type"], "dead");
    }
    let in_public: i64 = value(
        &mut connection,
        "select (select count(*) from public.event_processing_log) + (select count(*) from public.event_dead_letter)",
    )
    .await;
    assert_eq!(in_public, 0);
}

#[tokio::test]
async fn the_files_may_be_applied_by_any_tool() {
    let database = empty_database().await;
    let mut connection = database.connect().await;
    for file in files() {
        sql(&mut connection, &std::fs::read_to_string(file).unwrap()).await;
    }
    assert_eq!(migrate(database.url()), format!("schema version {SCHEMA_VERSION}, nothing to do\n"));
    sql(&mut connection, "select emit_event('order.created')").await;
    assert_eq!(drain(database.url())[0]["type"], "order.created");
}

/// A database with all migrations but the last.
async fn last_version() -> Database {
    let database = empty_database().await;
    let mut connection = database.connect().await;
    for file in &files()[..files().len() - 1] {
        sql(&mut connection, &std::fs::read_to_string(file).unwrap()).await;
    }
    database
}

#[tokio::test]
async fn events_that_wait_during_a_migration_keep_their_places() {
    let database = last_version().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_type, aggregate_id, priority, status)
         select 'waits', case n % 2 when 0 then 'order' end, nullif(n % 50, 0)::text, n % 10,
                case n % 3 when 0 then 'scheduled' else 'pending' end
         from generate_series(1, 1000) n",
    )
    .await;
    let rows = "select row(id, event_id, partition, status, created_at)::text from event_outbox order by id";
    let before: Vec<String> = values(&mut connection, rows).await;
    migrate(database.url());
    let after: Vec<String> = values(&mut connection, rows).await;
    assert_eq!((before.len(), after), (1000, before));
}

#[tokio::test]
async fn an_older_schema_asks_for_relay_migrate() {
    let database = last_version().await;
    let variables = [("DATABASE_URL", database.url()), ("RELAY_STDOUT", "true"), ("RELAY_LOG", "error")];
    let once = finished(&["--once"], &variables).exited(1);
    let check = finished(&["check"], &variables).exited(1);
    let mut running = Running::start(relay(&["run", "--log", "info"], &variables));
    running.until_log("run `relay migrate`"); // and does not exit, because the migration may still come
    for said in [once.complaint(), check.stdout.as_str(), &running.log()] {
        let found = format!("schema version {}, ", SCHEMA_VERSION - 1);
        let needed = format!("needs {SCHEMA_VERSION}: run `relay migrate`");
        assert!(said.contains(&found) && said.contains(&needed), "{said}");
    }
    let last = names().pop().unwrap();
    assert_eq!(migrate(database.url()), format!("applied {last}\nschema version {SCHEMA_VERSION}\n"));
    running.until_log("\"message\":\"ready\"");
    drop(running);
    finished(&["check"], &variables).exited(0);
    finished(&["--once"], &variables).exited(0);
}

#[tokio::test]
async fn tables_that_are_there_but_not_on_the_search_path_are_told_from_missing_ones() {
    let database = database().await;
    sql(&mut database.connect().await, "create schema empty").await;
    let url = in_schema(&database, "empty");
    let variables = [("DATABASE_URL", url.as_str()), ("RELAY_STDOUT", "true"), ("RELAY_LOG", "error")];
    let once = finished(&["--once"], &variables).exited(1);
    let check = finished(&["check"], &variables).exited(1);
    for said in [once.complaint(), check.stdout.as_str()] {
        assert!(said.contains("schema public, which is not on the search path"), "{said}");
    }
}

#[tokio::test]
async fn a_migration_that_fails_leaves_nothing_half_done() {
    let database = empty_database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, "create table event_dead_letter (theirs text)").await;
    let failed = finished(&["migrate"], &[("DATABASE_URL", database.url())]).exited(1);
    assert!(failed.complaint().contains("\"event_dead_letter\" already exists"), "{}", failed.stderr);
    assert_eq!(value::<i32>(&mut connection, "select relay_schema_version()").await, 2);
    sql(&mut connection, "drop table event_dead_letter").await;
    assert!(migrate(database.url()).starts_with("applied 0003_event_dead_letter\n"));
    assert!(try_execute(&mut connection, "table event_history").await.is_ok());
}
