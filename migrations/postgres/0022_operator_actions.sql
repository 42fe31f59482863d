-- What operators do with dead letters and with events that wait, and who did it.
--
-- A dead letter keeps its row when it is redriven. If the event fails again, that is a row of its own with the same event_id. So
-- the rows of one event show how often it was redriven, by whom and when.

create table event_operator_action (
    id bigint generated always as identity primary key,
    command uuid not null default pg_catalog.gen_random_uuid(),
    action text not null,
    filter jsonb not null default '{}',
    details jsonb not null default '{}',
    event_count bigint not null,
    done_by text not null default session_user,
    begun_at timestamptz not null default pg_catalog.clock_timestamp(),
    done_at timestamptz not null default pg_catalog.clock_timestamp(),
    constraint event_operator_action_command_key unique (command)
);

comment on table event_operator_action is 'What operators did: one row per command. Nothing here expires by itself.';
comment on column event_operator_action.id is 'In the order of the first transactions.';
comment on column event_operator_action.command is 'The command. One that works in several transactions adds to its row.';
comment on column event_operator_action.action is 'redrive, discard, purge, retry_now, give_up, move_owed, ...';
comment on column event_operator_action.filter is 'What was chosen: type, key, destination, error, since, until, id, state; empty: everything.';
comment on column event_operator_action.details is 'What else was given, such as the reason, or the destination that events were moved to.';
comment on column event_operator_action.event_count is 'How many events or dead letters were changed.';
comment on column event_operator_action.done_by is 'The login that did it: session_user.';
comment on column event_operator_action.begun_at is 'When its first transaction was.';
comment on column event_operator_action.done_at is 'When its last transaction was.';

do $$
begin
    perform pg_catalog.set_config('lock_timeout', '1s', true);
    alter table event_dead_letter
        add column redriven_by text,
        add column redriven_to text,
        add column discarded_at timestamptz,
        add column discarded_by text,
        add column discard_reason text;
end
$$;

comment on column event_dead_letter.redriven_by is 'The login that put it back; null: never, or before schema version 22.';
comment on column event_dead_letter.redriven_to is 'The destination that it was redriven to; null: its own.';
comment on column event_dead_letter.discarded_at is 'When somebody decided that it is not redriven; null: never.';
comment on column event_dead_letter.discarded_by is 'The login that decided it.';
comment on column event_dead_letter.discard_reason is 'Why it is not redriven.';

create or replace view event_dead_letter_summary as
select
    destination,
    event_type,
    error_code,
    pg_catalog.count(*) as event_count,
    pg_catalog.min(failed_at) as first_failed_at,
    pg_catalog.max(failed_at) as last_failed_at,
    pg_catalog.max(error) as sample_error
from event_dead_letter
where redriven_at is null and discarded_at is null
group by destination, event_type, error_code;

comment on view event_dead_letter_summary is 'Dead letters that are neither redriven nor discarded, by destination, type and error code.';

-- Whoever may put dead letters back may read what was done.
do $$
declare
    grantee text;
begin
    for grantee in
        select pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)::text)
        from pg_catalog.pg_proc p cross join lateral pg_catalog.aclexplode(p.proacl) a
        where p.oid = 'redrive_dead_letter(bigint)'::regprocedure::oid and a.grantee <> 0::oid
        group by a.grantee
    loop
        execute pg_catalog.format('grant select on event_operator_action to %s', grantee);
    end loop;
end
$$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 22';
