//! `relay check`: tries the database as a relay would use it.

use std::sync::atomic::AtomicBool;

use sqlx::postgres::PgConnection;
use sqlx::{Executor, Row};

use crate::outbox::error::CONNECTIONS_BESIDE;
use crate::outbox::partitions::PENDING;
use crate::outbox::postgres::connection::{
    ROW_SECURITY_ADVICE, STATEMENT_TIMEOUT, connect, connect_options, with_timeout,
};
use crate::outbox::postgres::question::Question;
use crate::outbox::postgres::sql::{Schema, Sql};
use crate::outbox::postgres::standstill::{self, TABLE_LOCKED};
use crate::outbox::postgres::{connection, exclusion, pause, proof, register, schema, shape, triggers};
use crate::outbox::register::Configuration;
use crate::outbox::standstill::Memory;
use crate::outbox::{Check, CheckRequest, OutboxError, Standstill};
use crate::secret::Secret;

/// The privileges that the relay needs: the words for a missing one, and the SQL condition for it.
const PRIVILEGES: [(&str, &str); 17] = [
    (
        "select, insert, update and delete on event_outbox",
        "select pg_catalog.has_table_privilege('{schema}.event_outbox', 'select') and pg_catalog.has_table_privilege('{schema}.event_outbox', 'insert') and pg_catalog.has_table_privilege('{schema}.event_outbox', 'update') and pg_catalog.has_table_privilege('{schema}.event_outbox', 'delete')",
    ),
    (
        "insert on event_processing_log",
        "select pg_catalog.has_table_privilege('{schema}.event_processing_log', 'insert')",
    ),
    ("insert on event_dead_letter", "select pg_catalog.has_table_privilege('{schema}.event_dead_letter', 'insert')"),
    ("insert on event_history", "select pg_catalog.has_table_privilege('{schema}.event_history', 'insert')"),
    (
        "execute on relay_add_days",
        "select pg_catalog.has_function_privilege('{schema}.relay_add_days(text, integer)', 'execute')",
    ),
    (
        "execute on relay_drop_days",
        "select pg_catalog.has_function_privilege('{schema}.relay_drop_days(text, interval)', 'execute')",
    ),
    (
        "select and update on event_outbox_epoch",
        "select pg_catalog.has_sequence_privilege('{schema}.event_outbox_epoch', 'select') and pg_catalog.has_sequence_privilege('{schema}.event_outbox_epoch', 'update')",
    ),
    (
        "select on event_outbox_moves and on the sequence of event_outbox.id",
        "select pg_catalog.has_sequence_privilege('{schema}.event_outbox_moves', 'select') and coalesce(pg_catalog.has_sequence_privilege(pg_catalog.pg_get_serial_sequence('{schema}.event_outbox', 'id'), 'select'), true)",
    ),
    (
        "select, insert, update and delete on event_relay_run",
        "select pg_catalog.has_table_privilege('{schema}.event_relay_run', 'select') and pg_catalog.has_table_privilege('{schema}.event_relay_run', 'insert') and pg_catalog.has_table_privilege('{schema}.event_relay_run', 'update') and pg_catalog.has_table_privilege('{schema}.event_relay_run', 'delete')",
    ),
    (
        "select, insert, update and delete on event_crash_suspect",
        "select pg_catalog.has_table_privilege('{schema}.event_crash_suspect', 'select') and pg_catalog.has_table_privilege('{schema}.event_crash_suspect', 'insert') and pg_catalog.has_table_privilege('{schema}.event_crash_suspect', 'update') and pg_catalog.has_table_privilege('{schema}.event_crash_suspect', 'delete')",
    ),
    (
        "select, insert, update and delete on event_relay",
        "select pg_catalog.has_table_privilege('{schema}.event_relay', 'select') and pg_catalog.has_table_privilege('{schema}.event_relay', 'insert') and pg_catalog.has_table_privilege('{schema}.event_relay', 'update') and pg_catalog.has_table_privilege('{schema}.event_relay', 'delete')",
    ),
    (
        "select, insert, update and delete on event_tally",
        "select pg_catalog.has_table_privilege('{schema}.event_tally', 'select') and pg_catalog.has_table_privilege('{schema}.event_tally', 'insert') and pg_catalog.has_table_privilege('{schema}.event_tally', 'update') and pg_catalog.has_table_privilege('{schema}.event_tally', 'delete')",
    ),
    (
        "select on event_pause and event_pause_changes",
        "select pg_catalog.has_table_privilege('{schema}.event_pause', 'select') and pg_catalog.has_table_privilege('{schema}.event_pause_changes', 'select')",
    ),
    (
        "select and update on event_relay_changes",
        "select pg_catalog.has_sequence_privilege('{schema}.event_relay_changes', 'select') and pg_catalog.has_sequence_privilege('{schema}.event_relay_changes', 'update')",
    ),
    ("execute on relay_outbox_id", "select pg_catalog.has_function_privilege('{schema}.relay_outbox_id()', 'execute')"),
    (
        "execute on relay_epoch_above",
        "select pg_catalog.has_function_privilege('{schema}.relay_epoch_above(bigint)', 'execute')",
    ),
    (
        "execute on relay_schema_version",
        "select pg_catalog.has_function_privilege('{schema}.relay_schema_version()', 'execute')",
    ),
];

