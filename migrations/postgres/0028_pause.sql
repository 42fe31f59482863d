-- Destinations that an operator has paused: their events wait, uncharged, until somebody resumes them.
--
-- Each claim reads the number of changes in the statement that reads its events, in one number with that of the register of
-- relays. It is in a table, not a sequence, so that a claim sees a pause and its number at the same moment: when it commits.

create table event_pause (
    destination text not null,
    event_type text not null default '*',
    paused_at timestamptz not null default pg_catalog.clock_timestamp(),
    paused_by text not null default session_user,
    constraint event_pause_pkey primary key (destination, event_type)
);

comment on table event_pause is 'What operators have paused: pause_destination adds a row, resume_destination deletes it.';
comment on column event_pause.destination is 'The destination that is given no events.';
comment on column event_pause.event_type is 'A glob, * and ?: the types that are held back, with later events of their keys; *: all.';
comment on column event_pause.paused_at is 'Since when.';
comment on column event_pause.paused_by is 'The login that did it: session_user.';

create table event_pause_changes (
    changes bigint not null
);

insert into event_pause_changes values (1);

-- It has no key, so that a subscription can copy it beside the row that is there; the greatest number counts. Without this,
-- whoever publishes all tables could not update it.
alter table event_pause_changes replica identity full;

comment on table event_pause_changes is 'One row: how often event_pause was changed.';
comment on column event_pause_changes.changes is 'Each claim reads it, and reads event_pause anew if it has changed.';

-- Whoever may look at the relays may look at the pauses.
do $$
declare
    grantee text;
begin
    for grantee in
        select case a.grantee when 0::oid then 'public' else pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)::text) end
        from pg_catalog.pg_class c cross join lateral pg_catalog.aclexplode(c.relacl) a
        where c.oid = 'event_relay'::regclass::oid and a.privilege_type = 'SELECT'
        group by a.grantee
    loop
        execute pg_catalog.format('grant select on event_pause, event_pause_changes to %s', grantee);
    end loop;
end
$$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 28';
