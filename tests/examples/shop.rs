//! A small shop that emits events in the transactions that change its own tables.
//!
//! Usage: `DATABASE_URL=postgres://... cargo run --example shop`, on a database that `relay migrate` has prepared.

use outbox_relay::{NewEvent, emit};
use serde_json::json;
use sqlx::{Connection, PgConnection};

type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let mut database = PgConnection::connect(&std::env::var("DATABASE_URL")?).await?;
    sqlx::query("create table if not exists shop_order (id bigint primary key, customer text, total numeric)")
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
    Ok(())
}

/// Writes the order and its event in one transaction, so that either both exist afterwards or neither does.
async fn place_order(database: &mut PgConnection, id: i64, customer: &str, total: &str) -> Result<(), Error> {
    let mut tx = database.begin().await?;
    // The event comes first to show that the order does not matter: if the insert of the order fails, both roll back.
    let event = NewEvent::new("order.created", &json!({ "order": id, "customer": customer, "total": total }))?
        .source("shop")
        .key("order", id.to_string())
        .correlation_id(format!("request-{customer}-{id}"));
    emit(&mut *tx, event).await?;
    sqlx::query("insert into shop_order (id, customer, total) values ($1, $2, $3::numeric)")
        .bind(id)
        .bind(customer)
        .bind(total)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(())
}

async fn pay_order(database: &mut PgConnection, id: i64) -> Result<(), Error> {
    let mut tx = database.begin().await?;
    emit(&mut *tx, NewEvent::new("order.paid", &json!({ "order": id }))?.source("shop").key("order", id.to_string()))
        .await?;
    tx.commit().await?;
    Ok(())
}
