//! What somebody else does to the tables for a while, in sessions of their own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::faults::Meddling;
use super::scorecard::Scorecard;

/// How long somebody tries to begin. They wait for a lock for half a second at a time, and let others through in between.
const TRIES_FOR: Duration = Duration::from_secs(10);

/// How long somebody may take to undo it; for machines that are busy with other things.
const UNDOES_WITHIN: Duration = Duration::from_secs(180);

/// What a run needs of it: the function of the trigger that swallows.
pub(super) const PREPARE: &str = "
create schema chaos;
create function chaos.swallow() returns trigger language plpgsql as $$ begin return null; end $$;";

/// Puts back what was in the days that were dropped, for the audit: the log said the truth about it.
const PUT_BACK: &str = "
do $$
declare kept regclass;
begin
    -- For a day that ended meanwhile.
    execute 'create table chaos.other_days partition of event_processing_log default';
    for kept in select oid from pg_class where relnamespace = 'chaos'::regnamespace and relname like 'kept%' loop
        execute format('insert into event_processing_log select * from %s', kept);
    end loop;
end
$$";

struct Doing {
    begin: String,
    /// Whether it holds as long as its session.
    session: bool,
    undo: Option<String>,
}

impl Doing {
    fn of(meddling: Meddling) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed);
        match meddling {
            Meddling::SwallowDeletes => Self {
                begin: format!(
                    "create trigger swallow_{number} before delete on event_outbox for each row execute function chaos.swallow()"
                ),
                session: false,
                undo: Some(format!("drop trigger if exists swallow_{number} on event_outbox")),
            },
            Meddling::RowSecurity(table) => Self {
                begin: format!("alter table {table} enable row level security"),
                session: false,
                undo: Some(format!("alter table {table} disable row level security")),
            },
            Meddling::Lock(table, mode) => {
                Self { begin: format!("begin; lock table {table} in {mode} mode"), session: true, undo: None }
            }
            Meddling::HoldSnapshot => Self {
                begin: "begin isolation level repeatable read; select count(*) from event_outbox".to_owned(),
                session: true,
                undo: None,
            },
            // What they said is kept elsewhere, so that the audit can hold it against what arrived.
            Meddling::DropDays => Self {
                begin: format!(
                    "begin;
                     lock table event_processing_log in access exclusive mode;
                     create table chaos.kept_{number} as select * from event_processing_log;
                     do $$
                     declare day regclass;
                     begin
                         for day in select inhrelid from pg_inherits where inhparent = 'event_processing_log'::regclass loop
                             execute format('drop table %s', day);
                         end loop;
                     end
                     $$;
                     commit"
                ),
                session: false,
                undo: None,
            },
        }
    }
}

/// Does it, for so long, and undoes it, whatever else happens to the server. Counts it where it took effect.
pub(super) fn meddle(url: &str, meddling: Meddling, lasts: Duration, name: &'static str, scorecard: &Scorecard) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let begun = Instant::now();
        let (doing, session) = loop {
            // Where the answer to one was lost, the next is another: a trigger of another name, another table to keep.
            let doing = Doing::of(meddling);
            match execute(url, &doing.begin).await {
                Ok(session) => {
                    scorecard.count(name);
                    break (doing, session);
                }
                Err(_) => {
                    if let Some(undo) = &doing.undo {
                        until_done(url, undo).await;
                    }
                    if begun.elapsed() > TRIES_FOR {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        let session = Some(session).filter(|_| doing.session);
        tokio::time::sleep(lasts).await;
        drop(session);
        if let Some(undo) = &doing.undo {
            until_done(url, undo).await;
        }
    });
}

/// After the last fault, and the last relay.
pub(super) async fn put_back(url: &str) {
    execute(url, PUT_BACK).await.unwrap();
}

async fn until_done(url: &str, statement: &str) {
    let begun = Instant::now();
    while let Err(error) = execute(url, statement).await {
        assert!(begun.elapsed() < UNDOES_WITHIN, "{statement}: {error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn execute(url: &str, statement: &str) -> Result<PgConnection, sqlx::Error> {
    let mut connection = PgConnection::connect(url).await?;
    sqlx::raw_sql("set lock_timeout = '500ms'").execute(&mut connection).await?;
    sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut connection).await?;
    Ok(connection)
}
