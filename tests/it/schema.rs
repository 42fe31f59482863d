//! The schema: migrations, what applications may rely on in SQL, and the rights of roles.

mod contract;
mod days;
mod migrate;
mod partitions;
mod plan;
pub(crate) mod roles;
mod wake;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

/// Inserts the first dead letter, with id 1, of an event `dead`.
const DEAD_LETTER: &str = "
insert into event_dead_letter (outbox_id, event_id, event_type, source, payload, headers, schema_version, priority, created_at,
                               destination, attempts, error_code, error, first_failed_at)
values (1, gen_random_uuid(), 'dead', '', '{}', '{}', 1, 0, now(), 'stdout', 1, 'X', 'x', now())";

/// Runs statements that may be refused. The error is its SQLSTATE and message.
async fn try_execute(connection: &mut PgConnection, sql: &str) -> Result<u64, String> {
    match connection.execute(AssertSqlSafe(sql.to_owned())).await {
        Ok(done) => Ok(done.rows_affected()),
        Err(sqlx::Error::Database(error)) => Err(format!("{} {}", error.code().unwrap_or_default(), error.message())),
        Err(error) => panic!("{sql}: {error}"),
    }
}

/// Returns the one value of a query.
async fn value<T>(connection: &mut PgConnection, sql: &str) -> T
where
    T: Send + Unpin + for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    let query = sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).persistent(false);
    query.fetch_one(connection).await.unwrap_or_else(|error| panic!("{sql}: {error}"))
}

/// Returns the one column of a query.
async fn values<T>(connection: &mut PgConnection, sql: &str) -> Vec<T>
where
    T: Send + Unpin + for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    let query = sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).persistent(false);
    query.fetch_all(connection).await.unwrap_or_else(|error| panic!("{sql}: {error}"))
}
