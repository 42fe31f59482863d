//! Functions use the schema of their table, whatever the caller's search path is, and wherever the schema was moved.

use crate::binary::{Running, cannot_work, drain, finished, relay, works};
use crate::harness::{count, refused, sql};
use crate::servers::{Database, database, empty_database};
use crate::stores::Client;

/// The database's URL with this search path, percent-encoded.
fn on_path(database: &Database, search_path: &str) -> String {
    format!("{}?options=-csearch_path%3D{search_path}", database.url())
}

/// Creates an outbox in each of these schemas, given as SQL and as a search path in a URL.
async fn outboxes(database: &Database, schemas: &[(&str, &str)]) {
    let mut connection = database.connect().await;
    for (schema, search_path) in schemas {
        sql(&mut connection, format!("create schema if not exists {schema}")).await;
        finished(&["migrate"], &[("DATABASE_URL", &on_path(database, search_path))]).exited(0);
    }
}

#[tokio::test]
async fn f72_every_function_and_trigger_works_in_its_own_schema_whatever_the_path() {
    let database = empty_database().await;
    let schemas = [("public", "public"), ("app", "app"), ("\"o'clock 100%\"", "%22o%27clock%5C%20100%25%22")];
    outboxes(&database, &schemas).await;
    let mut connection = database.connect().await;
    let dead_letter =
        "(outbox_id, event_id, event_type, source, payload, headers, schema_version, priority, created_at,
                        destination, attempts, error_code, error, first_failed_at)
         values (1, gen_random_uuid(), 'dead', '', '{}', '{}', 1, 0, now(), 'stdout', 1, 'X', 'x', now())";
    for (schema, _) in schemas {
        // A sequence that has given one value shows the same number as a new one.
        sql(
            &mut connection,
            format!(
                "select nextval('{0}.event_outbox_moves'), nextval('{0}.event_outbox_epoch')",
                schema.replace('\'', "''")
            ),
        )
        .await;
        // A function that followed the caller's search path would find another schema's table, or none.
        for path in ["public", "app", "pg_temp", "nowhere", "public, pg_catalog"] {
            sql(&mut connection, format!("set search_path = {path}; truncate {schema}.event_outbox")).await;
            let moves = format!("{schema}.event_outbox_moves");
            let epoch = format!("{schema}.event_outbox_epoch");
            let last = async |connection: &mut sqlx::PgConnection, sequence: &str| {
                connection.number(&format!("select last_value from {sequence}")).await
            };
            sql(&mut connection, format!("select {schema}.emit_event('a', '{{}}', delay => '1 hour')")).await;
            assert_eq!(count(&mut connection, &format!("{schema}.event_outbox")).await, 1, "{schema} by {path}");

            let before = last(&mut connection, &moves).await;
            sql(&mut connection, format!("update {schema}.event_outbox set status = 'pending'")).await;
            sql(&mut connection, format!("insert into {schema}.event_dead_letter {dead_letter}")).await;
            let redrive = format!(
                "select {schema}.redrive_dead_letter(id) from {schema}.event_dead_letter where redriven_at is null"
            );
            sql(&mut connection, redrive).await;
            assert_eq!(count(&mut connection, &format!("{schema}.event_outbox")).await, 2, "{schema} by {path}");
            assert_eq!(last(&mut connection, &moves).await, before + 2, "{schema} by {path}");

            let before = last(&mut connection, &epoch).await;
            sql(&mut connection, format!("select {schema}.relay_epoch_above(0)")).await;
            assert_eq!(last(&mut connection, &epoch).await, before + 1, "{schema} by {path}");

            let owed = format!("update {schema}.event_outbox set status = 'scheduled', destination = 'old'");
            sql(&mut connection, format!("{owed}; select {schema}.move_owed('old', 'new')")).await;
            let moved = format!("{schema}.event_outbox where destination = 'new'");
            assert_eq!(count(&mut connection, &moved).await, 2, "{schema} by {path}");
            sql(&mut connection, format!("select {schema}.give_up_owed('new')")).await;
            let given_up = format!("{schema}.event_dead_letter where error_code = 'given_up'");
            assert_eq!(count(&mut connection, &given_up).await, 2, "{schema} by {path}");
            sql(&mut connection, format!("delete from {schema}.event_dead_letter")).await;

            sql(&mut connection, format!("drop table if exists {schema}.event_history_20990101; create table {schema}.event_history_20990101
                partition of {schema}.event_history for values from ('2099-01-01 00:00:00+00') to ('2099-01-02 00:00:00+00')")).await;
            let days = "pg_catalog.pg_inherits where inhparent::regclass::text like '%event_history'";
            let all = count(&mut connection, days).await;
            sql(&mut connection, format!("create table {schema}.event_history_20000101
                partition of {schema}.event_history for values from ('2000-01-01 00:00:00+00') to ('2000-01-02 00:00:00+00')")).await;
            sql(&mut connection, format!("select {schema}.relay_drop_days('event_history', '1 day')")).await;
            assert_eq!(count(&mut connection, days).await, all, "{schema} by {path}");
            sql(&mut connection, format!("drop table {schema}.event_history_20990101")).await;
        }
        sql(&mut connection, "set search_path = public").await;
    }
    // Each relay publishes the events of its schema.
    for (schema, path) in schemas {
        sql(
            &mut connection,
            format!("truncate {schema}.event_outbox; select {schema}.emit_event('here', source => '/{path}')"),
        )
        .await;
    }
    for (_, path) in schemas {
        let published = drain(&on_path(&database, path));
        assert_eq!((published.len(), published[0]["source"].as_str()), (1, Some(format!("/{path}").as_str())));
    }
}

/// `--once`, `check` and a waiting daemon report these parts for this outbox. Then one `relay migrate` mends it.
fn is_mended_by_migrate(url: &str, parts: &[&str]) {
    let mut parts = parts.to_vec();
    parts.push("run `relay migrate`");
    cannot_work(url, &parts);
    let variables = [("DATABASE_URL", url), ("RELAY_STDOUT", "true")];
    let mut running = Running::start(relay(&[], &variables));
    for part in parts {
        running.until_log(part);
    }
    let migrated = finished(&["migrate"], &variables).exited(0).stdout;
    assert!(migrated.contains("made the functions anew for schema "), "{migrated}");
    running.until_log("\"message\":\"ready\"");
    let again = finished(&["migrate"], &variables).exited(0).stdout;
    assert!(again.ends_with(", nothing to do\n") && again.lines().count() == 1, "{again}");
    running.signal("TERM");
    running.finish().exited(0);
    works(url);
}

#[tokio::test]
async fn f72_a_renamed_schema_is_noticed_and_mended_by_migrate() {
    let database = empty_database().await;
    outboxes(&database, &[("app", "app")]).await;
    let mut connection = database.connect().await;
    sql(&mut connection, "select app.emit_event('before'); alter schema app rename to shop").await;
    let url = on_path(&database, "shop");
    is_mended_by_migrate(&url, &["the functions of schema shop still work in schema 'app'"]);
    sql(&mut connection, "select shop.emit_event('after'); select shop.relay_add_days('event_history', 9)").await;
    sql(&mut connection, "select shop.move_owed('old', 'new'); select shop.give_up_owed('old')").await;
    assert_eq!(
        count(&mut connection, "shop.event_outbox").await,
        1,
        "the other was published by the daemon, or this one waits"
    );
    assert_eq!(drain(&url)[0]["type"], "after");
}

#[tokio::test]
async fn f72_tables_that_were_moved_without_their_functions_are_noticed_and_mended_by_migrate() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, "create schema app; grant usage on schema app to public").await;
    sql(&mut connection, "alter table event_outbox set schema app").await;
    // `migrate` moves no tables, so it cannot mend this.
    let url = on_path(&database, "app");
    cannot_work(&url, &["event_outbox lies in schema app and its functions in schema public", "run `relay migrate`"]);
    let refused = finished(&["migrate"], &[("DATABASE_URL", &url)]).exited(1);
    let complaint = refused.complaint();
    for part in ["event_outbox lies in schema app, where is event_processing_log, ", "alter table ... set schema app"] {
        assert!(complaint.contains(part), "{complaint}");
    }
    let others = "event_relay event_processing_log event_dead_letter event_history event_relay_run event_crash_suspect";
    for table in others.split(' ') {
        sql(&mut connection, format!("alter table {table} set schema app")).await;
    }
    for sequence in ["event_outbox_epoch", "event_outbox_moves", "event_relay_changes"] {
        sql(&mut connection, format!("alter sequence {sequence} set schema app")).await;
    }
    let left: Vec<String> = connection
        .texts("select oid::regclass::text from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'")
        .await;
    for table in left {
        sql(&mut connection, format!("alter table {table} set schema app")).await;
    }
    is_mended_by_migrate(&url, &["event_outbox lies in schema app and its functions in schema public"]);
    let left = "pg_proc where pronamespace = 'public'::regnamespace";
    assert_eq!(count(&mut connection, left).await, 0);
    sql(&mut connection, "select app.emit_event('after')").await;
    assert_eq!(drain(&url)[0]["type"], "after");
}

#[tokio::test]
async fn f72_a_function_that_was_moved_or_dropped_is_noticed_and_made_anew() {
    for change in [
        "create schema other; alter function emit_event(text, jsonb, text, text, text, jsonb, text, text, integer, integer, interval, uuid) set schema other",
        "drop function emit_event(text, jsonb, text, text, text, jsonb, text, text, integer, integer, interval, uuid)",
        "drop function relay_add_days",
        "drop function relay_home",
        "drop function move_owed",
        "alter schema public rename to shop; create schema public; alter function shop.give_up_owed set schema public;
         alter schema public rename to other; alter schema shop rename to public",
    ] {
        let database = database().await;
        let mut connection = database.connect().await;
        sql(&mut connection, change).await;
        is_mended_by_migrate(database.url(), &["schema public lacks the function "]);
        sql(&mut connection, "select public.emit_event('after')").await;
        assert_eq!(drain(database.url())[0]["type"], "after", "{change}");
    }
}

#[tokio::test]
async fn f72_an_older_relay_does_not_make_the_functions_of_a_newer_one_anew() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "create or replace function relay_schema_version() returns integer language sql immutable as 'select 999';
         alter schema public rename to shop",
    )
    .await;
    let refused = finished(&["migrate"], &[("DATABASE_URL", &on_path(&database, "shop"))]).exited(1);
    assert!(
        refused.complaint().contains("run `relay migrate` of a relay that knows version 999"),
        "{}",
        refused.stderr
    );
}

