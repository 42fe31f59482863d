//! Migrations of a database that is in use.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sqlx::Connection;

use crate::binary::{Running, finished, relay};
use crate::harness::{count, eventually, refused, sql};
use crate::servers::{Database, Server, database_on_unmigrated};
use crate::stores::Client;

/// The number of migrations that the previous relay had.
const BEFORE: usize = 10;

fn files() -> Vec<PathBuf> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/postgres");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// A database as the previous relay left it.
async fn of_before(server: &Server) -> Database {
    let database = database_on_unmigrated(server).await;
    let mut connection = database.connect().await;
    for file in &files()[..BEFORE] {
        sql(&mut connection, std::fs::read_to_string(file).unwrap()).await;
    }
    database
}

/// Inserts events one after the other until it is stopped. Returns the longest time that an insert took.
async fn longest_insert(database: &Database, stop: tokio_util::sync::CancellationToken) -> Duration {
    let mut connection = database.connect().await;
    let mut longest = Duration::ZERO;
    for n in 0.. {
        if stop.is_cancelled() {
            break;
        }
        let begun = Instant::now();
        sql(&mut connection, format!("insert into event_outbox (event_type, aggregate_id) values ('new', '{n}')"))
            .await;
        longest = longest.max(begun.elapsed());
    }
    longest
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_of_300000_waiting_events_holds_up_inserts_for_a_second_at_most() {
    let server = Server::start("postgres", &["--fast"]);
    let database = of_before(&server).await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_id, status, available_at)
         select 'waits', (n % 1000)::text, 'scheduled', now() + interval '1 day' from generate_series(1, 300000) n",
    )
    .await;
    let stop = tokio_util::sync::CancellationToken::new();
    let inserting = (0..2).map(|_| longest_insert(&database, stop.clone()));
    let migrating = async {
        // A report has read the table and keeps its transaction open.
        let mut report = database.connect().await;
        sql(&mut report, "begin; select count(*) from event_outbox").await;
        let variables = [("DATABASE_URL", database.url()), ("RELAY_LOG", "warn")];
        let mut migrating = Running::start(relay(&["migrate"], &variables));
        tokio::task::block_in_place(|| migrating.until_log("is tried again"));
        let pid = report.number("select pg_backend_pid()::bigint").await;
        let log = migrating.log();
        assert!(log.contains(&format!("pid {pid}")) && log.contains("since"), "{log}");
        tokio::time::sleep(Duration::from_secs(2)).await;
        sql(&mut report, "commit").await;
        let done = tokio::task::block_in_place(|| migrating.finish()).exited(0);
        assert!(done.stdout.contains(&format!("schema version {}", files().len())), "{}", done.stdout);
        stop.cancel();
    };
    let (longest, ()) = tokio::join!(futures_util::future::join_all(inserting), migrating);
    let longest = longest.into_iter().max().unwrap();
    println!("longest insert beside the migrations of 300,000 events, and a lock that lasted: {longest:?}");
    // The lock timeout is a second. The rest is for a busy machine.
    assert!(longest < Duration::from_secs(4), "{longest:?}");
    assert_eq!(count(&mut connection, "event_outbox where event_type = 'waits'").await, 300_000);
    finished(&["check"], &[("DATABASE_URL", database.url()), ("RELAY_STDOUT", "true")]).exited(0);
    sql(&mut connection, "update event_outbox set available_at = now() where id <= 1000").await;
    eventually("a relay works", async || {
        finished(&["--once"], &[("DATABASE_URL", database.url()), ("RELAY_STDOUT", "true")]);
        count(&mut connection, "event_outbox where available_at <= now()").await == 0
    })
    .await;
}

/// A relay of the previous version that publishes to its standard output.
fn relay_of_before(program: &str, database: &Database) -> Running {
    let mut command = Command::new(program);
    command.env_clear().stdin(Stdio::null()).envs([
        ("DATABASE_URL", database.url()),
        ("RELAY_STDOUT", "true"),
        ("RELAY_LOG", "warn"),
        ("EVENT_OUTBOX_POLLING_INTERVAL", "200"),
    ]);
    Running::start(command)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "compiles the relay of before, which takes minutes: make test-upgrade"]
