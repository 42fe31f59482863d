//! Row-level security that applies to the relay's role.

use crate::binary::{Running, finished, relay};
use crate::harness::{count, emit, eventually, sql};
use crate::servers::{Database, database};
use crate::support::unique;

const STDOUT: (&str, &str) = ("RELAY_STDOUT", "true");
const TABLES: [&str; 7] = [
    "event_outbox",
    "event_processing_log",
    "event_dead_letter",
    "event_history",
    "event_relay_run",
    "event_crash_suspect",
    "event_relay",
];

/// Creates a role that has every right but to bypass row-level security. Returns the URL and the role.
async fn as_role(database: &Database) -> (String, String) {
    let role = unique("rls").replace('-', "_");
    sql(
        &mut database.connect().await,
        format!(
            "create role {role} login password 'secret';
             grant all on all tables in schema public to {role};
             grant all on all sequences in schema public to {role};
             grant all on all functions in schema public to {role}"
        ),
    )
    .await;
    let (_, rest) = database.url().rsplit_once('@').unwrap();
    (format!("postgres://{role}:secret@{rest}"), role)
}

#[tokio::test]
async fn f69_row_security_without_a_policy_is_refused_with_the_cure() {
    let database = database().await;
    let mut connection = database.connect().await;
    let (url, role) = as_role(&database).await;
    let variables = [("DATABASE_URL", url.as_str()), STDOUT];
    emit(&mut connection, "hidden", "").await;
    for table in TABLES {
        sql(&mut connection, format!("alter table {table} enable row level security")).await;
        let check = finished(&["check"], &variables).exited(1);
        let failed: Vec<&str> = check.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
        assert_eq!(failed.len(), 1, "{}", check.stdout);
        for part in ["row-level security", table, "bypassrls"] {
            assert!(failed[0].contains(part), "{part:?} is missing in: {}", failed[0]);
        }
        finished(&["--once"], &variables).exited(1).says(&["row-level security", table, "bypassrls"]);
        sql(&mut connection, format!("alter table {table} disable row level security")).await;
    }
    // A policy that shows everything to other roles shows nothing to this one.
    sql(&mut connection, "alter table event_outbox enable row level security").await;
    finished(&["emit", "a"], &variables).exited(1).says(&["row-level security"]);
    sql(&mut connection, "create policy write on event_outbox for insert with check (true)").await;
    finished(&["emit", "a"], &variables).exited(0);
    sql(&mut connection, format!("alter role {role} bypassrls")).await;
    finished(&["check"], &variables).exited(0);
    finished(&["--once"], &variables).exited(0);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

#[tokio::test]
async fn f69_row_security_that_comes_while_a_relay_runs_stops_it_loudly_until_it_goes() {
    let database = database().await;
    let mut connection = database.connect().await;
    let (url, _) = as_role(&database).await;
    let mut relay = Running::start(relay(&[], &[("DATABASE_URL", &url), STDOUT]));
    relay.until_log("\"message\":\"ready\"");
    sql(
        &mut connection,
        "alter table event_outbox enable row level security;
         create policy nothing on event_outbox using (false)",
    )
    .await;
    emit(&mut connection, "hidden", "").await;
    relay.until_log("row-level security");
    assert!(relay.log().contains("bypassrls"), "{}", relay.log());
    sql(&mut connection, "alter table event_outbox disable row level security").await;
    eventually("the event is published", async || count(&mut connection, "event_outbox").await == 0).await;
}

#[tokio::test]
async fn f69_an_owner_is_refused_where_row_security_is_forced_on_it() {
    let database = database().await;
    let mut connection = database.connect().await;
    let (url, role) = as_role(&database).await;
    let variables = [("DATABASE_URL", url.as_str()), STDOUT];
    emit(&mut connection, "hidden", "").await;
    sql(&mut connection, format!("grant create on schema public to {role}")).await;
    for table in TABLES {
        sql(
            &mut connection,
            format!("alter table {table} owner to {role}; alter table {table} enable row level security"),
        )
        .await;
        finished(&["check"], &variables).exited(0);
        sql(&mut connection, format!("alter table {table} force row level security")).await;
        let check = finished(&["check"], &variables).exited(1);
        let failed: Vec<&str> = check.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
        assert_eq!(failed.len(), 1, "{}", check.stdout);
        for part in ["row-level security", table, "bypassrls"] {
            assert!(failed[0].contains(part), "{part:?} is missing in: {}", failed[0]);
        }
        finished(&["--once"], &variables).exited(1).says(&["row-level security", table]);
        sql(&mut connection, format!("alter table {table} no force row level security")).await;
    }
    finished(&["check"], &variables).exited(0);
    finished(&["--once"], &variables).exited(0);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}
