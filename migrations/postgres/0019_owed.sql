-- What is owed to a destination that is no longer configured waits for a person, who has these two functions.
--
-- Relays that publish events of the same keys right now come first, and those that claim afterwards find the moved events
-- before later ones of their keys: so the order of a key holds among all that the new destination has not got yet.
--
-- Run again by `relay migrate` after the schema was renamed: see 0012_pinned_functions.sql, also for {home}.

do $relay$
declare
    path text := pg_catalog.current_setting('search_path');
    schema text := (
        select n.nspname from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where c.oid = 'event_outbox'::regclass::oid
    );
    definition text;
    grantee text;
begin
    -- So that names are looked up nowhere else.
    perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    foreach definition in array array[
$sql$
create or replace function {home}.move_owed(from_destination text, to_destination text) returns bigint
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
        from {home}.event_outbox where destination = from_destination
        order by 2
    ) held;
    -- An event that is owed to both is owed once.
    delete from {home}.event_outbox o
    where o.destination = from_destination and exists (
        select from {home}.event_outbox n
        where n.partition in (o.partition % 640::smallint, o.partition % 640::smallint + 640::smallint,
                              o.partition % 640::smallint + 1280::smallint, o.partition % 640::smallint + 1920::smallint)
          and n.id = o.id and n.destination = to_destination
    );
    get diagnostics doubled = row_count;
    update {home}.event_outbox set destination = to_destination where destination = from_destination;
    get diagnostics moved = row_count;
    return doubled + moved;
end
$body$
$sql$,
$sql$
create or replace function {home}.give_up_owed(from_destination text) returns bigint
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
        from {home}.event_outbox where destination = from_destination
        order by 2
    ) held;
    with gone as (
        delete from {home}.event_outbox where destination = from_destination returning *
    ), letters as (
        insert into {home}.event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload,
            headers, correlation_id, causation_id, schema_version, priority, format, created_at, destination, attempts,
            error_code, error, first_failed_at, failed_at)
        select id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers, correlation_id, causation_id,
            schema_version, priority, greatest(format, 0::smallint), created_at, destination, greatest(attempts, 1), 'given_up',
            coalesce('given up by hand; before that: ' || last_error, 'given up by hand'),
            least(first_failed_at, pg_catalog.statement_timestamp()), pg_catalog.statement_timestamp()
        from gone
        order by id
    )
    insert into {home}.event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, error, duration_ms,
        worker, processed_at)
    select event_id, id, event_type, destination, 'dead_lettered', greatest(attempts, 1), 'given_up: given up by hand', 0,
        session_user::text, pg_catalog.statement_timestamp()
    from gone;
    get diagnostics given_up = row_count;
    return given_up;
end
$body$
$sql$,
$sql$
comment on function {home}.move_owed(text, text) is
    'Gives what is owed to one destination to another, in the order of keys. Returns how many events those were.'
$sql$,
$sql$
comment on function {home}.give_up_owed(text) is
    'Makes dead letters of what is owed to a destination. Returns how many events those were.'
$sql$,
$sql$
revoke execute on function {home}.move_owed(text, text), {home}.give_up_owed(text) from public
$sql$
    ]
    loop
        execute pg_catalog.replace(definition, '{home}', pg_catalog.quote_ident(schema));
    end loop;
    -- Whoever may put dead letters back may call them.
    for grantee in
        select pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)::text)
        from pg_catalog.pg_proc p cross join lateral pg_catalog.aclexplode(p.proacl) a
        where p.oid = pg_catalog.to_regprocedure(pg_catalog.format('%I.redrive_dead_letter(bigint)', schema))::oid
          and a.grantee <> 0::oid
        group by a.grantee
    loop
        execute pg_catalog.format('grant execute on function %I.move_owed(text, text), %I.give_up_owed(text) to %s',
                                  schema, schema, grantee);
    end loop;
    perform pg_catalog.set_config('search_path', path, true);
end
$relay$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 19';
