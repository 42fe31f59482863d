//! Databases as operators set them up: each works, or is refused with a cure.

use crate::binary::{Running, cannot_work, finished, relay};
use crate::harness::{column, count, eventually, sql};
use crate::servers::{Server, database, database_on, empty_database, redis};
use crate::stores::{Client, Sqlite, Store};

const STDOUT: (&str, &str) = ("RELAY_STDOUT", "true");

#[tokio::test]
async fn f76_an_idle_relay_keeps_its_connections_whatever_the_limit_for_idle_sessions() {
    let database = database().await;
    let mut connection = database.connect().await;
    let known = column(&mut connection, "select name from pg_settings where name = 'idle_session_timeout'").await;
    if known.is_empty() {
        return; // PostgreSQL 13 has no such limit.
    }
    let name = database.url().rsplit('/').next().unwrap().to_owned();
    // A session keeps the setting that was in force when it started.
    sql(&mut connection, format!("alter database {name} set idle_session_timeout = '200ms'")).await;
    let slow = ("EVENT_OUTBOX_POLLING_INTERVAL", "60000");
    let mut running = Running::start(relay(&[], &[("DATABASE_URL", database.url()), STDOUT, slow]));
    running.until_log("\"message\":\"ready\"");
    // A listening connection and at least one lane have been idle for five times the limit.
    let idle = format!(
        "pg_stat_activity where datname = '{name}' and application_name = 'relay' and state = 'idle'
         and state_change < clock_timestamp() - interval '1 s'"
    );
    eventually("its connections have been idle for a second", async || count(&mut connection, &idle).await >= 2).await;
    running.signal("TERM");
    let ended = running.finish().exited(0);
    assert!(!ended.stderr.contains("idle-session"), "{}", ended.stderr);
}

#[tokio::test]
async fn f76_an_orphaned_prepared_transaction_costs_no_busy_polling() {
    let server = Server::start("postgres", &["--fast", "--set", "max_prepared_transactions=2"]);
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "begin; insert into event_outbox (event_type) values ('undecided'); prepare transaction 'orphan'",
    )
    .await;
    let mut running = Running::start(relay(&[], &[("DATABASE_URL", database.url()), STDOUT]));
    running.until_log("\"message\":\"ready\"");
    // Other events are published.
    sql(&mut connection, "insert into event_outbox (event_type) values ('decided')").await;
    eventually("it is published", async || count(&mut connection, "event_outbox").await == 0).await;
    // A relay that polls in short intervals runs some fifty statements a second, one that sleeps runs a few.
    let idle = "pg_stat_activity where application_name = 'relay' and state = 'idle' and state_change < clock_timestamp() - interval '1 s'";
    let all = "pg_stat_activity where application_name = 'relay'";
    eventually("all its connections are idle for a second", async || {
        let all = count(&mut connection, all).await;
        all >= 2 && count(&mut connection, idle).await == all
    })
    .await;
    // An event that commits at last is found by polling.
    sql(&mut connection, "commit prepared 'orphan'").await;
    eventually("it is published", async || count(&mut connection, "event_outbox").await == 0).await;
    running.signal("TERM");
    running.finish().exited(0);
}

#[tokio::test]
async fn f76_what_a_url_says_to_other_programs_is_refused_with_the_cure() {
    let database = database().await;
    let place = database.url();
    for (url, parts) in [
        (format!("{place}?schema=shop"), ["schema is another program's way", "options=-csearch_path%3D"]),
        (format!("{place}?currentSchema=shop"), ["currentSchema", "options=-csearch_path%3D"]),
        (format!("{place}?pgbouncer=true"), ["pgbouncer", "RELAY_DATABASE_POOLED=true"]),
        (format!("{place}?connection_limit=1&pool_timeout=2"), ["connection_limit", "pool_timeout"]),
        (format!("{place}?sslaccept=strict"), ["sslaccept", "sslmode"]),
        ("postgres://u:hidden@a:5432,b:5432/d".to_owned(), ["several hosts", "primary"]),
    ] {
        for args in [&["check"][..], &["--once"], &["migrate"], &["run"]] {
            let refused = finished(args, &[("DATABASE_URL", &url), STDOUT]).exited(2);
            let said = refused.complaint();
            assert!(parts.iter().all(|part| said.contains(part)) && !said.contains("hidden"), "{args:?}: {said}");
        }
    }
    let harmless = format!("{place}?connect_timeout=5&target_session_attrs=read-write");
    finished(&["check"], &[("DATABASE_URL", &harmless), STDOUT]).exited(0);
}

