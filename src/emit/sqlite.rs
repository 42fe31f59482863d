//! The insert of one event into a SQLite file.

use sqlx::Sqlite;
use sqlx::query::Query;
use sqlx::sqlite::SqliteArguments;

use crate::emit::{NewEvent, OutboxDatabase};

impl OutboxDatabase for Sqlite {
    fn insert(event: NewEvent) -> Query<'static, Self, SqliteArguments> {
        sqlx::query(
            "insert into event_outbox (event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                                       correlation_id, causation_id, schema_version, priority, available_at, status)
             values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, strftime('%Y-%m-%d %H:%M:%f', 'now', ?12 || ' seconds'),
                     case when ?12 > 0 then 'scheduled' else 'pending' end)",
        )
        .bind(event.event_id.to_string())
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

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Connection, SqliteConnection};

    use crate::{NewEvent, emit};

    #[tokio::test]
    async fn what_commits_is_emitted_and_what_rolls_back_is_not() {
        let mut database = SqliteConnection::connect("sqlite::memory:").await.expect("memory is there");
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/sqlite");
        let mut files: Vec<_> =
            std::fs::read_dir(folder).expect("a folder").map(|file| file.expect("a file").path()).collect();
        files.sort();
        for file in files {
            let migration = AssertSqlSafe(std::fs::read_to_string(file).expect("a migration"));
            sqlx::raw_sql(migration).execute(&mut database).await.expect("the migration is valid");
        }
        for (order, kept) in [("41", false), ("42", true)] {
            let mut tx = database.begin().await.expect("a transaction");
            emit(&mut *tx, NewEvent::from_json("order.created", "{}").key("order", order)).await.expect("an insert");
            if kept { tx.commit().await } else { tx.rollback().await }.expect("an end");
        }
        let emitted: Vec<String> = sqlx::query_scalar("select aggregate_id from event_outbox")
            .fetch_all(&mut database)
            .await
            .expect("a table");
        assert_eq!(emitted, ["42"]);
    }
}
