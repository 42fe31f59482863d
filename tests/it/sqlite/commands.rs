//! The command line with a file: its output and its exit codes.

use serde_json::Value;

use crate::binary::{Running, cannot_work, finished, relay, until};
use crate::harness::{column, count, emit, sql};
use crate::stores::{Sqlite, SqliteRollbackJournal, Store};
use outbox_relay::outbox::sqlite::migrate::SCHEMA_VERSION;

const STDOUT: (&str, &str) = ("RELAY_STDOUT", "true");

/// Every command that uses the database exits with 1 and prints this line.
#[track_caller]
fn no_command_works(url: &str, parts: &[&str]) {
    cannot_work(url, parts);
    for args in [&["migrate"][..], &["emit", "a"]] {
        let refused = finished(args, &[("DATABASE_URL", url)]).exited(1);
        assert!(parts.iter().all(|part| refused.complaint().contains(part)), "{args:?}: {}", refused.stderr);
    }
}

#[test]
fn a_file_that_cannot_be_used_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let missing = format!("there is no database file {}: correct DATABASE_URL", path("none.db"));
    no_command_works(&format!("sqlite:{}", path("none.db")), &[&missing]);
    no_command_works(&format!("sqlite:{}", path("none/none.db")), &["there is no database file"]);
    no_command_works(
        &format!("sqlite:{}", folder.path().display()),
        &["unable to open database file", "is its path right"],
    );
    std::fs::write(path("text.db"), "a text, and long enough for the head of a database: ".repeat(100)).unwrap();
    let text = format!("sqlite:{}", path("text.db"));
    no_command_works(&text, &["file is not a database", "correct DATABASE_URL"]);
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["text.db"], "no file was created");
}

#[test]
fn a_url_that_names_no_file_to_share_is_wrong_configuration() {
    for (url, part) in [
        ("sqlite::memory:", "in-memory"),
        ("sqlite://:memory:", "in-memory"),
        ("sqlite:app.db?mode=memory", "in-memory"),
        ("sqlite:app.db?mode=ro", "for reading only"),
        ("sqlite:app.db?immutable=true", "for reading only"),
        ("sqlite:", "the path of the application's file"),
        ("sqlite://", "the path of the application's file"),
        ("sqlite:?mode=rwc", "the path of the application's file"),
        ("sqlite:app.db?mode=sideways", "sideways"),
    ] {
        for args in [&["run"][..], &["--once"], &["migrate"], &["check"], &["emit", "a"]] {
            let refused = finished(args, &[("DATABASE_URL", url), STDOUT]).exited(2);
            assert!(refused.complaint().contains("DATABASE_URL cannot be used"), "{url}: {}", refused.stderr);
            assert!(refused.complaint().contains(part), "{url}: {}", refused.stderr);
        }
    }
    let pooled = [("DATABASE_URL", "sqlite:app.db"), STDOUT, ("RELAY_DATABASE_POOLED", "true")];
    let refused = finished(&["run"], &pooled).exited(2);
    assert!(
        refused.complaint().contains("RELAY_DATABASE_POOLED is for a pooler before PostgreSQL"),
        "{}",
        refused.stderr
    );
}

#[tokio::test]
async fn a_relay_waits_for_its_file_and_its_tables() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("app.db");
    let url = format!("sqlite:{}", file.display());
    let mut running = Running::start(relay(&["run"], &[("DATABASE_URL", &url), STDOUT]));
    running.until_log("there is no database file");
    // An application may begin with an empty file.
    std::fs::write(&file, "").unwrap();
    running.until_log(&format!(
        "the database has schema version 0, this relay needs {SCHEMA_VERSION}: run `relay migrate`"
    ));
    let migrated = finished(&["migrate"], &[("DATABASE_URL", &url)]).exited(0);
    let said = migrated.stdout;
    assert_eq!(said.matches("applied ").count(), usize::try_from(SCHEMA_VERSION).unwrap(), "{said}");
    assert_eq!(said.lines().last(), Some(format!("schema version {SCHEMA_VERSION}").as_str()));
    running.until_log("\"message\":\"ready\"");
    finished(&["emit", "a"], &[("DATABASE_URL", &url)]).exited(0);
    finished(&["emit", "b"], &[("DATABASE_URL", &url)]).exited(0);
    let again = finished(&["migrate"], &[("DATABASE_URL", &url)]).exited(0);
    assert_eq!(again.stdout, format!("schema version {SCHEMA_VERSION}, nothing to do\n"));
    until("both are published", || running.output().lines().count() == 2);
    running.signal("TERM");
    running.finish().exited(0);
}

#[tokio::test]
async fn the_file_is_made_only_where_the_url_says_so_and_by_one_of_many() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}?mode=rwc", folder.path().join("new.db").display());
    finished(&["--once"], &[("DATABASE_URL", &url), STDOUT]).exited(1).says(&["there is no database file"]);
    let migrators = [(); 4].map(|()| Running::start(relay(&["migrate"], &[("DATABASE_URL", &url)])));
    let applied: usize =
        migrators.map(|one| one.finish().exited(0).stdout.matches("applied").count()).into_iter().sum();
    assert_eq!(applied, usize::try_from(SCHEMA_VERSION).unwrap());
    finished(&["--once"], &[("DATABASE_URL", &url), STDOUT]).exited(0);
}

