//! The examples that README.md and the guide name, run in the same way as a user runs them.

use std::process::Command;

use crate::binary::finished;
use crate::harness::{column, count};
use crate::servers::database;
use crate::stores::{Sqlite, Store};

#[tokio::test]
async fn the_shop_emits_what_it_commits_and_nothing_else() {
    let database = database().await;
    let mut connection = database.connect().await;
    let output = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--locked", "--example", "shop"])
        .env("DATABASE_URL", database.url())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(count(&mut connection, "shop_order").await, 3);
    assert_eq!(
        column(
            &mut connection,
            "select concat_ws(' ', event_type, aggregate_id, payload ->> 'customer') from event_outbox order by id"
        )
        .await,
        ["order.created 1 ada", "order.created 2 grace", "order.created 3 ada", "order.paid 1"]
    );
}

#[tokio::test]
async fn the_embedded_shop_emits_what_it_commits_and_nothing_else() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let output = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--locked", "--example", "embedded_shop"])
        .arg(store.url().strip_prefix("sqlite:").unwrap())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(count(&mut connection, "shop_order").await, 3);
    let emitted =
        "select concat_ws(' ', event_type, aggregate_id, payload ->> 'customer') from event_outbox order by id";
    assert_eq!(
        column(&mut connection, emitted).await,
        ["order.created 1 ada", "order.created 2 grace", "order.created 3 ada", "order.paid 1"]
    );
}

#[tokio::test]
async fn handlers_of_the_application_take_all_events_in_the_order_of_their_keys() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("app.db");
    let output = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--locked", "--example", "handlers"])
        .arg(&file)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let (handled, last) = text.trim_end().rsplit_once('\n').unwrap();
    assert_eq!(last, "done: 8 handled, 2 tried again, 0 dead letters");
    for name in ["mail", "stock"] {
        let of = |order: &str| handled.lines().position(|line| line == format!("{name}: order {order}")).unwrap();
        assert!(of("1") < of("3") && of("2") < of("4"), "{handled}");
    }
    assert_eq!(handled.lines().count(), 8);
}

/// README.md shows what `relay --once` prints, and what the processing log has afterwards.
#[tokio::test]
async fn the_example_of_the_front_page_prints_what_it_shows() {
    let readme = include_str!("../../README.md");
    let between = |begin: &str, end: &str| {
        let (_, rest) = readme.split_once(begin).unwrap_or_else(|| panic!("README.md has no {begin:?}"));
        rest.split_once(end).unwrap_or_else(|| panic!("README.md has no {end:?} after {begin:?}")).0.to_owned()
    };
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}?mode=rwc", folder.path().join("shop.db").display());
    let variables = [("DATABASE_URL", url.as_str()), ("RELAY_STDOUT", "true"), ("RELAY_LOG", "warn")];

    let migrated = finished(&["migrate"], &variables).exited(0).stdout;
    assert_eq!(migrated.lines().last(), between("$ relay migrate | tail -n 1\n", "\n").lines().last());
    let mut shop = <sqlx::SqliteConnection as sqlx::Connection>::connect(&url).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(between("<<'SQL'\n", "SQL\n"))).execute(&mut shop).await.unwrap();

    let json = |line: &str| -> serde_json::Map<String, serde_json::Value> { serde_json::from_str(line).unwrap() };
    let (printed, shown) = (finished(&["--once"], &variables).exited(0).stdout, between("$ relay --once\n", "\n"));
    let (mut printed, mut shown) = (json(&printed), json(&shown));
    for of_its_own in ["id", "time"] {
        assert!(printed.remove(of_its_own).is_some() && shown.remove(of_its_own).is_some());
    }
    assert_eq!(printed, shown);
    let (_, statement) = readme.split_once("-column shop.db \"").unwrap();
    let (statement, table) = statement.split_once("\"\n").unwrap();
    let row: (i64, String, String, String, i64) =
        sqlx::query_as(sqlx::AssertSqlSafe(statement.to_owned())).fetch_one(&mut shop).await.unwrap();
    let shown: Vec<&str> = table.lines().nth(2).unwrap().split_whitespace().collect();
    assert_eq!(shown, [row.0.to_string(), row.1, row.2, row.3, row.4.to_string()]);
}
