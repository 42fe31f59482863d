-- What `relay status` shows and no table has: how many events each destination took in the last minutes, and which
-- destinations a relay finds down.

create table event_tally (
    minute timestamptz not null,
    destination text not null,
    published bigint not null,
    retried bigint not null,
    dead_lettered bigint not null,
    constraint event_tally_pkey primary key (minute, destination)
) with (
    -- A row is updated every few seconds for a minute, and deleted soon: keep room on its page, and vacuum early.
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 500
);

comment on table event_tally is 'How many deliveries ended in each of the last 15 minutes, by destination. Relays that work add to it every 5 s.';
comment on column event_tally.minute is 'The beginning of the minute in which a relay counted them.';
comment on column event_tally.destination is 'The name of the destination; empty: the event was decided before it was routed.';
comment on column event_tally.published is 'Deliveries that the destination took.';
comment on column event_tally.retried is 'Attempts that failed and were charged; the events are tried again.';
comment on column event_tally.dead_lettered is 'Events that became dead letters.';

alter table event_relay add column trouble jsonb not null default '{}';

comment on column event_relay.trouble is 'The destinations that this relay finds down or misconfigured: since when, and why. It is written when that changes.';

-- Whoever may write what a relay writes about itself, or may read it, gets the like here.
do $$
declare
    grantee text;
    rights text;
begin
    for grantee, rights in
        select case a.grantee when 0::oid then 'public' else pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)::text) end,
            pg_catalog.string_agg(distinct a.privilege_type, ', ')
        from pg_catalog.pg_class c cross join lateral pg_catalog.aclexplode(c.relacl) a
        where c.oid = 'event_relay'::regclass::oid and a.privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
        group by a.grantee
    loop
        execute pg_catalog.format('grant %s on event_tally to %s', rights, grantee);
    end loop;
end
$$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 24';
