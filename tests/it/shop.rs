//! The examples of the README, run as a user would.

use std::process::Command;

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
