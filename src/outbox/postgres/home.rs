//! Finds the tables and functions of a database, and whether they belong together: somebody may have renamed the schema, moved
//! a table, or restored a part.

use sqlx::Executor;
use sqlx::postgres::PgConnection;

use crate::outbox::OutboxError;
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, with_timeout};

/// Describes the schema that has the first table `event_outbox` on the search path.
const FIND: &str = "
with home as (
    select n.nspname::text as name, pg_catalog.quote_ident(n.nspname::text) as identifier, c.oid as outbox
    from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where c.oid = pg_catalog.to_regclass('event_outbox')::oid
)
select h.name, h.identifier,
    array(
        select w.name
        from pg_catalog.unnest('{id,event_id,event_type,payload,headers,status,destination,attempts,partition}'::text[]) w(name)
        where not exists (
            select from pg_catalog.pg_attribute a
            where a.attrelid = h.outbox and a.attname = w.name::name and a.attnum > 0::smallint and not a.attisdropped
        )
    ),
    array(
        select w.name
        from pg_catalog.unnest('{event_processing_log,event_dead_letter,event_history,event_relay_run,event_crash_suspect,event_outbox_epoch,event_outbox_moves,event_relay,event_relay_changes,event_tally,event_pause,event_pause_changes}'::text[]) w(name)
        where pg_catalog.to_regclass(pg_catalog.format('%I.%I', h.name, w.name)) is null
    ),
    array(
        select w.name
        from pg_catalog.unnest('{event_outbox_wake(),event_outbox_moved(),redrive_dead_letter(bigint),\"move_owed(text,text)\",give_up_owed(text),\"pause_destination(text,text)\",\"resume_destination(text,text)\",\"relay_event_filter(jsonb,boolean)\",\"relay_note_action(text,jsonb,jsonb,bigint,uuid)\",\"redrive_dead_letters(jsonb,text,jsonb,integer,uuid,bigint[])\",\"discard_dead_letters(jsonb,text,integer,uuid,bigint[])\",\"purge_dead_letters(jsonb,integer,uuid,bigint[])\",\"relay_waiting_filter(text,jsonb,integer)\",\"relay_waiting_last(text,bigint)\",\"relay_hold_partitions(text,integer)\",\"count_waiting(text,jsonb)\",\"retry_waiting(jsonb,integer,bigint,uuid)\",\"give_up_waiting(jsonb,text,integer,bigint,uuid)\",\"move_waiting(text,text,jsonb,integer,bigint,uuid)\",\"relay_add_days(text,integer)\",\"relay_drop_days(text,interval)\",relay_epoch_above(bigint),relay_outbox_id(),relay_home(),relay_schema_version(),relay_schema_needs(),\"emit_event(text,jsonb,text,text,text,jsonb,text,text,integer,integer,interval,uuid)\"}'::text[]) w(name)
        where pg_catalog.to_regprocedure(pg_catalog.format('%I.%s', h.name, w.name)) is null
    ),
    (
        select f.nspname::text
        from pg_catalog.pg_trigger t
        join pg_catalog.pg_proc p on p.oid = t.tgfoid
        join pg_catalog.pg_namespace f on f.oid = p.pronamespace
        where t.tgrelid = h.outbox and t.tgname = 'event_outbox_wake'::name
    ),
    (
        select pg_catalog.btrim(pg_catalog.replace(p.prosrc, 'select', ''))
        from pg_catalog.pg_proc p
        where p.oid = pg_catalog.to_regprocedure(pg_catalog.format('%I.relay_home()', h.name))::oid
    ),
    pg_catalog.quote_literal(h.name)
from home h";

/// Moves functions to the schema of `event_outbox`, from the schema that has the functions of its triggers.
const GATHER: &str = "
do $relay$
declare
    home text;
    old oid;
    f record;
begin
    perform pg_catalog.set_config('lock_timeout', '10s', true);
    select n.nspname, p.pronamespace into home, old
    from pg_catalog.pg_trigger t
    join pg_catalog.pg_proc p on p.oid = t.tgfoid
    join pg_catalog.pg_class c on c.oid = t.tgrelid
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where t.tgrelid = 'event_outbox'::regclass::oid and t.tgname = 'event_outbox_wake'::name;
    for f in
        select n.nspname as schema, p.proname as name, pg_catalog.pg_get_function_identity_arguments(p.oid) as arguments
        from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
        where p.pronamespace = old
          and (
              pg_catalog.starts_with(p.proname::text, 'relay_')
              or p.proname = any (array['emit_event'::name, 'redrive_dead_letter'::name, 'move_owed'::name, 'give_up_owed'::name, 'pause_destination'::name, 'resume_destination'::name, 'redrive_dead_letters'::name, 'discard_dead_letters'::name, 'purge_dead_letters'::name, 'count_waiting'::name, 'retry_waiting'::name, 'give_up_waiting'::name, 'move_waiting'::name, 'event_partition'::name, 'event_is_valid'::name])
              or p.oid in (select t.tgfoid from pg_catalog.pg_trigger t where t.tgrelid = 'event_outbox'::regclass::oid
                           and pg_catalog.starts_with(p.proname::text, 'event_'))
          )
          and not exists (
              select from pg_catalog.pg_proc o join pg_catalog.pg_namespace h on h.oid = o.pronamespace
              where h.nspname = home::name and o.proname = p.proname and o.proargtypes = p.proargtypes
          )
    loop
        execute pg_catalog.format('alter function %I.%I(%s) set schema %I',
                                  f.schema, f.name, f.arguments, home);
    end loop;