#[tokio::test]
async fn f76_a_table_of_somebody_else_and_tables_without_functions_are_told_with_the_cure() {
    let database = empty_database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, "create table event_outbox (id bigint primary key, body json)").await;
    let parts = [
        "schema public has a table event_outbox that is not relay's",
        "lacks the column event_id, event_type",
        "rename",
    ];
    cannot_work(database.url(), &parts);
    let migrated = finished(&["migrate"], &[("DATABASE_URL", database.url())]).exited(1);
    assert!(parts.iter().all(|part| migrated.complaint().contains(part)), "{}", migrated.stderr);
    // The printed cure works.
    sql(&mut connection, "create schema relay").await;
    let url = on_path(&database, "relay");
    finished(&["migrate"], &[("DATABASE_URL", &url)]).exited(0);
    sql(&mut connection, "select relay.emit_event('a')").await;
    assert_eq!(drain(&url).len(), 1);

    // A dump that has the tables but not the functions.
    sql(&mut connection, "drop table public.event_outbox; create table public.event_outbox (like relay.event_outbox)")
        .await;
    let parts = ["schema public has the table event_outbox and not its functions", "pg_dump -n public"];
    cannot_work(database.url(), &parts);
    let migrated = finished(&["migrate"], &[("DATABASE_URL", database.url())]).exited(1);
    assert!(parts.iter().all(|part| migrated.complaint().contains(part)), "{}", migrated.stderr);
    assert!(refused(&mut connection, "select public.emit_event('a')").await.contains("does not exist"));
}
