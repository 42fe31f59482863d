-- Which relays are at work, and which of several configurations routes.
--
-- Two relays with different destinations or routes would each give a part of the events to its own. So each relay registers,
-- and the configuration of the one that started last routes; the others leave events that are not routed yet alone.

create sequence event_relay_changes cache 1;

-- Whoever reads it before the first change, and after it, must read two numbers.
select pg_catalog.nextval('event_relay_changes');

comment on sequence event_relay_changes is 'Raised after each change of event_relay; each claim reads it, and looks at that table where it has changed.';

create table event_relay (
    id bigint not null,
    worker text not null,
    version text not null,
    schema_version integer not null,
    once boolean not null,
    since timestamptz not null default pg_catalog.clock_timestamp(),
    fingerprint text not null,
    destinations jsonb not null,
    routes jsonb not null,
    pid integer,
    seen_at timestamptz not null default pg_catalog.clock_timestamp(),
    looked_at timestamptz not null default pg_catalog.clock_timestamp(),
    hung boolean not null default false,
    constraint event_relay_pkey primary key (id)
);

comment on table event_relay is 'Relays at work. The configuration of the one with the highest id routes new events.';
comment on column event_relay.id is 'A later start has a higher one.';
comment on column event_relay.worker is 'Host name and process id.';
comment on column event_relay.version is 'The version of the program.';
comment on column event_relay.schema_version is 'The newest schema that it knows.';
comment on column event_relay.once is 'A run of relay --once, which never supersedes another relay.';
comment on column event_relay.since is 'When it started.';
comment on column event_relay.fingerprint is 'The same for equal destinations and routes.';
comment on column event_relay.destinations is 'What each destination is, without addresses and secrets.';
comment on column event_relay.routes is 'The routes in words, without the values of headers.';
comment on column event_relay.pid is 'The session that holds the advisory lock 2000000 + id as long as the relay lives; null behind a pooler.';
comment on column event_relay.seen_at is 'When it said last that it lives; it does so only while there are several configurations.';
comment on column event_relay.looked_at is 'When it looked for events last, as it said then.';
comment on column event_relay.hung is 'It left events that were due, and another relay has taken over.';

-- Whoever may what a relay may, or what a person who redrives may, gets the like here.
do $$
declare
    grantee text;
begin
    for grantee in
        select case a.grantee when 0::oid then 'public' else pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)::text) end
        from pg_catalog.pg_class c cross join lateral pg_catalog.aclexplode(c.relacl) a
        where c.oid = 'event_outbox'::regclass::oid and a.privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
        group by a.grantee
        having pg_catalog.count(distinct a.privilege_type) = 4::bigint
    loop
        execute pg_catalog.format('grant select, insert, update, delete on event_relay to %s', grantee);
        execute pg_catalog.format('grant select, update on sequence event_relay_changes to %s', grantee);
    end loop;
    for grantee in
        select case a.grantee when 0::oid then 'public' else pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)::text) end
        from pg_catalog.pg_proc p cross join lateral pg_catalog.aclexplode(p.proacl) a
        where p.oid = 'redrive_dead_letter(bigint)'::regprocedure::oid and a.grantee <> 0::oid
        group by a.grantee
    loop
        execute pg_catalog.format('grant select on event_relay to %s', grantee);
    end loop;
end
$$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 18';
