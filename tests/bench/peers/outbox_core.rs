//! The crates outbox-core and outbox-postgres. The manager publishes one event after the other and settles a batch at a time,
//! here of 1000 events instead of 100. No other setting changes the speed.
//! https://docs.rs/crate/outbox-core/latest (OutboxConfig), https://docs.rs/crate/outbox-postgres/latest (the schema)

use std::env::var;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use outbox_core::prelude::*;
use outbox_postgres::PostgresOutbox;
use redis::aio::MultiplexedConnection;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::sync::{Notify, watch};

const SCHEMA: &str = "
    create type status as enum ('Pending', 'Processing', 'Sent');
    create table outbox_events (
        id uuid primary key default gen_random_uuid(), idempotency_token text, event_type text not null,
        payload jsonb not null, status status not null default 'Pending',
        created_at timestamptz not null default now(), locked_until timestamptz not null default '-infinity');
    create index on outbox_events (locked_until, status) where status in ('Pending', 'Processing');
    create unique index on outbox_events (idempotency_token);
    create function notify_outbox_event() returns trigger language plpgsql as $$
        begin perform pg_notify('outbox_event', 'ping'); return new; end $$;
    create trigger outbox_events_notify after insert or update on outbox_events
        for each row execute function notify_outbox_event();";

const FILL: &str = "
    insert into outbox_events (event_type, payload)
    select 'order.created', jsonb_build_object('key', 'order:' || (n % $2), 'data',
        jsonb_build_object('n', n, 'pad', repeat('x', greatest($3 - 30, 0))))
    from generate_series(1, $1) n";

struct Sink {
    redis: MultiplexedConnection,
    left: AtomicUsize,
    done: Notify,
}

#[async_trait::async_trait]
impl Transport<Value> for Sink {
    async fn publish(&self, event: Event<Value>) -> Result<(), OutboxError> {
        let payload = event.payload.as_value();
        let mut xadd = redis::cmd("XADD");
        xadd.arg("events")
            .arg("*")
            .arg("id")
            .arg(event.id.as_uuid().to_string())
            .arg("type")
            .arg(event.event_type.as_str());
        xadd.arg("partitionkey").arg(payload["key"].as_str()).arg("data").arg(payload["data"].to_string());
        let answer = xadd.query_async::<()>(&mut self.redis.clone()).await;
        answer.map_err(|error| OutboxError::InfrastructureError(error.to_string()))?;
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.done.notify_one();
        }
        Ok(())
    }
}

#[tokio::main]
async fn main() {
    let number = |name| var(name).unwrap().parse::<i32>().unwrap();
    let events = number("EVENTS");
    let pool = PgPool::connect(&var("DATABASE_URL").unwrap()).await.unwrap();

    if std::env::args().nth(1).as_deref() == Some("fill") {
        sqlx::raw_sql(SCHEMA).execute(&pool).await.unwrap();
        sqlx::query(FILL).bind(events).bind(number("KEYS")).bind(number("PAYLOAD")).execute(&pool).await.unwrap();
        return;
    }

    let redis = redis::Client::open(var("REDIS_URL").unwrap()).unwrap();
    let sink = Arc::new(Sink {
        redis: redis.get_multiplexed_async_connection().await.unwrap(),
        left: AtomicUsize::new(events as usize),
        done: Notify::new(),
    });
    let mut config = OutboxConfig::<Value>::default();
    config.batch_size = 1000;
    let config = Arc::new(config);
    let (shutdown, watched) = watch::channel(false);
    let manager = OutboxManagerBuilder::new()
        .storage(Arc::new(PostgresOutbox::new(pool, config.clone())))
        .publisher(sink.clone())
        .config(config)
        .shutdown_rx(watched)
        .build()
        .unwrap();

    let begun = Instant::now();
    let running = tokio::spawn(manager.run());
    sink.done.notified().await;
    shutdown.send(true).unwrap();
    running.await.unwrap().unwrap(); // the last batch is settled
    println!("{}", json!({"events": events, "seconds": begun.elapsed().as_secs_f64()}));
}
