-- Every function names the schema that it works in: it does the same whatever the caller's search_path is.
--
-- Before, emit_event wrote to whatever event_outbox came first on the caller's path. And a function that runs with its owner's
-- rights found PostgreSQL's own functions by a path that had our schema on it: whoever may create functions there could have
-- defined a better match, and had their code run with the rights of the owner.
--
-- Run again by `relay migrate` after the schema was renamed, or the tables were moved to another: it makes all functions anew,
-- for the schema in which event_outbox is. {home} stands for that schema as an identifier, {name} for its name as a literal.

do $relay$
declare
    path text := pg_catalog.current_setting('search_path');
    schema text := (
        select n.nspname from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where c.oid = 'event_outbox'::regclass::oid
    );
    definition text;
begin
    -- Nothing that is looked for from here on can be anybody else's.
    perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    foreach definition in array array[
$sql$
create or replace function {home}.emit_event(
    event_type text,
    payload jsonb default '{}',
    aggregate_type text default null,
    aggregate_id text default null,
    source text default '',
    headers jsonb default '{}',
    correlation_id text default null,
    causation_id text default null,
    schema_version integer default 1,
    priority integer default 0,
    delay interval default '0',
    event_id uuid default pg_catalog.gen_random_uuid()
) returns uuid
language plpgsql as $$
#variable_conflict use_variable
begin
    insert into {home}.event_outbox (event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                                     correlation_id, causation_id, schema_version, priority, available_at, status)
    values (event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
            correlation_id, causation_id, schema_version, priority::smallint, pg_catalog.now() operator(pg_catalog.+) delay,
            case when delay operator(pg_catalog.>) interval '0' then 'scheduled' else 'pending' end);
    return event_id;
end
$$
$sql$, $sql$
create or replace function {home}.event_outbox_wake() returns trigger
language plpgsql as $$
begin
    if not pg_catalog.pg_try_advisory_xact_lock_shared(tg_relid::integer, '-1'::integer) then
        perform pg_catalog.pg_notify('event_outbox', '');
    end if;
    return null;
end
$$
$sql$, $sql$
create or replace function {home}.event_outbox_moved() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if exists (select from moved where status = 'pending') then
        perform pg_catalog.nextval('{home}.event_outbox_moves');
    end if;
    return null;
end
$$
$sql$, $sql$
create or replace function {home}.redrive_dead_letter(dead_letter_id bigint) returns uuid
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
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
                                     correlation_id, causation_id, schema_version, priority, created_at, destination)
    overriding system value
    values (dead.outbox_id, dead.event_id, dead.event_type, dead.source, dead.aggregate_type, dead.aggregate_id, dead.payload,
            dead.headers, dead.correlation_id, dead.causation_id, dead.schema_version, dead.priority, dead.created_at, dead.destination);
    perform pg_catalog.nextval('{home}.event_outbox_moves');
    return dead.event_id;
end
$$
$sql$, $sql$
create or replace function {home}.relay_add_days(parent text, days_ahead integer) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    day date;
    name text;
    added integer := 0;
begin
    if parent not in ('event_processing_log', 'event_history') then
        raise exception 'relay_add_days: % is not a table that relay keeps by day', parent;
    end if;
    perform pg_catalog.pg_advisory_xact_lock(pg_catalog.format('%I.%I', {name}, parent)::regclass::oid::integer, '-2'::integer);
    for day in
        select (pg_catalog.clock_timestamp() at time zone 'UTC')::date + ahead
        from pg_catalog.generate_series(0, days_ahead) as ahead
    loop
        name := parent || pg_catalog.to_char(day, '_YYYYMMDD');
        if pg_catalog.to_regclass(pg_catalog.format('%I.%I', {name}, name)) is null then
            begin
                execute pg_catalog.format(
                    'create table %1$I.%2$I (like %1$I.%3$I including defaults including constraints including comments)',
                    {name}, name, parent);
                execute pg_catalog.format('alter table %1$I.%3$I attach partition %1$I.%2$I for values from (%4$L) to (%5$L)',
                                          {name}, name, parent, day::text || ' 00:00:00+00', (day + 1)::text || ' 00:00:00+00');
                added := added + 1;
            exception when check_violation then
                -- It keeps that day; the others are added all the same.
                raise warning 'relay_add_days: % is not added, because the default partition has rows of that day', name;
            end;
        end if;
    end loop;
    return added;
end
$$
$sql$, $sql$
create or replace function {home}.relay_drop_days(parent text, retention interval) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '1s' as $$
declare
    name text;
    dropped integer := 0;
begin
    if parent not in ('event_processing_log', 'event_history') then
        raise exception 'relay_drop_days: % is not a table that relay keeps by day', parent;
    end if;
    if retention < interval '1 hour' then
        raise exception 'relay_drop_days: a retention of % would drop what was just written', retention;
    end if;
    for name in
        select c.relname
        from pg_catalog.pg_inherits i join pg_catalog.pg_class c on c.oid = i.inhrelid
        where i.inhparent = pg_catalog.format('%I.%I', {name}, parent)::regclass and c.relname ~ ('^' || parent || '_\d{8}$')
          and (pg_catalog.to_date(pg_catalog."right"(c.relname, 8), 'YYYYMMDD') + 1)::timestamp at time zone 'UTC'
              < pg_catalog.clock_timestamp() - retention
        order by 1
    loop
        execute pg_catalog.format('drop table %I.%I', {name}, name);
        dropped := dropped + 1;
    end loop;
    return dropped;
end
$$
$sql$, $sql$
create or replace function {home}.relay_epoch_above(floor bigint) returns bigint
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    epoch bigint := pg_catalog.nextval('{home}.event_outbox_epoch');
begin
    if epoch <= floor then
        -- One at a time, or one could take back what another has just set; and so far ahead that those who merely raise it
        -- meanwhile stay below.
        perform pg_catalog.pg_advisory_xact_lock('{home}.event_outbox'::regclass::oid::integer, 1000000);
        epoch := pg_catalog.nextval('{home}.event_outbox_epoch');
        if epoch <= floor then
            epoch := pg_catalog.setval('{home}.event_outbox_epoch', floor + 1000000);
        end if;
    end if;
    return epoch;
end
$$
$sql$, $sql$
alter function {home}.relay_outbox_id() set search_path = pg_catalog, pg_temp
$sql$, $sql$
create or replace function {home}.relay_home() returns text language sql immutable as $$ select {name} $$
$sql$, $sql$
comment on function {home}.relay_home() is 'The schema that the functions of relay name. After a renaming `relay migrate` makes them anew.'
$sql$
    ]
    loop
        -- Within a literal a quote of the name is doubled.
        execute pg_catalog.replace(pg_catalog.replace(pg_catalog.replace(definition,
            '''{home}.', '''' || pg_catalog.replace(pg_catalog.quote_ident(schema), '''', '''''') || '.'),
            '{home}', pg_catalog.quote_ident(schema)),
            '{name}', pg_catalog.quote_literal(schema));
    end loop;
    perform pg_catalog.set_config('search_path', path, true);
end
$relay$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 12';
