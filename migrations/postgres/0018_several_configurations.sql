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

-- What is owed to a destination that is no longer configured waits for a person, who has these two.
--
-- Relays that publish events of the same keys right now come first, and those that claim afterwards find the moved events
-- before later ones of their keys: so the order of a key holds among all that the new destination has not got yet.
do $$
begin
    execute pg_catalog.replace($function$
create function {schema}.move_owed(from_destination text, to_destination text) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
declare
    doubled bigint;
    moved bigint;
begin
    if from_destination = '' or to_destination = '' or from_destination = to_destination then
        raise exception 'move_owed: it takes the names of two destinations';
    end if;
    perform pg_catalog.pg_advisory_xact_lock(held.relation, held.partition)
    from (
        select distinct tableoid::integer as relation, (partition % 640::smallint)::integer as partition
        from {schema}.event_outbox where destination = from_destination
        order by 2
    ) held;
    -- An event that is owed to both is owed once.
    delete from {schema}.event_outbox o
    where o.destination = from_destination and exists (
        select from {schema}.event_outbox n
        where n.partition in (o.partition % 640::smallint, o.partition % 640::smallint + 640::smallint,
                              o.partition % 640::smallint + 1280::smallint, o.partition % 640::smallint + 1920::smallint)
          and n.id = o.id and n.destination = to_destination
    );
    get diagnostics doubled = row_count;
    update {schema}.event_outbox set destination = to_destination where destination = from_destination;
    get diagnostics moved = row_count;
    return doubled + moved;
end
$body$
    $function$, '{schema}', pg_catalog.quote_ident(pg_catalog.current_schema()::text));
    execute pg_catalog.replace($function$
create function {schema}.give_up_owed(from_destination text) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
declare
    given_up bigint;
begin
    if from_destination = '' then
        raise exception 'give_up_owed: it takes the name of a destination';
    end if;
    perform pg_catalog.pg_advisory_xact_lock(held.relation, held.partition)
    from (
        select distinct tableoid::integer as relation, (partition % 640::smallint)::integer as partition
        from {schema}.event_outbox where destination = from_destination
        order by 2
    ) held;
    with gone as (
        delete from {schema}.event_outbox where destination = from_destination returning *
    ), letters as (
        insert into {schema}.event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload,
            headers, correlation_id, causation_id, schema_version, priority, format, created_at, destination, attempts,
            error_code, error, first_failed_at, failed_at)
        select id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers, correlation_id, causation_id,
            schema_version, priority, greatest(format, 0::smallint), created_at, destination, greatest(attempts, 1), 'given_up',
            coalesce('given up by hand; before that: ' || last_error, 'given up by hand'),
            least(first_failed_at, pg_catalog.statement_timestamp()), pg_catalog.statement_timestamp()
        from gone
        order by id
    )
    insert into {schema}.event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, error, duration_ms,
        worker, processed_at)
    select event_id, id, event_type, destination, 'dead_lettered', greatest(attempts, 1), 'given_up: given up by hand', 0,
        session_user::text, pg_catalog.statement_timestamp()
    from gone;
    get diagnostics given_up = row_count;
    return given_up;
end
$body$
    $function$, '{schema}', pg_catalog.quote_ident(pg_catalog.current_schema()::text));
end
$$;

comment on function move_owed is 'Gives what is owed to one destination to another, in the order of keys. Returns how many events those were.';
comment on function give_up_owed is 'Makes dead letters of what is owed to a destination. Returns how many events those were.';

revoke execute on function move_owed, give_up_owed from public;

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
        execute pg_catalog.format('grant execute on function move_owed, give_up_owed to %s', grantee);
    end loop;
end
$$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 18';
