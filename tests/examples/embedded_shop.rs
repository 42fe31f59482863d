//! A small shop on a SQLite file of its own, which emits events in the transactions that change its tables.
//!
//! Usage: `cargo run --example embedded_shop shop.db`, on a file that `DATABASE_URL=sqlite:shop.db?mode=rwc relay migrate`
//! has prepared.

use std::time::Duration;

use outbox_relay::{NewEvent, emit};
use serde_json::json;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode};
use sqlx::{Connection, SqliteTransaction};

type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let file = std::env::args().nth(1).ok_or("usage: embedded_shop FILE")?;
    // The file belongs to the shop, so the shop decides on these settings. The relay does not change them.
    let options = SqliteConnectOptions::new()
        .filename(file)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(5));
    let mut database = SqliteConnection::connect_with(&options).await?;
    sqlx::query(
        "create table if not exists shop_order (id integer primary key, customer text, total text, paid integer)",
    )
    .execute(&mut database)
    .await?;
    for (id, customer, total) in [(1, "ada", "12.50"), (2, "grace", "7.00"), (3, "ada", "99.90")] {
        place_order(&mut database, id, customer, total).await?;
        println!("order {id} of {customer} committed");
    }
    pay_order(&mut database, 1).await?;
    println!("order 1 paid");
    match place_order(&mut database, 3, "mallory", "0.01").await {
        Ok(()) => return Err("an order number was given twice".into()),
        Err(_) => println!("order 3 of mallory rolled back: the number is taken"),
    }
    Ok(database.close().await?)
}

/// Writes the order and its event in one transaction, so that either both exist afterwards or neither does.
async fn place_order(database: &mut SqliteConnection, id: i64, customer: &str, total: &str) -> Result<(), Error> {
    let mut tx = begin(database).await?;
    // The event comes first to show that the order does not matter: if the insert of the order fails, both roll back.
    let event = NewEvent::new("order.created", &json!({ "order": id, "customer": customer, "total": total }))?
        .source("shop")
        .key("order", id.to_string())
        .correlation_id(format!("request-{customer}-{id}"));
    emit(&mut *tx, event).await?;
    sqlx::query("insert into shop_order (id, customer, total) values (?1, ?2, ?3)")
        .bind(id)
        .bind(customer)
        .bind(total)
        .execute(&mut *tx)
        .await?;
    Ok(tx.commit().await?)
}

async fn pay_order(database: &mut SqliteConnection, id: i64) -> Result<(), Error> {
    let mut tx = begin(database).await?;
    sqlx::query("update shop_order set paid = true where id = ?1").bind(id).execute(&mut *tx).await?;
    emit(&mut *tx, NewEvent::new("order.paid", &json!({ "order": id }))?.source("shop").key("order", id.to_string()))
        .await?;
    Ok(tx.commit().await?)
}

/// Begins with the write lock: a transaction that begins by reading cannot wait for another writer later.
async fn begin(database: &mut SqliteConnection) -> Result<SqliteTransaction<'_>, Error> {
    Ok(database.begin_with("begin immediate").await?)
}
