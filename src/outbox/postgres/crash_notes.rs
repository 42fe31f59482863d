//! The notes that end a crash loop, written by the side connection.

use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use crate::outbox::error::OutboxError;
use crate::outbox::postgres::store::PgOutbox;
use crate::outbox::{CrashNotes, Suspicion};

/// Counts the notes of other runs of the last ten minutes: a crash loop is faster than that. Notes are deleted after a day.
const BEGIN_RUN: &str = "
with old_runs as (delete from {schema}.event_relay_run where begun_at < pg_catalog.clock_timestamp() - interval '1 day'),
     old_suspects as (delete from {schema}.event_crash_suspect where noted_at < pg_catalog.clock_timestamp() - interval '1 day'),
     begun as (insert into {schema}.event_relay_run (run_id, worker) values ($1, $2) on conflict do nothing)
select pg_catalog.count(*) from {schema}.event_relay_run
where run_id <> $1 and begun_at > pg_catalog.clock_timestamp() - interval '10 minutes'";

const SUSPECT: &str = "
insert into {schema}.event_crash_suspect (event_id, run_id, together)
select distinct event_id, $2, $3 from pg_catalog.unnest($1::uuid[]) s(event_id)
on conflict (event_id, run_id) do update set together = excluded.together, noted_at = pg_catalog.clock_timestamp()";

/// Makes `together` negative, so that older relays do not count it as a crash of this event.
const OUTLIVED: &str = "
update {schema}.event_crash_suspect set together = -together
where event_id = any($1) and run_id = $2 and together > 0";

const FORGIVE: &str = "
delete from {schema}.event_crash_suspect s
using (
    select distinct on (event_id) event_id, run_id from {schema}.event_crash_suspect
    where event_id = any($1) and together = -1
    order by event_id, noted_at
) oldest
where s.event_id = oldest.event_id and s.run_id = oldest.run_id";

const WITHDRAW: &str = "
with notes as (delete from {schema}.event_crash_suspect where run_id = $1)
delete from {schema}.event_relay_run where run_id = $1";

/// The notes that other runs have left.
const SUSPICIONS: &str = "
select e.place::int as place, (pg_catalog.array_agg(pg_catalog.abs(s.together) order by s.noted_at desc))[1] as together,
       (pg_catalog.count(*) filter (where s.together = 1))::int as crashes_alone,
       (pg_catalog.count(*) filter (where s.together = -1))::int as deaths_alone
from pg_catalog.unnest($1::uuid[]) with ordinality e(event_id, place)
join {schema}.event_crash_suspect s on s.event_id = e.event_id and s.run_id <> $2
group by e.place";

impl CrashNotes for PgOutbox {
    async fn begin_run(&self, run: Uuid) -> Result<usize, OutboxError> {
        let others: i64 = self
            .on_side_connection("note that a relay begins", async |connection| {
                let query = self.sql().query_scalar(BEGIN_RUN).persistent(false).bind(run).bind(&self.config.worker);
                query.fetch_one(connection).await
            })
            .await?;
        Ok(usize::try_from(others).unwrap_or_default())
    }

    async fn end_run(&self, run: Uuid) -> Result<(), OutboxError> {
        self.on_side_connection("note that a relay ends", async |connection| {
            let query =
                self.sql().query("delete from {schema}.event_relay_run where run_id = $1").persistent(false).bind(run);
            query.execute(connection).await.map(drop)
        })
        .await
    }

    async fn withdraw(&self, run: Uuid) -> Result<(), OutboxError> {
        self.on_side_connection("take back the notes of a relay that ends", async |connection| {
            self.sql().query(WITHDRAW).persistent(false).bind(run).execute(connection).await.map(drop)
        })
        .await
    }

    async fn suspicions(&self, run: Uuid, events: &[Uuid]) -> Result<Vec<(usize, Suspicion)>, OutboxError> {
        let rows = self
            .on_side_connection("read the crash notes", async |connection| {
                self.sql().query(SUSPICIONS).persistent(false).bind(events).bind(run).fetch_all(connection).await
            })
            .await?;
        let number = |row: &PgRow, column| usize::try_from(row.get::<i32, &str>(column)).unwrap_or_default();
        let suspicion = |row| {
            let known = Suspicion {
                together: number(row, "together"),
                crashes_alone: number(row, "crashes_alone"),
                deaths_alone: number(row, "deaths_alone"),
            };
            (number(row, "place").saturating_sub(1), known)
        };
        Ok(rows.iter().map(suspicion).collect())
    }

    async fn mark(&self, run: Uuid, events: &[Uuid]) -> Result<(), OutboxError> {
        self.on_side_connection("note what is about to be published", async |connection| {
            let together = i32::try_from(events.len()).unwrap_or(i32::MAX);
            let query = self.sql().query(SUSPECT).persistent(false).bind(events).bind(run).bind(together);
            query.execute(connection).await.map(drop)
        })
        .await
    }

    async fn outlived(&self, run: Uuid, events: &[Uuid]) -> Result<(), OutboxError> {
        self.on_side_connection("note that a relay lives", async |connection| {
            self.sql().query(OUTLIVED).persistent(false).bind(events).bind(run).execute(connection).await.map(drop)
        })
        .await
    }

    async fn forgive(&self, events: &[Uuid]) -> Result<(), OutboxError> {
        self.on_side_connection("note that events are tried again", async |connection| {
            self.sql().query(FORGIVE).persistent(false).bind(events).execute(connection).await.map(drop)
        })
        .await
    }

    async fn clear(&self, events: &[Uuid]) -> Result<(), OutboxError> {
        self.on_side_connection("note what was published", async |connection| {
            let query = "delete from {schema}.event_crash_suspect where event_id = any($1)";
            self.sql().query(query).persistent(false).bind(events).execute(connection).await.map(drop)
        })
        .await
    }
}