/// Tries the database at `url` as a relay would use it. Stops at the first failure that makes the rest pointless.
pub async fn check(url: &Secret, pooled: bool, request: CheckRequest<'_>) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut push = |subject: &str, result: Result<String, OutboxError>| {
        let failed = result.is_err();
        checks.push(Check { subject: subject.to_owned(), result: result.map_err(|error| error.explain()) });
        failed
    };
    let mut connection = match async { connect(&connect_options(url, pooled)?).await }.await {
        Ok(connection) => connection,
        Err(error) => {
            push("database", Err(error));
            return checks;
        }
    };
    let server = transaction(&mut connection, async |connection| facts(connection, pooled).await).await;
    if push("database", server) | push("schema", transaction(&mut connection, schema::require_fit).await) {
        return checks;
    }
    let look = async |connection: &mut PgConnection| {
        let sql = sql(connection).await?;
        shape::require(connection, sql, request.usage).await
    };
    if let Err(error) = transaction(&mut connection, look).await {
        push("columns", Err(error));
        return checks;
    }
    if push("privileges", transaction(&mut connection, privileges).await) {
        return checks;
    }
    // A pooler has connections of its own.
    if !pooled {
        let limits = async |connection: &mut PgConnection| connections(connection, request.lanes).await;
        match transaction(&mut connection, limits).await {
            Ok(None) => {}
            Ok(Some(limit)) => {
                push("connections", Err(OutboxError::Connections { lanes: request.lanes, limit }));
            }
            Err(error) => {
                push("connections", Err(error));
            }
        }
    }
    // Row-level security is reported only if it hides rows.
    let hidden = match transaction(&mut connection, all_rows).await {
        Ok(()) => false,
        Err(error) => push("row-level security", Err(error)),
    };
    let standing = standstills(&mut connection, request).await.unwrap_or_else(|error| {
        push("standstills", Err(error));
        Vec::new()
    });
    // A table that is locked cannot be tried.
    if !hidden && standing.iter().all(|found| found.cause != TABLE_LOCKED) {
        // Without its triggers the table takes no row.
        if !push("triggers", transaction(&mut connection, triggers_fit).await) {
            push("recording", proof::check(&mut connection, request.usage).await);
        }
        push("ids", transaction(&mut connection, ids_ahead).await);
    }
    if let Err(error) = locks(&mut connection, url, pooled).await {
        push("advisory locks", Err(error));
    }
    match transaction(&mut connection, creators).await {
        Ok(None) => {}
        other => {
            push("create rights", other.map(Option::unwrap_or_default));
        }
    }
    let look = async |connection: &mut PgConnection| configurations(connection, request.configuration).await;
    let register_locked =
        standing.iter().any(|found| found.cause == TABLE_LOCKED && found.about.starts_with("event_relay "));
    // If row-level security hides this table, or somebody locks it, that is reported already.
    if !hidden && !register_locked {
        push("configuration", transaction(&mut connection, look).await);
    }
    // While that table is locked, this is reported already.
    if standing.iter().all(|found| found.cause != TABLE_LOCKED) {
        match transaction(&mut connection, pauses).await {
            Ok(None) => {}
            other => {
                push("pauses", other.map(Option::unwrap_or_default));
            }
        }
    }
    checks.extend(Check::standstills(standing));
    checks
}

