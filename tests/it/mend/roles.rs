//! Who may do what with dead letters on PostgreSQL: `relay_operator` everything, others nothing.

use crate::binary::finished;
use crate::harness::{column, count, sql};
use crate::schema::roles::{apply, login};
use crate::servers::database;

use super::waiting::blocked;
use super::{audited, dead_letters};
use crate::stores::Postgres;

#[tokio::test]
async fn relay_operator_may_do_everything_with_dead_letters_by_command_and_in_sql() {
    let database = database().await;
    let mut owner = database.connect().await;
    apply(&mut owner).await;
    dead_letters::<Postgres>(&mut owner, 12).await;
    let url = login(&database, &mut owner, "relay_operator").await;
    let variables = [("DATABASE_URL", url.as_str())];
    for (args, said) in [
        (&["list"][..], "BAD: it is refused"),
        (&["list", "--summary"], "12"),
        (&["show", "3", "--payload"], "secret"),
        (&["redrive", "--id", "1"], "redriven 1 dead letter\n"),
        (&["redrive", "--type", "e2"], "redriven 1 dead letter\n"),
        (&["discard", "--id", "3", "--reason", "x"], "discarded 1 dead letter\n"),
        (&["purge", "--yes"], "purged 3 dead letters\n"),
    ] {
        let done = finished(&[&["dead-letter"], args].concat(), &variables).exited(0);
        assert!(done.stdout.contains(said), "{args:?}: {}", done.stdout);
    }
    let mut operator: sqlx::PgConnection = <sqlx::PgConnection as sqlx::Connection>::connect(&url).await.unwrap();
    // As the guide shows them.
    for (statement, done) in [
        (r#"select redrive_dead_letters('{"id": 4}')"#, 1),
        (r#"select redrive_dead_letters('{"type": "e5"}', 'archive')"#, 1),
        (r#"select redrive_dead_letters('{"id": 6}', new_payload => '{"right": true}')"#, 1),
        (
            r#"select redrive_dead_letters('{"error": "BAD", "since": "2020-01-01", "key": "order:2"}', max_events => 1)"#,
            1,
        ),
        (r#"select discard_dead_letters('{"id": [8, 9]}', 'a test customer')"#, 2),
        (r#"select purge_dead_letters('{"state": "discarded"}')"#, 2),
        (r#"select redrive_dead_letters('{"destination": "nowhere"}')"#, 0),
    ] {
        let count: i64 = sqlx::query_scalar(statement).fetch_one(&mut operator).await.unwrap();
        assert_eq!(count, done, "{statement}");
    }
    for (statement, said) in [
        (r#"select redrive_dead_letters('{"typ": "e5"}')"#, "a filter has no field typ; it has type, key"),
        (r#"select redrive_dead_letters('[1]')"#, "a filter is a JSON object"),
        (r#"select redrive_dead_letters('{"state": "gone"}')"#, "not gone"),
        (r#"select redrive_dead_letters('{"since": "yester"}')"#, "yester"),
        (r#"select redrive_dead_letters('{"id": [10, 11]}', new_payload => '{}')"#, "a payload is for one"),
        (r#"select discard_dead_letters('{}', ' ')"#, "it takes a reason"),
        ("select redrive_dead_letter(4)", "has been redriven already"),
        ("select relay_note_action('redrive', '{}', '{}', 1, null)", "permission denied"),
        ("insert into event_operator_action (action, event_count) values ('x', 1)", "permission denied"),
        ("delete from event_dead_letter", "permission denied"),
    ] {
        let refused = crate::harness::refused(&mut operator, statement).await;
        assert!(refused.contains(said), "{statement}: {refused}");
    }
    let who = column(&mut owner, "select distinct done_by from event_operator_action").await;
    assert_eq!(who, [url.split("//").nth(1).unwrap().split(':').next().unwrap()]);
    let whole = "event_dead_letter where redriven_at is not null and redriven_by is null";
    assert_eq!(count(&mut owner, whole).await, 0);
    assert_eq!(audited::<Postgres>(&mut owner).await.len(), 10);
}

#[tokio::test]
async fn relay_operator_may_change_what_waits_by_command_and_in_sql() {
    let database = database().await;
    let mut owner = database.connect().await;
    apply(&mut owner).await;
    blocked::<Postgres>(&mut owner).await;
    let url = login(&database, &mut owner, "relay_operator").await;
    let variables = [("DATABASE_URL", url.as_str())];
    for (args, said) in [
        (&["retry-now", "--error", "BAD"][..], "made due 2 events\n"),
        (&["give-up", "--id", "1"], "gave up 1 event;"),
        (&["move-owed", "old", "new", "--type", "e2"], "moved 1 event from old to new\n"),
    ] {
        let done = finished(args, &variables).exited(0);
        assert!(done.stdout.contains(said), "{args:?}: {}", done.stdout);
    }
    let mut operator = <sqlx::PgConnection as sqlx::Connection>::connect(&url).await.unwrap();
    for (statement, done) in [
        (r#"select coalesce(sum(events), 0)::bigint from count_waiting('move_owed', '{"destination": "old"}')"#, 8),
        (r#"select retry_waiting('{"destination": "old"}')"#, 0),
        (r#"select give_up_waiting('{"type": "e3"}', 'the customer is gone')"#, 1),
        (r#"select move_waiting('old', 'new', '{"key": "order:0"}', max_events => 2)"#, 2),
        ("select move_owed('old', 'new')", 5),
        ("select give_up_owed('new')", 8),
    ] {
        let count: i64 = sqlx::query_scalar(statement).fetch_one(&mut operator).await.unwrap();
        assert_eq!(count, done, "{statement}");
    }
    for (statement, said) in [
        ("select move_waiting('old', 'old')", "two destinations"),
        (r#"select retry_waiting('{"state": "open"}')"#, "a filter has no field state"),
        ("select relay_waiting_last('true', 1)", "permission denied"),
        ("select relay_hold_partitions('true', 1)", "permission denied"),
        ("update event_outbox set available_at = now()", "permission denied"),
    ] {
        let refused = crate::harness::refused(&mut operator, statement).await;
        assert!(refused.contains(said), "{statement}: {refused}");
    }
    assert_eq!(audited::<Postgres>(&mut owner).await.len(), 7);
    assert_eq!(count(&mut owner, "event_dead_letter").await, 10);
}

#[tokio::test]
async fn a_role_without_rights_is_told_which_role_may() {
    let database = database().await;
    let mut owner = database.connect().await;
    apply(&mut owner).await;
    dead_letters::<Postgres>(&mut owner, 1).await;
    let url = login(&database, &mut owner, "relay_worker").await;
    for args in [&["list"][..], &["show", "1"], &["redrive"], &["redrive", "--id", "1"], &["purge", "--yes"]] {
        let refused = finished(&[&["dead-letter"], args].concat(), &[("DATABASE_URL", &url)]).exited(1);
        assert!(refused.complaint().contains("relay_operator"), "{args:?}: {}", refused.stderr);
    }
    // It may read, and not change.
    sql(&mut owner, "grant select on event_dead_letter to relay_worker").await;
    let refused = finished(&["dead-letter", "redrive"], &[("DATABASE_URL", &url)]).exited(1);
    assert!(refused.complaint().contains("relay_operator"), "{}", refused.stderr);
    assert_eq!(count(&mut owner, "event_outbox").await, 0);
}