#[tokio::test]
async fn a_migration_that_fails_leaves_nothing_of_itself() {
    let store = Sqlite::unmigrated().await;
    let mut connection = store.connect().await;
    sql(&mut connection, "create table event_dead_letter (mine)").await;
    let failed = finished(&["migrate"], &[("DATABASE_URL", store.url())]).exited(1);
    assert!(failed.complaint().contains("table event_dead_letter already exists"), "{}", failed.stderr);
    assert_eq!(column(&mut connection, "select cast(version as text) from relay_schema_version").await, ["2"]);
    sql(&mut connection, "drop table event_dead_letter").await;
    finished(&["migrate"], &[("DATABASE_URL", store.url())]).exited(0);
    emit(&mut connection, "a", "").await;
}

#[tokio::test]
async fn an_event_is_emitted_whole_or_refused_without_its_payload() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let database = [("DATABASE_URL", store.url())];
    let bare = finished(&["emit", "order.created"], &database).exited(0);
    let all = [
        "emit",
        "order.created",
        "{\"total\":  1e2, \"name\": \"é\"}",
        "--aggregate-type=order",
        "--aggregate-id=42",
        "--source=shop",
        "--header=traceparent=00-ab=cd",
        "--header",
        "tenant=acme",
        "--correlation-id=req-1",
        "--causation-id=cmd-1",
        "--schema-version=3",
        "--priority=9",
        "--delay=2h",
    ];
    let whole = finished(&all, &database).exited(0);
    let rows = "select concat_ws('|', event_id, event_type, payload, source, aggregate_type, aggregate_id, headers,
                    correlation_id, causation_id, schema_version, priority, status,
                    round((julianday(available_at) - julianday(created_at)) * 24))
                from event_outbox order by id";
    let headers = r#"{"tenant":"acme","traceparent":"00-ab=cd"}"#;
    let expected = [
        format!("{}|order.created|{{}}||{{}}|1|0|pending|0.0", bare.stdout.trim_end()),
        format!(
            "{}|order.created|{{\"total\":  1e2, \"name\": \"é\"}}|shop|order|42|{headers}|req-1|cmd-1|3|9|scheduled|2.0",
            whole.stdout.trim_end()
        ),
    ];
    assert_eq!(column(&mut connection, rows).await, expected);

    for (args, part) in [
        (&["a", "{\"canary\": "][..], "the payload is not JSON: EOF while parsing a value at line 1 column 11"),
        (&["a", "canary"], "the payload is not JSON"),
        (&["a", "{\"canary\": 1} 2"], "the payload is not JSON"),
        (&["", "{\"canary\": 1}"], "1 to 128 characters"),
        (&["a", "--header=type=canary"], "\"type\""),
        (&["a", "{\"canary\": 1}", "--delay=10000years"], "the delay goes beyond the year 9999"),
    ] {
        let refused = finished(&[&["emit"], args].concat(), &database).exited(2);
        assert!(refused.complaint().contains(part), "{args:?}: {}", refused.stderr);
        assert!(!refused.stderr.contains("canary") && refused.stdout.is_empty(), "{args:?}: {}", refused.stderr);
    }
    assert_eq!(count(&mut connection, "event_outbox").await, 2);
}

#[tokio::test]
async fn a_check_says_what_it_found_and_changes_nothing() {
    let (wal, rollback) = (Sqlite::new().await, SqliteRollbackJournal::new().await);
    emit(&mut wal.connect().await, "a", "").await;
    let variables = [("DATABASE_URL", wal.url()), STDOUT];
    let text = finished(&["check"], &variables).exited(0);
    assert_eq!(text.stderr, "");
    let database = format!("\nok    database: {} with SQLite 3.", wal.path().display());
    for part in [
        database.as_str(),
        ", journal mode wal\n",
        &format!("\nok    schema: version {SCHEMA_VERSION}\n"),
        "\nok    writing: all that a relay writes, tried and taken back\n",
        "\nok    destination stdout: ",
    ] {
        assert!(text.stdout.contains(part), "{part:?} is missing in:\n{}", text.stdout);
    }
    let json: Value = serde_json::from_str(&finished(&["check", "--json"], &variables).exited(0).stdout).unwrap();
    let checks = json["checks"].as_array().unwrap().iter();
    let subjects: Vec<&str> = checks.map(|check| check["subject"].as_str().unwrap()).collect();
    assert_eq!(subjects, ["database", "schema", "names", "writing", "configuration", "destination stdout"]);
    assert_eq!(count(&mut wal.connect().await, "event_outbox").await, 1);

    let advised = finished(&["check"], &[("DATABASE_URL", rollback.url()), STDOUT]).exited(0).stdout;
    assert!(advised.contains(", journal mode delete; "), "{advised}");
    assert!(advised.contains("`pragma journal_mode = wal` would end that"), "{advised}");
    let files = std::fs::read_dir(rollback.path().parent().unwrap()).unwrap().count();
    assert_eq!(files, 1, "no file was created beside the application's");
}

#[tokio::test]
async fn a_file_whose_write_lock_is_never_free_is_told() {
    let store = Sqlite::new().await;
    let mut application = store.connect().await;
    sql(&mut application, "begin immediate").await;
    // Both commands wait for the busy timeout of 5 s.
    cannot_work(store.url(), &["database is locked", "another program holds the file's write lock"]);
    sql(&mut application, "commit").await;
    finished(&["--once"], &[("DATABASE_URL", store.url()), STDOUT]).exited(0);
}