/// Returns what operators have paused.
async fn pauses(connection: &mut PgConnection) -> Result<Option<String>, OutboxError> {
    let sql = sql(connection).await?;
    let read = pause::read(sql, connection);
    with_timeout("read event_pause", STATEMENT_TIMEOUT, read).await.map(|pauses| pauses.described())
}

/// Returns the other roles that may create objects in the schema of the tables. The relay runs nothing of theirs.
async fn creators(connection: &mut PgConnection) -> Result<Option<String>, OutboxError> {
    let (schema, creators): (String, Option<String>) =
        with_timeout("look at the rights to create", STATEMENT_TIMEOUT, async {
            sqlx::query_as(
                "select n.nspname::text, pg_catalog.string_agg(distinct
                 case a.grantee when 0::oid then 'everybody' else pg_catalog.pg_get_userbyid(a.grantee)::text end, ', ')
             from pg_catalog.pg_class c
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace
             left join lateral pg_catalog.aclexplode(coalesce(n.nspacl, pg_catalog.acldefault('n', n.nspowner))) a
                 on a.privilege_type = 'CREATE' and a.grantee <> n.nspowner and a.grantee <> c.relowner
             where c.oid = pg_catalog.to_regclass('event_outbox')::oid
             group by n.nspname",
            )
            .persistent(false)
            .fetch_one(connection)
            .await
        })
        .await?;
    Ok(creators.map(|creators| {
        format!(
            "warning: in schema {schema} may create objects besides its owner: {creators}; the relay runs nothing of theirs; \
             deploy/sql/roles.sql takes that right away with -v revoke_create=1"
        )
    }))
}

/// Runs `look` in a transaction of its own: a pooler may send each transaction to another server connection, and a statement
/// that fails ends its transaction.
async fn transaction<T>(
    connection: &mut PgConnection,
    look: impl AsyncFnOnce(&mut PgConnection) -> Result<T, OutboxError>,
) -> Result<T, OutboxError> {
    with_timeout(
        "begin",
        STATEMENT_TIMEOUT,
        connection.execute("begin; set local row_security = off; set local lock_timeout = '5s'"),
    )
    .await?;
    let found = look(connection).await;
    // If the connection is lost, the next look reports that.
    drop(with_timeout("end a look", STATEMENT_TIMEOUT, connection.execute("rollback")).await);
    found
}

/// Returns how this command sends statements.
async fn sql(connection: &mut PgConnection) -> Result<Sql, OutboxError> {
    let schema = with_timeout("look for event_outbox", STATEMENT_TIMEOUT, Schema::find(connection)).await?;
    Ok(Sql { schema: schema.unwrap_or_default(), persistent: false })
}

async fn triggers_fit(connection: &mut PgConnection) -> Result<String, OutboxError> {
    let sql = sql(connection).await?;
    triggers::require(connection, sql).await.map(|()| "as the relay needs them".to_owned())
}

async fn ids_ahead(connection: &mut PgConnection) -> Result<String, OutboxError> {
    let sql = sql(connection).await?;
    triggers::require_ids_ahead(connection, sql).await
}

async fn configurations(connection: &mut PgConnection, mine: &Configuration) -> Result<String, OutboxError> {
    let sql = sql(connection).await?;
    let rows = with_timeout("read event_relay", STATEMENT_TIMEOUT, register::rows(sql, connection)).await?;
    mine.check(&rows)
}

