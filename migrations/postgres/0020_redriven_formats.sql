-- A dead letter of another format goes back as what it was: as format 0 it would be published as if it were JSON.
--
-- Run again by `relay migrate` after the schema was renamed: see 0012_pinned_functions.sql, also for {home}.

do $relay$
declare
    path text := pg_catalog.current_setting('search_path');
    schema text := (
        select n.nspname from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where c.oid = 'event_outbox'::regclass::oid
    );
begin
    -- So that names are looked up nowhere else.
    perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    -- Within a literal a quote of the name is doubled.
    execute pg_catalog.replace(pg_catalog.replace($sql$
create or replace function {home}.redrive_dead_letter(dead_letter_id bigint) returns uuid
language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
declare
    dead {home}.event_dead_letter;
begin
    update {home}.event_dead_letter set redriven_at = pg_catalog.clock_timestamp()
    where id = dead_letter_id and redriven_at is null
    returning * into dead;
    if not found then
        if exists (select from {home}.event_dead_letter where id = dead_letter_id) then
            raise exception 'redrive_dead_letter: dead letter % has been redriven already', dead_letter_id;
        end if;
        raise exception 'redrive_dead_letter: there is no dead letter %', dead_letter_id;
    end if;
    insert into {home}.event_outbox (id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                                     correlation_id, causation_id, schema_version, priority, format, created_at, destination)
    overriding system value
    values (dead.outbox_id, dead.event_id, dead.event_type, dead.source, dead.aggregate_type, dead.aggregate_id, dead.payload,
            dead.headers, dead.correlation_id, dead.causation_id, dead.schema_version, dead.priority, dead.format,
            dead.created_at, dead.destination);
    perform pg_catalog.nextval('{home}.event_outbox_moves');
    return dead.event_id;
end
$body$
$sql$,
        '''{home}.', '''' || pg_catalog.replace(pg_catalog.quote_ident(schema), '''', '''''') || '.'),
        '{home}', pg_catalog.quote_ident(schema));
    perform pg_catalog.set_config('search_path', path, true);
end
$relay$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 20';
