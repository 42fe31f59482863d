//! Relays and schemas of different versions: a database is migrated before its relays are replaced, and relays go back.

use outbox_relay::outbox::{postgres, sqlite};

use crate::binary::{Running, cannot_work, finished, relay, until};
use crate::harness::{emit, eventually, sql};
use crate::stores::{Client, Postgres, Sqlite, Store};

const STDOUT: (&str, &str) = ("RELAY_STDOUT", "true");

/// The version, in the SQL of a store.
struct Versions {
    /// The newest version that this binary knows.
    known: i32,
    /// SQL that sets the version, and the oldest version whose relays can work with it.
    set: fn(i32, i32) -> String,
}

const POSTGRES: Versions = Versions {
    known: postgres::migrate::SCHEMA_VERSION,
    set: |found, needs| {
        format!(
            "create or replace function relay_schema_version() returns integer language sql immutable as 'select {found}';
             create or replace function relay_schema_needs() returns integer language sql immutable as 'select {needs}'"
        )
    },
};

const SQLITE: Versions = Versions {
    known: sqlite::migrate::SCHEMA_VERSION,
    set: |found, needs| {
        format!(
            "drop view relay_schema_version; create view relay_schema_version as select {found} as version;
             drop view relay_schema_needs; create view relay_schema_needs as select {needs} as version"
        )
    },
};

async fn a_later_migration_that_fits_is_worked_with_and_one_that_does_not_is_refused<S: Store>(versions: Versions) {
    let Versions { known, set } = versions;
    let store = S::new().await;
    let mut connection = store.connect().await;
    let variables = [("DATABASE_URL", store.url()), STDOUT];
    let own = finished(&["check"], &variables).exited(0).stdout;
    assert!(own.contains(&format!("ok    schema: version {known}\n")), "{own}");
    let mut running = Running::start(relay(&[], &variables));
    running.until_log("\"message\":\"ready\"");

    // A later relay's migration with which this relay can work, up to the limit.
    for needs in [known - 1, known] {
        sql(&mut connection, format!("create table later_{needs} (id integer); {}", set(known + 3, needs))).await;
        let fits = format!("version {}; this relay knows up to {known}, and can work with it", known + 3);
        let check = finished(&["check"], &variables).exited(0).stdout;
        assert!(check.contains(&format!("ok    schema: {fits}\n")), "{check}");
        let migrated = finished(&["migrate"], &variables).exited(0).stdout;
        assert_eq!(migrated, format!("schema {fits}: nothing to do\n"));
    }
    emit(&mut connection, "to the one that was running", "").await;
    until("it is published", || running.output().lines().count() == 1);
    running.signal("TERM");
    running.finish().exited(0);
    emit(&mut connection, "to one that starts", "").await;
    finished(&["--once"], &variables).exited(0);
    assert_eq!(connection.number("select count(*) from event_outbox").await, 0);

    // A migration with which this relay cannot work. It does not end a running relay, because it breaks nothing at once.
    let mut running = Running::start(relay(&[], &variables));
    running.until_log("\"message\":\"ready\"");
    sql(&mut connection, set(known + 4, known + 1)).await;
    emit(&mut connection, "to the one that was running", "").await;
    until("it is published", || running.output().lines().count() == 1);
    running.signal("TERM");
    running.finish().exited(0);
    let refusal = format!(
        "the database has schema version {}, which needs a relay that knows version {}; this relay knows up to {known}: \
         install a newer relay",
        known + 4,
        known + 1
    );
    cannot_work(store.url(), &[&refusal]);
    for args in ["run", "migrate"] {
        // Waiting would not help, so it exits.
        let ended = finished(&[args], &[("DATABASE_URL", store.url()), STDOUT, ("RELAY_LOG", "error")]).exited(1);
        assert_eq!(ended.complaint(), refusal);
    }

    // The migration is undone.
    sql(&mut connection, set(known + 3, known)).await;
    emit(&mut connection, "after going back", "").await;
    finished(&["--once"], &variables).exited(0);
    eventually("it is published", async || connection.number("select count(*) from event_outbox").await == 0).await;

    // The other direction: a relay that is newer than its database.
    sql(&mut connection, set(known - 1, known - 1)).await;
    let older = format!("the database has schema version {}, this relay needs {known}: run `relay migrate`", known - 1);
    cannot_work(store.url(), &[&older]);
}

#[tokio::test]
async fn f78_a_later_migration_that_fits_is_worked_with_and_one_that_does_not_is_refused() {
    a_later_migration_that_fits_is_worked_with_and_one_that_does_not_is_refused::<Postgres>(POSTGRES).await;
}

#[tokio::test]
async fn f78_a_later_migration_of_a_file_that_fits_is_worked_with_and_one_that_does_not_is_refused() {
    a_later_migration_that_fits_is_worked_with_and_one_that_does_not_is_refused::<Sqlite>(SQLITE).await;
}