async fn standstills(
    connection: &mut PgConnection,
    CheckRequest { destinations, publish_timeout, usage, .. }: CheckRequest<'_>,
) -> Result<Vec<Standstill>, OutboxError> {
    let memory = Memory::default();
    loop {
        let sql = transaction(connection, sql).await?;
        let (bounds, behind_unknown_format) =
            (vec![i64::MIN; usize::from(PENDING.unsigned_abs())], &AtomicBool::default());
        let history = usage.history;
        let question = Question {
            sql,
            destinations,
            publish_timeout,
            history,
            brief: standstill::BRIEF,
            memory: &memory,
            bounds,
            behind_unknown_format,
        };
        let first = memory.is_empty();
        let (found, brief) =
            with_timeout("look for what stands still", STATEMENT_TIMEOUT, standstill::find(connection, &question))
                .await?;
        if !(first && brief) {
            return Ok(found);
        }
        tokio::time::sleep(standstill::BRIEF).await;
    }
}

/// Fails unless advisory locks exclude each other.
async fn locks(connection: &mut PgConnection, url: &Secret, pooled: bool) -> Result<(), OutboxError> {
    exclusion::prove(connection, &mut connect(&connect_options(url, pooled)?).await?).await
}

async fn all_rows(connection: &mut PgConnection) -> Result<(), OutboxError> {
    let sql = sql(connection).await?;
    require_all_rows(connection, sql).await
}

/// Fails where row-level security hides rows of our tables from this role, or might.
pub(super) async fn require_all_rows(connection: &mut PgConnection, sql: Sql) -> Result<(), OutboxError> {
    let query = "
        select pg_catalog.string_agg(t.relname::text, ', ' order by t.relname)
        from pg_catalog.pg_class o
        join pg_catalog.pg_class t on t.relnamespace = o.relnamespace
        where o.oid = '{schema}.event_outbox'::regclass::oid and t.relrowsecurity
          and t.relname in ('event_outbox', 'event_processing_log', 'event_dead_letter', 'event_history', 'event_relay_run',
                            'event_crash_suspect', 'event_relay')
          and pg_catalog.row_security_active(t.oid)";
    let hidden: Option<String> = with_timeout("look for row-level security", STATEMENT_TIMEOUT, async {
        sql.query_scalar(query).fetch_one(connection).await
    })
    .await?;
    hidden.map_or(Ok(()), |tables| Err(OutboxError::RowSecurity { tables, advice: ROW_SECURITY_ADVICE }))
}

async fn facts(connection: &mut PgConnection, pooled: bool) -> Result<String, OutboxError> {
    let row = with_timeout("look at the server", STATEMENT_TIMEOUT, async {
        sqlx::query(
            "select pg_catalog.current_database()::text as database, pg_catalog.current_setting('server_version') as version,
                    current_user::text as acting, session_user::text as login,
                    pg_catalog.pg_is_in_recovery() or pg_catalog.current_setting('transaction_read_only')::boolean
                        as read_only,
                    (select version from pg_catalog.pg_stat_ssl where pid = pg_catalog.pg_backend_pid() and ssl) as protocol,
                    pg_catalog.inet_client_addr() is null as local",
        )
        .persistent(false)
        .fetch_one(connection)
        .await
    })
    .await?;
    if row.get::<bool, _>("read_only") {
        return Err(connection::read_only());
    }
    let (database, version, user): (String, String, String) =
        (row.get("database"), row.get("version"), row.get("acting"));
    let login: String = row.get("login");
    let acts =
        if login == user { String::new() } else { format!(" (the login is {login}, its setting `role` is {user})") };
    let encryption = match (row.get::<Option<String>, _>("protocol"), row.get("local")) {
        // The server knows only the pooler's connection.
        _ if pooled => "by way of a pooler".to_owned(),
        (Some(protocol), _) => format!("encrypted ({protocol})"),
        (None, true) => "over a local socket".to_owned(),
        (None, false) => "not encrypted".to_owned(),
    };
    Ok(format!("{database} on PostgreSQL {version} as {user}{acts}, {encryption}"))
}

