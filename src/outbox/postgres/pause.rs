//! Pauses of destinations: what operators do, and what relays read.

use std::time::Duration;

use sqlx::postgres::PgConnection;

use crate::outbox::error::OutboxError;
use crate::outbox::pause::{Pause, PauseOutcome, Pauses};
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, query_failed, with_timeout};
use crate::outbox::postgres::schema;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::store::PgOutbox;

const READ: &str = "
select p.destination, p.event_type, p.paused_by,
       extract(epoch from pg_catalog.clock_timestamp() - p.paused_at)::float8
from {schema}.event_pause p
order by p.destination, p.event_type";

/// The claims that are held now, each by the name of its transaction.
const CLAIMS: &str = "
select distinct l.virtualtransaction from pg_catalog.pg_locks l
where l.locktype = 'advisory' and l.granted and l.objsubid = 2
  and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
  and l.classid = '{schema}.event_outbox'::regclass::oid and l.objid::bigint < 640
  and l.virtualtransaction not like '%/0'";

/// How often it is looked whether earlier claims have ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The codes with which the functions refuse what they are asked for.
const REFUSED: [&str; 2] = ["22023", "P0001"];

/// Reads all pauses.
pub(super) async fn read(sql: Sql, connection: &mut PgConnection) -> Result<Pauses, sqlx::Error> {
    let rows: Vec<(String, String, String, f64)> = sql.query_as(READ).persistent(false).fetch_all(connection).await?;
    let pause = |(destination, event_type, by, seconds)| Pause::new(destination, event_type, by, seconds);
    Ok(Pauses::new(rows.into_iter().map(pause).collect()))
}

impl PgOutbox {
    pub(super) async fn pause_destination(
        &self,
        destination: &str,
        event_type: Option<&str>,
    ) -> Result<PauseOutcome, OutboxError> {
        let mut connection = self.connect().await?;
        drop(schema::require_fit(&mut connection).await?);
        let sql = Sql { persistent: false, ..self.sql() };
        let query = sql.query_scalar("select {schema}.pause_destination($1, $2)");
        let query = query.bind(destination).bind(event_type.unwrap_or("*")).fetch_one(&mut connection);
        Ok(match answered("pause a destination", STATEMENT_TIMEOUT, query).await? {
            Ok(true) => PauseOutcome::Done,
            Ok(false) => PauseOutcome::Already,
            Err(reason) => PauseOutcome::Refused(reason),
        })
    }

    pub(super) async fn resume_destination(
        &self,
        destination: &str,
        event_type: Option<&str>,
    ) -> Result<PauseOutcome, OutboxError> {
        let mut connection = self.connect().await?;
        drop(schema::require_fit(&mut connection).await?);
        let sql = Sql { persistent: false, ..self.sql() };
        // Many events may have been held back, and are made due now.
        let long = "set statement_timeout = 0";
        with_timeout("resume a destination", STATEMENT_TIMEOUT, sqlx::Executor::execute(&mut connection, long)).await?;
        let query = sql.query_scalar::<i64>("select {schema}.resume_destination($1, $2)");
        let query = query.bind(destination).bind(event_type).fetch_one(&mut connection);
        Ok(match answered("resume a destination", Duration::from_secs(3600), query).await? {
            Ok(_) => PauseOutcome::Done,
            Err(reason) => PauseOutcome::Refused(reason),
        })
    }

    /// Waits until all claims have ended that are held now: they may have begun before the pause.
    pub(super) async fn earlier_claims_ended(&self, at_most: Duration) -> Result<bool, OutboxError> {
        let mut connection = self.connect().await?;
        let sql = Sql { persistent: false, ..self.sql() };
        let look = async |connection: &mut PgConnection| {
            let claims = sql.query_scalar::<String>(CLAIMS).fetch_all(connection);
            with_timeout("look for claims", STATEMENT_TIMEOUT, claims).await
        };
        let held = look(&mut connection).await?;
        let begun = std::time::Instant::now();
        while begun.elapsed() < at_most {
            let now = look(&mut connection).await?;
            if !held.iter().any(|claim| now.contains(claim)) {
                return Ok(true);
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        Ok(false)
    }
}

/// Returns the answer of a function, or the words with which it refuses.
async fn answered<T>(
    operation: &'static str,
    after: Duration,
    query: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<Result<T, String>, OutboxError> {
    match tokio::time::timeout(after, query).await {
        Err(_) => Err(OutboxError::TimedOut { operation, after }),
        Ok(Ok(answer)) => Ok(Ok(answer)),
        Ok(Err(sqlx::Error::Database(error))) if error.code().is_some_and(|code| REFUSED.contains(&code.as_ref())) => {
            let message = error.message();
            Ok(Err(message.split_once(": ").map_or(message, |(_, reason)| reason).to_owned()))
        }
        Ok(Err(error)) => Err(query_failed(operation, error)),
    }
}
