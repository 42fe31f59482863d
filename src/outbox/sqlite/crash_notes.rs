//! The notes that end a crash loop. Each is written on its own connection, because they are rare.

use sqlx::Executor;
use uuid::Uuid;

use crate::outbox::sqlite::connection::run_query;
use crate::outbox::sqlite::store::SqliteOutbox;
use crate::outbox::{CrashNotes, OutboxError, Suspicion};

const FORGET_OLD: &str = "
delete from event_relay_run where begun_at < strftime('%Y-%m-%d %H:%M:%f', 'now', '-1 day');
delete from event_crash_suspect where noted_at < strftime('%Y-%m-%d %H:%M:%f', 'now', '-1 day')";

/// Counts the notes of other runs from the last ten minutes, because a crash loop is faster than that. Notes are deleted
/// after a day.
const OTHER_RUNS: &str = "
select count(*) from event_relay_run
where run_id <> ?1 and begun_at > strftime('%Y-%m-%d %H:%M:%f', 'now', '-10 minutes')";

const SUSPECT: &str = "
insert into event_crash_suspect (event_id, run_id, together)
select distinct e.value, ?2, ?3 from json_each(?1) e where true
on conflict (event_id, run_id) do update set together = excluded.together, noted_at = excluded.noted_at";

/// Makes `together` negative, so that older relays do not count the note as a crash of this event.
const OUTLIVED: &str = "
update event_crash_suspect set together = -together
where event_id in (select value from json_each(?1)) and run_id = ?2 and together > 0";

const FORGIVE: &str = "
delete from event_crash_suspect
where (event_id, run_id) in (
    select event_id, run_id from (
        select event_id, run_id, min(noted_at) from event_crash_suspect
        where event_id in (select value from json_each(?1)) and together = -1
        group by event_id
    )
)";

/// Reads the notes that other runs have left. SQLite takes `together` from the row with the highest time.
const SUSPICIONS: &str = "
select e.key, abs(s.together), sum(s.together = 1), sum(s.together = -1), max(s.noted_at)
from json_each(?1) e join event_crash_suspect s on s.event_id = e.value and s.run_id <> ?2
group by e.key";

impl CrashNotes for SqliteOutbox {
    async fn begin_run(&self, run: Uuid) -> Result<usize, OutboxError> {
        let mut connection = self.connect().await?;
        let others: i64 = run_query("note that a relay begins", async {
            connection.execute(FORGET_OLD).await?;
            sqlx::query("insert or ignore into event_relay_run (run_id, worker) values (?1, ?2)")
                .bind(run.to_string())
                .bind(&self.config.worker)
                .execute(&mut *connection)
                .await?;
            sqlx::query_scalar(OTHER_RUNS).bind(run.to_string()).fetch_one(&mut *connection).await
        })
        .await?;
        Ok(usize::try_from(others).unwrap_or_default())
    }

    async fn end_run(&self, run: Uuid) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        let query = sqlx::query("delete from event_relay_run where run_id = ?1").bind(run.to_string());
        run_query("note that a relay ends", query.execute(&mut *connection)).await.map(drop)
    }

    async fn withdraw(&self, run: Uuid) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        run_query("take back the notes of a relay that ends", async {
            for table in
                ["delete from event_crash_suspect where run_id = ?1", "delete from event_relay_run where run_id = ?1"]
            {
                sqlx::query(table).bind(run.to_string()).execute(&mut *connection).await?;
            }
            Ok(())
        })
        .await
    }

    async fn suspicions(&self, run: Uuid, events: &[Uuid]) -> Result<Vec<(usize, Suspicion)>, OutboxError> {
        let mut connection = self.connect().await?;
        let rows: Vec<(i64, i64, i64, i64, String)> = run_query("read the crash notes", async {
            sqlx::query_as(SUSPICIONS).bind(json(events)).bind(run.to_string()).fetch_all(&mut *connection).await
        })
        .await?;
        let number = |number: i64| usize::try_from(number).unwrap_or_default();
        let suspicion = |(place, together, crashes, deaths, _)| {
            let (crashes_alone, deaths_alone) = (number(crashes), number(deaths));
            (number(place), Suspicion { together: number(together), crashes_alone, deaths_alone })
        };
        Ok(rows.into_iter().map(suspicion).collect())
    }

    async fn mark(&self, run: Uuid, events: &[Uuid]) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        let together = i64::try_from(events.len()).unwrap_or(i64::MAX);
        let query = sqlx::query(SUSPECT).bind(json(events)).bind(run.to_string()).bind(together);
        run_query("note what is about to be published", query.execute(&mut *connection)).await.map(drop)
    }

    async fn outlived(&self, run: Uuid, events: &[Uuid]) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        let query = sqlx::query(OUTLIVED).bind(json(events)).bind(run.to_string());
        run_query("note that a relay lives", query.execute(&mut *connection)).await.map(drop)
    }

    async fn forgive(&self, events: &[Uuid]) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        let query = sqlx::query(FORGIVE).bind(json(events));
        run_query("note that events are tried again", query.execute(&mut *connection)).await.map(drop)
    }

    async fn clear(&self, events: &[Uuid]) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        let query = "delete from event_crash_suspect where event_id in (select value from json_each(?1))";
        let query = sqlx::query(query).bind(json(events));
        run_query("note what was published", query.execute(&mut *connection)).await.map(drop)
    }
}

fn json(events: &[Uuid]) -> String {
    serde_json::json!(events).to_string()
}