#[tokio::test]
async fn f76_a_migration_that_may_not_create_is_told_what_it_needs() {
    let database = empty_database().await;
    let mut connection = database.connect().await;
    let (_, place) = database.url().rsplit_once('@').unwrap();
    let (_, name) = place.rsplit_once('/').unwrap();
    sql(
        &mut connection,
        format!("revoke create on schema public from public; create role {name}_app login password 'known'"),
    )
    .await;
    let url = format!("postgres://{name}_app:known@{place}");
    let refused = finished(&["migrate"], &[("DATABASE_URL", &url)]).exited(1);
    for part in ["permission denied for schema public", "needs `create` on their schema"] {
        assert!(refused.complaint().contains(part), "{}", refused.stderr);
    }
    cannot_work(&url, &["run `relay migrate`"]);
    sql(&mut connection, format!("grant create on schema public to {name}_app")).await;
    finished(&["migrate"], &[("DATABASE_URL", &url)]).exited(0);
    finished(&["check"], &[("DATABASE_URL", &url), STDOUT]).exited(0);

    let nowhere = format!("{}?options=-csearch_path%3Dnowhere", database.url());
    let refused = finished(&["migrate"], &[("DATABASE_URL", &nowhere)]).exited(1);
    assert!(refused.complaint().contains("create the schema first"), "{}", refused.stderr);

    // A role that may create objects in the schema is reported, but the check does not fail.
    sql(&mut connection, format!("create role {name}_other; grant create on schema public to {name}_other")).await;
    let check = finished(&["check"], &[("DATABASE_URL", &url), STDOUT]).exited(0).stdout;
    let warning =
        format!("ok    create rights: warning: in schema public may create objects besides its owner: {name}_other;");
    assert!(check.contains(&warning), "{check}");
    assert_eq!(connection.number("select count(*) from event_outbox").await, 0);
}

