//! What another client does to the tables for a while, in a session of its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::faults::Meddling;
use super::scorecard::Scorecard;

/// How long it tries to begin. Each try waits half a second for its lock, and other sessions can get theirs between tries.
const TRIES_FOR: Duration = Duration::from_secs(10);

/// How long it may take to undo it. It is far more than needed, because other tests keep the machine busy.
const UNDOES_WITHIN: Duration = Duration::from_secs(180);

/// What must exist before a run: the trigger function that swallows deletes.
pub(super) const PREPARE: &str = "
create schema chaos;
create function chaos.swallow() returns trigger language plpgsql as $$ begin return null; end $$;";

/// Puts back the rows of dropped days for the audit, because these rows were correct.
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
    /// Whether it ends with its session.
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
            // The rows are copied elsewhere, so that the audit can compare them with what arrived.
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

/// Does it, waits, and undoes it, whatever else happens to the server. The scorecard counts it if it took effect.
pub(super) fn meddle(url: &str, meddling: Meddling, lasts: Duration, name: &'static str, scorecard: &Scorecard) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let begun = Instant::now();
        let (doing, session) = loop {
            // If the answer to a try was lost, the next try uses another name for its trigger or its copy.
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

/// Runs after the last fault and the last relay.
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
