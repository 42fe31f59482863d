//! Pauses of destinations: what operators do, and what the relay reads. Triggers of `event_pause` do the rest.

use sqlx::sqlite::SqliteConnection;
use sqlx::{Connection, Executor};

use crate::outbox::error::OutboxError;
use crate::outbox::pause::{Pause, PauseOutcome, Pauses};
use crate::outbox::sqlite::connection::{open, run_query};
use crate::outbox::sqlite::mend::operator;
use crate::outbox::sqlite::schema;
use crate::outbox::sqlite::store::SqliteOutbox;

const READ: &str = "
select destination, event_type, paused_by, (julianday('now') - julianday(paused_at)) * 86400.0
from event_pause order by destination, event_type";

/// The destinations that relays have; and whether `?1` is one of them, or is owed an event.
const KNOWN: &str = "
select (select group_concat(distinct d.key) from event_relay r join json_each(r.destinations) d),
    exists (select 1 from event_relay r join json_each(r.destinations) d on d.key = ?1)
        or exists (select 1 from event_outbox where status = 'scheduled' and destination = ?1)";

/// The trigger does not know who does it.
const SIGN: &str = "
update event_operator_action set done_by = ?1
where id > ?2 and action = 'resume'";

/// Reads all pauses.
pub(super) async fn read(connection: &mut SqliteConnection) -> Result<Pauses, sqlx::Error> {
    let rows: Vec<(String, String, String, f64)> = sqlx::query_as(READ).fetch_all(connection).await?;
    let pause = |(destination, event_type, by, seconds)| Pause::new(destination, event_type, by, seconds);
    Ok(Pauses::new(rows.into_iter().map(pause).collect()))
}

impl SqliteOutbox {
    /// Pauses a destination, for the types of a glob.
    pub(super) async fn pause_destination(&self, name: &str, glob: Option<&str>) -> Result<PauseOutcome, OutboxError> {
        let mut connection = open(&self.config.url).await?;
        drop(schema::require_fit(&mut connection).await?);
        let glob = glob.unwrap_or("*");
        if name.is_empty() || glob.is_empty() {
            let reason = "it takes the name of a destination, and a glob of event types";
            return Ok(PauseOutcome::Refused(reason.to_owned()));
        }
        run_query("pause a destination", async {
            let (known, is_known): (Option<String>, bool) =
                sqlx::query_as(KNOWN).bind(name).fetch_one(&mut connection).await?;
            if let Some(known) = known.filter(|_| !is_known) {
                let known = known.replace(',', ", ");
                let reason = format!("no relay has a destination {name}; they have {known}");
                return Ok(PauseOutcome::Refused(reason));
            }
            let insert = "insert or ignore into event_pause (destination, event_type, paused_by) values (?1, ?2, ?3)";
            let query = sqlx::query(insert).bind(name).bind(glob).bind(operator());
            let added = query.execute(&mut connection).await?.rows_affected() > 0;
            Ok(if added { PauseOutcome::Done } else { PauseOutcome::Already })
        })
        .await
    }

    /// Ends the pauses of a destination, or the one of this glob.
    pub(super) async fn resume_destination(&self, name: &str, glob: Option<&str>) -> Result<PauseOutcome, OutboxError> {
        let mut connection = open(&self.config.url).await?;
        drop(schema::require_fit(&mut connection).await?);
        let delete = "delete from event_pause where destination = ?1 and (?2 is null or event_type = ?2)";
        let lifted = run_query("resume a destination", async {
            connection.execute("begin immediate").await?;
            let last: i64 = sqlx::query_scalar("select coalesce(max(id), 0) from event_operator_action")
                .fetch_one(&mut connection)
                .await?;
            let query = sqlx::query(delete).bind(name).bind(glob);
            let lifted = query.execute(&mut connection).await?.rows_affected();
            sqlx::query(SIGN).bind(operator()).bind(last).execute(&mut connection).await?;
            connection.execute("commit").await?;
            Ok(lifted)
        })
        .await?;
        drop(connection.close().await);
        Ok(if lifted > 0 {
            PauseOutcome::Done
        } else {
            let types = glob.map(|glob| format!(" for the types {glob}")).unwrap_or_default();
            PauseOutcome::Refused(format!("{name} is not paused{types}"))
        })
    }
}