#[tokio::test]
async fn f76_ids_of_the_applications_own_sequence_work_and_are_checked() {
    let database = database().await;
    let mut connection = database.connect().await;
    let variables = [("DATABASE_URL", database.url()), STDOUT];
    // The application gives the ids.
    sql(&mut connection, "alter table event_outbox alter column id drop identity").await;
    sql(&mut connection, "insert into event_outbox (id, event_type) values (7, 'own')").await;
    finished(&["check"], &variables).exited(0);
    finished(&["--once"], &variables).exited(0);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    sql(
        &mut connection,
        "create sequence \"own ids\"; alter table event_outbox alter column id set default nextval('\"own ids\"');
         insert into event_outbox (event_type) values ('by default')",
    )
    .await;
    finished(&["check"], &variables).exited(0);
    sql(&mut connection, "insert into event_outbox (id, event_type) values (9, 'ahead')").await;
    let told = finished(&["check"], &variables).exited(1).stdout;
    let cure = "select pg_catalog.setval('public.\"own ids\"', 9)";
    assert!(told.contains(cure), "{told}");
    sql(&mut connection, cure).await;
    finished(&["check"], &variables).exited(0);
    finished(&["--once"], &variables).exited(0);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

#[tokio::test]
async fn f76_a_stream_with_the_greatest_id_is_told_with_the_cure() {
    let (database, name) = (database().await, "set-ups:greatest");
    let mut connection = crate::stream::connect(redis().url());
    let id = "18446744073709551615-18446744073709551615";
    redis::cmd("XADD").arg(name).arg(id).arg("a").arg("b").exec(&mut connection).unwrap();
    let stream = ("RELAY_REDIS_STREAM", name);
    let variables = [("DATABASE_URL", database.url()), ("REDIS_URL", redis().url()), stream];
    let told = finished(&["check"], &variables).exited(1).stdout;
    assert!(told.contains("has the greatest id there is") && told.contains("XSETID"), "{told}");
    redis::cmd("DEL").arg(name).exec(&mut connection).unwrap();
    finished(&["check"], &variables).exited(0);
}

#[tokio::test]
async fn f67_a_column_that_was_renamed_or_has_another_type_is_told_with_the_statement_that_mends_it() {
    let database = database().await;
    let mut connection = database.connect().await;
    for (change, said, cure) in [
        (
            "alter table event_outbox rename column source to src",
            "event_outbox has no column source",
            "alter table event_outbox rename column src to source",
        ),
        (
            "alter table event_processing_log rename column error to trouble",
            "event_processing_log has no column error",
            "alter table event_processing_log rename column trouble to error",
        ),
        (
            "alter table event_relay_run rename column begun_at to begun",
            "event_relay_run has no column begun_at",
            "alter table event_relay_run rename column begun to begun_at",
        ),
        (
            "alter table event_outbox alter column payload type text",
            "the column payload of event_outbox is of type text and was jsonb",
            "alter table event_outbox alter column payload drop default, alter column payload type jsonb using payload::jsonb, \
             alter column payload set default '{}'",
        ),
        (
            "alter table event_outbox rename column event_type to type",
            "has no longer the column event_type",
            "alter table public.event_outbox rename column ... to event_type",
        ),
        (
            "alter table event_outbox rename to eo",
            "schema public has relay's functions and no table event_outbox",
            "alter table ... rename to event_outbox",
        ),
    ] {
        sql(&mut connection, change).await;
        cannot_work(database.url(), &[said, cure]);
        let undo = match cure.contains("...") {
            false => cure.to_owned(),
            true if change.contains(" rename to ") => "alter table eo rename to event_outbox".to_owned(),
            true => "alter table event_outbox rename column type to event_type".to_owned(),
        };
        sql(&mut connection, undo).await;
        finished(&["check"], &[("DATABASE_URL", database.url()), STDOUT]).exited(0);
    }
    sql(&mut connection, "select emit_event('goes')").await;
    finished(&["--once"], &[("DATABASE_URL", database.url()), STDOUT]).exited(0);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

#[tokio::test]
async fn f67_a_table_or_a_column_of_a_file_that_was_renamed_is_told_with_the_statement_that_mends_it() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    for (change, said, cure) in [
        (
            "alter table event_outbox rename to eo",
            "there is no table event_outbox",
            "alter table eo rename to event_outbox",
        ),
        (
            "alter table event_outbox rename column source to src",
            "event_outbox has no column source",
            "alter table event_outbox rename column src to source",
        ),
    ] {
        connection.execute(change).await.unwrap();
        cannot_work(store.url(), &[said, cure]);
        let migrated = finished(&["migrate"], &[("DATABASE_URL", store.url())]).exited(1);
        assert!(migrated.complaint().contains(cure), "{}", migrated.stderr);
        connection.execute(cure).await.unwrap();
        finished(&["check"], &[("DATABASE_URL", store.url()), STDOUT]).exited(0);
    }
}

#[tokio::test]
async fn f103_emit_event_takes_what_drivers_send_and_says_what_it_does_not_take() {
    let database = database().await;
    let mut connection = database.connect().await;
    let id = "01234567-89ab-4cde-8f01-23456789abcd";
    // The result for a parameter of each type; `unknown` is for drivers that leave the type to the server.
    for (call, key) in [
        ("emit_event('a')".to_owned(), "null|null"),
        ("emit_event('a', '{}')".to_owned(), "null|null"),
        ("emit_event('a', '{}', 'order', '42')".to_owned(), "order|42"),
        ("emit_event('a', '{}', null, null, 'shop')".to_owned(), "null|null"),
        ("emit_event('a', aggregate_id => '42')".to_owned(), "null|42"),
        ("emit_event('a', '{}'::text, 'order', '42')".to_owned(), "order|42"),
        ("emit_event('a'::varchar, '{}'::varchar, 'order'::varchar, '42'::varchar)".to_owned(), "order|42"),
        ("emit_event('a', '{}'::json, aggregate_id => '42')".to_owned(), "null|42"),
        ("emit_event('a', '{}'::jsonb, 'order', '42'::text)".to_owned(), "order|42"),
        ("emit_event('a', '{}', 'order', 42::smallint)".to_owned(), "order|42"),
        ("emit_event('a', '{}', aggregate_type => 'order', aggregate_id => 42)".to_owned(), "order|42"),
        ("emit_event('a', '{}', aggregate_id => 42::bigint, delay => '1 hour', priority => 3)".to_owned(), "null|42"),
        (format!("emit_event('a', '{{}}', aggregate_type => 'order', aggregate_id => '{id}'::uuid)"), "order|UUID"),
    ] {
        sql(&mut connection, format!("delete from event_outbox; select {call}")).await;
        let found = column(
            &mut connection,
            "select concat_ws('|', coalesce(aggregate_type, 'null'), coalesce(aggregate_id, 'null')) from event_outbox",
        )
        .await;
        assert_eq!(found, [key.replace("UUID", id)], "{call}");
    }
    for (call, words) in [
        ("emit_event('a', '{\"a\",\"b\"}')", "invalid input syntax for type json"),
        ("emit_event('a', '{}', correlation_id => gen_random_uuid())", "function emit_event"),
        ("emit_event('a', array['b'])", "function emit_event"),
    ] {
        let refused = crate::harness::refused(&mut connection, format!("select {call}")).await;
        assert!(refused.contains(words), "{call}: {refused}");
    }
    // An insert accepts numbers and UUIDs for a text, and a payload of type json.
    sql(
        &mut connection,
        format!(
            "insert into event_outbox (event_type, payload, aggregate_id, correlation_id, causation_id)
             values ('a', '{{}}'::json, 42, '{id}'::uuid, 7::bigint)"
        ),
    )
    .await;
}
