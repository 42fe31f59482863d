//! Handlers in the application's own process, on a SQLite file: no broker, and no other program.
//!
//! Usage: `cargo run --example handlers app.db`. The file is created if it does not exist.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outbox_relay::outbox::sqlite::{SqliteOutbox, migrate::migrate};
use outbox_relay::outbox::{OutboxConfig, Usage};
use outbox_relay::relay::{Endpoint, Policy, Relay, RelayConfig};
use outbox_relay::retry::RetryPolicy;
use outbox_relay::route::Router;
use outbox_relay::secret::Secret;
use outbox_relay::sink::{HandlerError, handler};
use outbox_relay::{NewEvent, emit};
use serde_json::json;
use sqlx::Connection;
use sqlx::sqlite::SqliteConnection;
use tokio_util::sync::CancellationToken;

type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let file = std::env::args().nth(1).ok_or("usage: handlers FILE")?;
    let url = Secret::inline(format!("sqlite:{file}?mode=rwc"));
    migrate(&url).await?;

    // The application writes each order and its event in one transaction.
    let mut database = SqliteConnection::connect(&format!("sqlite:{file}")).await?;
    for order in 1..=4 {
        let mut tx = database.begin_with("begin immediate").await?;
        let event = NewEvent::new("order.created", &json!({ "order": order }))?.key("order", (order % 2).to_string());
        emit(&mut *tx, event).await?;
        tx.commit().await?;
    }

    // The first handler fails once for each event of orders 1 and 3, as a mail server sometimes does.
    let failed = Mutex::new(HashSet::new());
    let mail = handler(move |event| {
        let first = failed.lock().is_ok_and(|mut failed| failed.insert(event.event_id));
        async move {
            let payload: serde_json::Value = serde_json::from_slice(event.payload.as_slice())?;
            if first && payload["order"].as_i64().is_some_and(|order| order % 2 == 1) {
                return Err(HandlerError::event("the mail server is busy"));
            }
            println!("mail: order {}", payload["order"]);
            Ok(())
        }
    });
    let stock = handler(|event| async move {
        let payload: serde_json::Value = serde_json::from_slice(event.payload.as_slice())?;
        println!("stock: order {}", payload["order"]);
        Ok(())
    });

    let policy = Policy {
        retry: RetryPolicy { base: Duration::from_millis(50), ..Policy::default().retry },
        ..Policy::default()
    };
    let endpoints = vec![
        Endpoint { name: "mail".to_owned(), sink: Arc::new(mail), policy: policy.clone() },
        Endpoint { name: "stock".to_owned(), sink: Arc::new(stock), policy },
    ];
    let usage = Usage { several_destinations: true, history: false };
    let outbox = SqliteOutbox::new(OutboxConfig { usage, ..OutboxConfig::new(url) });
    let relay = Relay::new(outbox, endpoints, Router::new(vec![], 2), RelayConfig::default());

    // An application calls `run` at its start, beside its own work, and stops it with the token.
    let stop = CancellationToken::new();
    let running = tokio::spawn({
        let (relay, stop) = (Arc::clone(&relay), stop.clone());
        async move { relay.run(stop).await }
    });
    while sqlx::query_scalar::<_, i64>("select count(*) from event_outbox").fetch_one(&mut database).await? > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop.cancel();
    let tally = running.await??;
    println!("done: {} handled, {} tried again, {} dead letters", tally.published, tally.retried, tally.dead_lettered);
    Ok(())
}
