//! The insert of one event into PostgreSQL.

use sqlx::Postgres;
use sqlx::postgres::PgArguments;
use sqlx::query::Query;

use crate::emit::{NewEvent, OutboxDatabase};

impl OutboxDatabase for Postgres {
    fn insert(event: NewEvent) -> Query<'static, Self, PgArguments> {
        sqlx::query(
            "insert into event_outbox (event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                                       correlation_id, causation_id, schema_version, priority, available_at, status)
             values ($1, $2, $3, $4, $5, $6::text::jsonb, $7::text::jsonb, $8, $9, $10, $11,
                     pg_catalog.now() + pg_catalog.make_interval(secs => $12), case when $12 > 0 then 'scheduled' else 'pending' end)",
        )
        .bind(event.event_id)
        .bind(event.event_type)
        .bind(event.source)
        .bind(event.aggregate_type)
        .bind(event.aggregate_id)
        .bind(event.payload)
        .bind(serde_json::to_string(&event.headers).expect("a map of strings is JSON"))
        .bind(event.correlation_id)
        .bind(event.causation_id)
        .bind(event.schema_version)
        .bind(event.priority)
        .bind(event.delay.as_secs_f64())
    }
}