async fn relays_of_before_go_on_publishing_through_the_migrations_and_after_them() {
    let built =
        Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/before")).stderr(Stdio::inherit()).output().unwrap();
    assert!(built.status.success(), "the previous relay could not be built: see the output of tests/before above");
    let program = String::from_utf8(built.stdout).unwrap();
    let server = Server::start("postgres", &["--fast"]);
    let database = of_before(&server).await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_id, status, available_at)
         select 'waits', (n % 1000)::text, 'scheduled', now() + interval '1 day' from generate_series(1, 250000) n;
         insert into event_outbox (event_type, aggregate_id) select 'backlog', (n % 1000)::text from generate_series(1, 50000) n",
    )
    .await;
    let mut relays: Vec<Running> = (0..3).map(|_| relay_of_before(program.trim(), &database)).collect();
    let stop = tokio_util::sync::CancellationToken::new();
    let inserting = (0..2).map(|_| longest_insert(&database, stop.clone()));
    let migrating = async {
        let published = async || count(&mut database.connect().await, "event_processing_log").await > 0;
        eventually("the relays work", published).await;
        let variables = [("DATABASE_URL", database.url()), ("RELAY_LOG", "warn")];
        let migrating = Running::start(relay(&["migrate"], &variables));
        let done = tokio::task::block_in_place(|| migrating.finish()).exited(0);
        assert!(done.stdout.contains(&format!("schema version {}", files().len())), "{}", done.stdout);
        tokio::time::sleep(Duration::from_secs(1)).await;
        stop.cancel();
    };
    let (longest, ()) = tokio::join!(futures_util::future::join_all(inserting), migrating);
    let longest = longest.into_iter().max().unwrap();
    println!("longest insert beside three relays and the migrations of 300,000 events: {longest:?}");
    assert!(longest < Duration::from_secs(4), "{longest:?}");
    // After the migrations, the previous version's statements for retries, promotions and dead letters still work.
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_id, status) select 'later', n::text, 'scheduled' from generate_series(1, 1000) n",
    )
    .await;
    eventually("all is published", async || {
        count(&mut connection, "event_outbox where event_type <> 'waits'").await == 0
    })
    .await;
    assert!(relays.iter_mut().all(Running::is_running));
    let outputs = relays.into_iter().map(|relay| {
        relay.signal("TERM");
        tokio::task::block_in_place(|| relay.finish()).exited(0)
    });
    let (mut events, mut ids) = (0, HashSet::new());
    for output in outputs {
        assert_eq!(output.stderr, "", "the relays log nothing");
        for line in output.stdout.lines() {
            let event: serde_json::Value = serde_json::from_str(line).unwrap();
            ids.insert(event["id"].as_str().unwrap().to_owned());
            events += 1;
        }
    }
    let logged = count(&mut connection, "event_processing_log where status = 'published'").await;
    assert_eq!((events, i64::try_from(ids.len()).unwrap()), (ids.len(), logged), "each once");
}

/// Rights of roles on old objects extend to new objects, whatever the roles are called and whoever granted the rights.
#[tokio::test]
async fn roles_that_had_rights_before_have_the_like_on_what_migrations_add() {
    let server = Server::start("postgres", &["--fast"]);
    let database = of_before(&server).await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "revoke create on schema public from public;
         revoke execute on all functions in schema public from public;
         create role shop login password 'known';
         create role \"Worker 1\" nologin; create role worker login password 'known' in role \"Worker 1\";
         create role person login password 'known';
         create role stranger login password 'known';
         grant insert, select on event_outbox to shop;
         grant execute on function emit_event, event_partition, event_is_valid to shop;
         grant select, insert, update, delete on event_outbox to \"Worker 1\";
         grant insert on event_processing_log, event_dead_letter, event_history to \"Worker 1\";
         grant select, insert, update, delete on event_relay_run, event_crash_suspect to \"Worker 1\";
         grant select, update on sequence event_outbox_epoch to \"Worker 1\";
         grant select on sequence event_outbox_moves, event_outbox_id_seq to \"Worker 1\";
         grant execute on function relay_add_days, relay_drop_days, relay_outbox_id, relay_epoch_above, relay_schema_version
            to \"Worker 1\";
         grant execute on function event_partition, event_is_valid to \"Worker 1\";
         grant select on event_outbox, event_processing_log, event_dead_letter, event_history, event_outbox_lag,
            event_dead_letter_summary to person;
         grant execute on function redrive_dead_letter to person",
    )
    .await;
    finished(&["migrate"], &[("DATABASE_URL", database.url())]).exited(0);
    let (_, place) = database.url().rsplit_once('@').unwrap();
    let url = |role: &str| format!("postgres://{role}:known@{place}");
    let worker = url("worker");
    let variables = [("DATABASE_URL", worker.as_str()), ("RELAY_STDOUT", "true")];
    finished(&["check"], &variables).exited(0);
    let mut app = sqlx::PgConnection::connect(&url("shop")).await.unwrap();
    // Functions that were created again, and new ones.
    sql(&mut app, "select emit_event('a', '{}'::jsonb), emit_event('a', '{}'::text, 'order', '42')").await;
    assert_eq!(finished(&["--once"], &variables).exited(0).stdout.lines().count(), 2);
    let mut person = sqlx::PgConnection::connect(&url("person")).await.unwrap();
    sql(&mut person, "select * from event_blocked_keys; select * from event_relay").await;
    sql(&mut person, "select move_owed('a', 'b'), give_up_owed('a')").await;
    // Nobody has more rights than before.
    let mut stranger = sqlx::PgConnection::connect(&url("stranger")).await.unwrap();
    for (who, role) in [(&mut stranger, "stranger"), (&mut app, "shop")] {
        for statement in [
            "select * from event_blocked_keys",
            "select * from event_relay",
            "select nextval('event_relay_changes')",
            "select move_owed('a', 'b')",
            "select give_up_owed('a')",
            "select redrive_dead_letter(1)",
        ] {
            let refused = refused(who, statement).await;
            assert!(refused.contains("permission denied"), "{role}: {statement}: {refused}");
        }
    }
}