end
$relay$";

/// The schema that has `event_outbox`.
///
/// The query names a table, and so sees what others have just committed. A query that names only functions may be answered from
/// what the session has cached, and so from before it waited for a lock.
#[derive(Debug)]
pub(super) struct Home {
    pub(super) name: String,
    /// The name as an identifier in SQL.
    pub(super) identifier: String,
    /// Columns of ours that the table lacks.
    lacks: Vec<String>,
    missing_tables: Vec<String>,
    missing_functions: Vec<String>,
    /// The schema of the function that the table's trigger calls.
    functions: Option<String>,
    /// The schema that the functions name, as a literal; `None` if they do not name one yet.
    pinned: Option<String>,
    literal: String,
}

type Row = (String, String, Vec<String>, Vec<String>, Vec<String>, Option<String>, Option<String>, String);

impl Home {
    /// Returns `None` if no table `event_outbox` is on the search path.
    pub(super) async fn find(connection: &mut PgConnection) -> Result<Option<Self>, OutboxError> {
        let found: Option<Row> = with_timeout("look for event_outbox", STATEMENT_TIMEOUT, async {
            sqlx::query_as(FIND).persistent(false).fetch_optional(connection).await
        })
        .await?;
        Ok(found.map(|row| {
            let (name, identifier, lacks, missing_tables, missing_functions, functions, pinned, literal) = row;
            Self { name, identifier, lacks, missing_tables, missing_functions, functions, pinned, literal }
        }))
    }

    /// Returns whether the schema has this function of ours.
    pub(super) fn has_function(&self, signature: &str) -> bool {
        !self.missing_functions.iter().any(|missing| missing == signature)
    }

    /// Returns the schema that has the functions, if `event_outbox` was moved without them.
    pub(super) fn left_behind(&self) -> Option<&str> {
        let has_version = self.has_function("relay_schema_version()");
        self.functions.as_deref().filter(|functions| !has_version && *functions != self.name)
    }

    /// Moves the functions to the schema of the table.
    pub(super) async fn gather(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        with_timeout("move the functions to the schema of event_outbox", STATEMENT_TIMEOUT, connection.execute(GATHER))
            .await
            .map(drop)
    }

    /// Fails where `relay migrate` cannot help, or where no version can be read.
    pub(super) fn require_ours(&self) -> Result<(), OutboxError> {
        let name = &self.name;
        let broken = |reason| Err(OutboxError::SchemaBroken { reason });
        if !self.lacks.is_empty() && self.has_function("relay_schema_version()") {
            let Self { identifier, lacks, .. } = self;
            let first = &lacks[0];
            return broken(format!(
                "event_outbox in schema {name} has no longer {}: `alter table {identifier}.event_outbox rename column ... to {first}` \
                 where somebody renamed it, or restore it from a backup",
                list("the column", lacks)
            ));
        }
        if !self.lacks.is_empty() {
            return broken(format!(
                "schema {name} has a table event_outbox that is not relay's, for it lacks {}: rename that table, or give relay a \
                 schema of its own (`create schema relay`, and ?options=-csearch_path%3Drelay in DATABASE_URL)",
                list("the column", &self.lacks)
            ));
        }
        if let Some(functions) = self.left_behind() {
            return broken(format!(
                "event_outbox lies in schema {name} and its functions in schema {functions}: run `relay migrate`, which brings them \
                 together"
            ));
        }
        if !self.has_function("relay_schema_version()") {
            return broken(format!(
                "schema {name} has the table event_outbox and not its functions, as after a dump of single tables: restore a dump \
                 of the whole schema (pg_dump -n {name}), or rename the tables, run `relay migrate`, and insert their rows anew"
            ));
        }
        Ok(())
    }

    /// Fails if something is missing, or in another schema, that `relay migrate` cannot create anew.
    pub(super) fn require_complete(&self) -> Result<(), OutboxError> {
        // This function is created once, with the identity of this outbox.
        let made_once = self.missing_functions.iter().filter(|function| *function == "relay_outbox_id()");
        let missing: Vec<String> = self.missing_tables.iter().chain(made_once).cloned().collect();
        if !missing.is_empty() {
            let Self { name, identifier, .. } = self;
            let reason = format!(
                "event_outbox lies in schema {name}, where {} not: move it there (`alter table ... set schema {identifier}`, \
                 `alter sequence`, `alter function`), or restore it from a backup",
                list("is", &missing)
            );
            return Err(OutboxError::SchemaBroken { reason });
        }
        Ok(())
    }

    /// Returns why `relay migrate` must create the functions anew, in words.
    pub(super) fn outdated(&self) -> Option<String> {
        let Self { name, pinned, .. } = self;
        if let Some(pinned) = pinned
            && *pinned != self.literal
        {
            return Some(format!(
                "the functions of schema {name} still work in schema {pinned}, as it was called before"
            ));
        }
        (!self.missing_functions.is_empty())
            .then(|| format!("schema {name} lacks {}", list("the function", &self.missing_functions)))
    }

    /// Fails unless tables and functions of this binary's schema belong together.
    pub(super) fn require_whole(&self) -> Result<(), OutboxError> {
        self.require_complete()?;
        match self.outdated() {
            None => Ok(()),
            Some(reason) => Err(OutboxError::SchemaBroken {
                reason: format!("{reason}: run `relay migrate`, which makes them anew"),
            }),
        }
    }
}

/// These names, with words before them.
fn list(words: &str, names: &[String]) -> String {
    format!("{words} {}", names.join(", "))
}
