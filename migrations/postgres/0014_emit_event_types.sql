-- emit_event for drivers that give types to what they send: a key that is a number or a UUID, and a payload that is a text or `json`. Before,
-- those calls failed ("function emit_event(unknown, text) does not exist"). A literal without a type means what it meant.
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
    f record;
    grantee record;
begin
    -- Nothing that is looked for from here on can be anybody else's.
    perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    foreach definition in array array[
$sql$
create or replace function {home}.emit_event(
    event_type text,
    payload text,
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
begin
    return {home}.emit_event(event_type, payload::jsonb, aggregate_type, aggregate_id, source, headers, correlation_id, causation_id,
                             schema_version, priority, delay, event_id);
end
$$
$sql$, $sql$
create or replace function {home}.emit_event(
    event_type text,
    payload json,
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
begin
    return {home}.emit_event(event_type, payload::jsonb, aggregate_type, aggregate_id, source, headers, correlation_id, causation_id,
                             schema_version, priority, delay, event_id);
end
$$
$sql$, $sql$
create or replace function {home}.emit_event(
    event_type text,
    payload jsonb,
    aggregate_type text,
    aggregate_id anynonarray,
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
begin
    return {home}.emit_event(event_type, payload, aggregate_type, aggregate_id::text, source, headers, correlation_id, causation_id,
                             schema_version, priority, delay, event_id);
end
$$
$sql$, $sql$
create or replace function {home}.emit_event(
    event_type text,
    payload jsonb,
    aggregate_id anynonarray,
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
begin
    return {home}.emit_event(event_type, payload, null::text, aggregate_id::text, source, headers, correlation_id, causation_id,
                             schema_version, priority, delay, event_id);
end
$$
$sql$
    ]
    loop
        execute pg_catalog.replace(definition, '{home}', pg_catalog.quote_ident(schema));
    end loop;
    -- Whoever may call the one may call the others.
    for f in
        select p.oid::regprocedure::text as name, p.pronargs, p.proargtypes, p.proowner
        from pg_catalog.pg_proc p
        where p.proname = 'emit_event' and p.pronamespace = pg_catalog.to_regnamespace(pg_catalog.quote_ident(schema))
          and p.oid <> pg_catalog.to_regprocedure(
              pg_catalog.format('%I.emit_event(text,jsonb,text,text,text,jsonb,text,text,integer,integer,interval,uuid)', schema))
    loop
        execute pg_catalog.format('comment on function %s is %L', f.name,
                                  'emit_event for a payload that is a text, or a key that is a number or a UUID.');
        for grantee in
            select a.grantee as role
            from pg_catalog.pg_proc p, pg_catalog.aclexplode(p.proacl) a
            where p.oid = pg_catalog.to_regprocedure(
                pg_catalog.format('%I.emit_event(text,jsonb,text,text,text,jsonb,text,text,integer,integer,interval,uuid)', schema))
        loop
            execute pg_catalog.format('grant execute on function %s to %s', f.name,
                                      case grantee.role when 0 then 'public' else grantee.role::regrole::text end);
        end loop;
        if not exists (
            select from pg_catalog.pg_proc p, pg_catalog.aclexplode(coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) a
            where a.grantee = 0 and p.oid = pg_catalog.to_regprocedure(
                pg_catalog.format('%I.emit_event(text,jsonb,text,text,text,jsonb,text,text,integer,integer,interval,uuid)', schema))
        ) then
            execute pg_catalog.format('revoke execute on function %s from public', f.name);
        end if;
    end loop;
    perform pg_catalog.set_config('search_path', path, true);
end
$relay$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 14';