async fn privileges(connection: &mut PgConnection) -> Result<String, OutboxError> {
    let mut missing = Vec::new();
    let sql = sql(connection).await?;
    for (privilege, condition) in PRIVILEGES {
        let granted: bool = with_timeout("look at the privileges", STATEMENT_TIMEOUT, async {
            sql.query_scalar(condition).fetch_one(&mut *connection).await
        })
        .await?;
        if !granted {
            missing.push(privilege);
        }
    }
    if missing.is_empty() {
        return Ok("all granted".to_owned());
    }
    let advice = with_timeout("look at the memberships", STATEMENT_TIMEOUT, membership(connection, sql)).await?;
    Err(OutboxError::Privileges { missing: missing.join("; "), advice })
}

/// A role with the right to write to the tables, of which this role is a member without inheriting its rights.
const NOT_INHERITED: &str = "
select pg_catalog.quote_ident(r.rolname::text), pg_catalog.quote_ident(m.rolname::text), m.rolinherit
from pg_catalog.pg_roles r
join pg_catalog.pg_roles m on m.rolname = current_user
where r.oid <> m.oid and pg_catalog.pg_has_role(r.oid, 'member') and not pg_catalog.pg_has_role(r.oid, 'usage')
  and pg_catalog.has_table_privilege(r.oid, '{schema}.event_outbox', 'delete')
order by r.rolname = 'relay_worker'::name desc, r.rolname
limit 1";

/// Returns advice on how to give this role the rights that it lacks.
async fn membership(connection: &mut PgConnection, sql: Sql) -> Result<String, sqlx::Error> {
    let found: Option<(String, String, bool)> =
        sql.query_as(NOT_INHERITED).persistent(false).fetch_optional(&mut *connection).await?;
    if let Some((group, role, inherits)) = found {
        let cure = if inherits { "" } else { "`alter role {role} inherit`, and where PostgreSQL is 16 or later " };
        let cure = format!("{cure}`grant {group} to {role} with inherit true`").replace("{role}", &role);
        return Ok(format!("it is a member of {group} and does not inherit its rights: {cure}"));
    }
    let query = "select pg_catalog.quote_ident(session_user::text), pg_catalog.quote_ident(current_user::text)";
    let (login, role): (String, String) = sqlx::query_as(query).persistent(false).fetch_one(connection).await?;
    let acts = if login == role {
        String::new()
    } else {
        format!(
            "; {login} acts as {role} here: grant it to {role}, or let {login} keep its own rights (`alter role {login} reset role`)"
        )
    };
    Ok(format!("deploy/sql/roles.sql has all the relay needs{acts}"))
}

/// Returns the limit of this role or database that is too low for a relay with so many lanes, which needs
/// [`CONNECTIONS_BESIDE`] connections more.
async fn connections(connection: &mut PgConnection, lanes: usize) -> Result<Option<String>, OutboxError> {
    let query = "
        select pg_catalog.quote_ident(r.rolname::text), r.rolconnlimit, pg_catalog.quote_ident(d.datname::text), d.datconnlimit
        from pg_catalog.pg_roles r cross join pg_catalog.pg_database d
        where r.rolname = session_user and d.datname = pg_catalog.current_database() and not r.rolsuper";
    let found: Option<(String, i32, String, i32)> =
        with_timeout("look at the limits of connections", STATEMENT_TIMEOUT, async {
            sqlx::query_as(query).persistent(false).fetch_optional(connection).await
        })
        .await?;
    let Some((role, of_role, database, of_database)) = found else { return Ok(None) };
    let needed = lanes + CONNECTIONS_BESIDE;
    let low = |limit: i32| usize::try_from(limit).is_ok_and(|limit| limit < needed);
    Ok(match (low(of_role), low(of_database)) {
        (true, _) => Some(format!("role {role} may have {of_role}: `alter role {role} connection limit {needed}`")),
        (_, true) => Some(format!(
            "database {database} may have {of_database}: `alter database {database} connection limit {needed}`"
        )),
        _ => None,
    })
}
