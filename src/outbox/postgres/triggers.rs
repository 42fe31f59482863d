//! The triggers of `event_outbox`, without which rows lie in no partition, or in the wrong one.

use sqlx::postgres::PgConnection;

use crate::outbox::OutboxError;
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, with_timeout};
use crate::outbox::postgres::sql::Sql;

/// Fills `partition` and enforces the rules. Runs after all other triggers before a row is written.
const RULES: &str = "zzz_event_outbox_rules";

/// Lets relays know that a row has moved.
const MOVED: &str = "event_outbox_moved";

/// Each trigger, whether it runs, and whether it may change a row that is written.
const TRIGGERS: &str = "
select t.tgname::text, t.tgenabled in ('O'::\"char\", 'A'::\"char\"),
       t.tgtype::int & 3 = 3 and t.tgtype::int & 20 <> 0, pg_catalog.quote_ident(t.tgname::text)
from pg_catalog.pg_trigger t
where t.tgrelid = '{schema}.event_outbox'::regclass::oid and not t.tgisinternal
order by t.tgname";

type Trigger = (String, bool, bool, String);

/// Fails if a trigger of ours is missing or disabled, or if another one changes rows after ours has run.
pub(super) async fn require(connection: &mut PgConnection, sql: Sql) -> Result<(), OutboxError> {
    let triggers: Vec<Trigger> = with_timeout("look at the triggers of event_outbox", STATEMENT_TIMEOUT, async {
        sql.query_as(TRIGGERS).persistent(false).fetch_all(connection).await
    })
    .await?;
    match trouble(&triggers) {
        Some(reason) => Err(OutboxError::Triggers { reason }),
        None => Ok(()),
    }
}

fn trouble(triggers: &[Trigger]) -> Option<String> {
    let create = [
        (
            RULES,
            "create trigger zzz_event_outbox_rules before insert or update on event_outbox \
             for each row execute function event_outbox_rules()",
        ),
        (
            MOVED,
            "create trigger event_outbox_moved after update on event_outbox referencing new table as moved \
             for each statement execute function event_outbox_moved()",
        ),
    ];
    for (name, create) in create {
        match triggers.iter().find(|(found, ..)| found == name) {
            None => return Some(format!("the trigger {name} is missing: {create}")),
            Some((_, false, ..)) => {
                let enable = if name == RULES { "enable always" } else { "enable" };
                return Some(format!(
                    "the trigger {name} is disabled: alter table event_outbox {enable} trigger {name}"
                ));
            }
            Some(_) => {}
        }
    }
    let later = triggers.iter().find(|(name, enabled, changes, ..)| *enabled && *changes && name.as_str() > RULES);
    later.map(|(_, _, _, name)| {
        format!(
            "the trigger {name} runs after {RULES}, so what it changes would not be checked, and may lie in the wrong \
             partition: alter trigger {name} on event_outbox rename to a name that sorts before {RULES}"
        )
    })
}

/// The highest id of all rows. That of each partition is found by the primary key.
const HIGHEST_ID: &str = "
with recursive scan(partition) as (
    (select o.partition from {schema}.event_outbox o order by o.partition, o.id limit 1)
    union all
    select (select o.partition from {schema}.event_outbox o where o.partition > scan.partition
            order by o.partition, o.id limit 1)
    from scan where scan.partition is not null
)
select pg_catalog.max((
    select o.id from {schema}.event_outbox o where o.partition = scan.partition
    order by o.partition desc, o.id desc limit 1
))
from scan where scan.partition is not null";

/// The sequence of the ids, and the last id that it gave: the sequence of the identity, or of the default if the application
/// has one of its own. A sequence that this role may not read is left out.
const SEQUENCE: &str = "
select s.name, pg_catalog.pg_sequence_last_value(s.name::regclass)
from (select coalesce(
    pg_catalog.pg_get_serial_sequence('{schema}.event_outbox', 'id'),
    (
        select pg_catalog.format('%I.%I', n.nspname, c.relname)
        from pg_catalog.pg_attribute a
        join pg_catalog.pg_attrdef f on f.adrelid = a.attrelid and f.adnum = a.attnum
        join pg_catalog.pg_depend d on d.objid = f.oid and d.classid = 'pg_catalog.pg_attrdef'::regclass::oid
         and d.refclassid = 'pg_catalog.pg_class'::regclass::oid
        join pg_catalog.pg_class c on c.oid = d.refobjid and c.relkind = 'S'
        join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where a.attrelid = '{schema}.event_outbox'::regclass::oid and a.attname = 'id'::name
          and case when c.relkind = 'S' then pg_catalog.has_sequence_privilege(c.oid, 'select') else false end
          and pg_catalog.has_schema_privilege(n.oid, 'usage')
        limit 1
    )
) as name) s";

/// Fails if rows have ids that the sequence has yet to give, as after a logical copy, which copies no sequences.
pub(super) async fn require_ids_ahead(connection: &mut PgConnection, sql: Sql) -> Result<String, OutboxError> {
    // In this order: while others insert, the sequence is never behind the ids that were read before.
    let (highest, sequence, last): (Option<i64>, Option<String>, Option<i64>) =
        with_timeout("look at the ids of event_outbox", STATEMENT_TIMEOUT, async {
            let highest = sql.query_scalar(HIGHEST_ID).persistent(false).fetch_one(&mut *connection).await?;
            let (sequence, last) = sql.query_as(SEQUENCE).persistent(false).fetch_one(connection).await?;
            Ok((highest, sequence, last))
        })
        .await?;
    match (highest, sequence) {
        (Some(highest), Some(sequence)) if highest > last.unwrap_or(0) => Err(OutboxError::Ids {
            highest,
            last: last.unwrap_or(0),
            cure: format!("select pg_catalog.setval('{}', {highest})", sequence.replace('\'', "''")),
        }),
        _ => Ok("new ones come after those that are there".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trigger(name: &str, enabled: bool, changes: bool) -> Trigger {
        (name.to_owned(), enabled, changes, format!("\"{name}\""))
    }

    #[test]
    fn what_runs_after_ours_and_changes_rows_is_named_and_what_does_not_is_fine() {
        let ours = || vec![trigger(MOVED, true, false), trigger(RULES, true, true)];
        assert_eq!(trouble(&ours()), None);
        let with = |name, enabled, changes| {
            let mut all = ours();
            all.push(trigger(name, enabled, changes));
            trouble(&all)
        };
        assert!(with("zzzz", true, true).is_some_and(|reason| reason.contains("the trigger \"zzzz\" runs after")));
        for (name, enabled, changes) in [("zzzz", false, true), ("zzzz", true, false), ("zzz", true, true)] {
            assert_eq!(with(name, enabled, changes), None);
        }
        let disabled = trouble(&[trigger(MOVED, true, false), trigger(RULES, false, true)]);
        assert!(disabled.is_some_and(|reason| reason.contains("enable always trigger zzz_event_outbox_rules")));
        assert!(
            trouble(&[trigger(RULES, true, true)])
                .is_some_and(|reason| reason.contains("event_outbox_moved is missing"))
        );
    }
}
