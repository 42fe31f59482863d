//! Missing triggers that the relay needs, and other triggers that get in its way.

use crate::binary::{cannot_work, drain, finished};
use crate::harness::sql;
use crate::servers::database;

/// Breaks a database with one statement, expects a report, and mends it with another statement.
async fn told_and_mended(breaks: &str, parts: &[&str], mends: &str) {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "create function touch() returns trigger language plpgsql as $$ begin new.priority := 9; return new; end $$;
         select emit_event('order.created')",
    )
    .await;
    sql(&mut connection, breaks).await;
    cannot_work(database.url(), parts);
    sql(&mut connection, mends).await;
    finished(&["check"], &[("DATABASE_URL", database.url()), ("RELAY_STDOUT", "true")]).exited(0);
    assert_eq!(drain(database.url()).len(), 1);
}

#[tokio::test]
async fn f70_a_trigger_that_changes_rows_behind_ours_is_refused_by_name() {
    let create = "create trigger zzzz before insert on event_outbox for each row execute function touch()";
    let rename = "alter trigger zzzz on event_outbox rename to app_touch";
    told_and_mended(create, &["trigger zzzz runs after zzz_event_outbox_rules", "alter trigger zzzz"], rename).await;
}

#[tokio::test]
async fn f70_a_trigger_of_ours_that_is_disabled_or_missing_is_named_with_its_cure() {
    for (breaks, part, cure) in [
        (
            "alter table event_outbox disable trigger zzz_event_outbox_rules",
            "zzz_event_outbox_rules is disabled",
            "alter table event_outbox enable always trigger zzz_event_outbox_rules",
        ),
        (
            "alter table event_outbox disable trigger event_outbox_moved",
            "event_outbox_moved is disabled",
            "alter table event_outbox enable trigger event_outbox_moved",
        ),
        (
            "drop trigger zzz_event_outbox_rules on event_outbox",
            "zzz_event_outbox_rules is missing",
            "create trigger zzz_event_outbox_rules before insert or update on event_outbox for each row execute function event_outbox_rules()",
        ),
        (
            "drop trigger event_outbox_moved on event_outbox",
            "event_outbox_moved is missing",
            "create trigger event_outbox_moved after update on event_outbox referencing new table as moved for each statement execute function event_outbox_moved()",
        ),
    ] {
        told_and_mended(breaks, &[part, cure], cure).await;
    }
}

#[tokio::test]
async fn an_application_may_add_triggers_that_run_before_ours() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "create function touch() returns trigger language plpgsql as
         $$ begin new.priority := 9; new.aggregate_id := 'touched'; return new; end $$;
         create trigger app_touch before insert or update on event_outbox for each row execute function touch();
         create trigger zzzz after insert on event_outbox for each row execute function touch();
         select emit_event('order.created', aggregate_id => n::text) from generate_series(1, 10) n",
    )
    .await;
    finished(&["check"], &[("DATABASE_URL", database.url()), ("RELAY_STDOUT", "true")]).exited(0);
    let published = drain(database.url());
    assert_eq!(published.len(), 10);
    assert!(published.iter().all(|event| event["partitionkey"] == "touched"));
}
