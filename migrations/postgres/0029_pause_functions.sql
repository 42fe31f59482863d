-- What the role relay_operator may call to pause a destination, and to resume it. Both write into event_operator_action.
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
create or replace function {home}.pause_destination(destination text, event_type text default '*') returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
#variable_conflict use_variable
declare
    known text;
begin
    if coalesce(destination, '') = '' or coalesce(event_type, '') = '' then
        raise exception 'pause_destination: it takes the name of a destination, and a glob of event types'
            using errcode = 'invalid_parameter_value';
    end if;
    -- Where no relay is at work, any name may be one of theirs.
    select pg_catalog.string_agg(distinct k.name, ', ') into known
    from {home}.event_relay r cross join lateral pg_catalog.jsonb_object_keys(r.destinations) k(name);
    if known is not null
        and not exists (select from {home}.event_relay r where r.destinations ? destination)
        and not exists (select from {home}.event_outbox o where o.status = 'scheduled' and o.destination = destination)
    then
        raise exception 'pause_destination: no relay has a destination %; they have %', destination, known
            using errcode = 'invalid_parameter_value';
    end if;
    insert into {home}.event_pause (destination, event_type) values (destination, event_type) on conflict do nothing;
    if not found then
        return false;
    end if;
    update {home}.event_pause_changes c set changes = c.changes + 1;
    insert into {home}.event_operator_action (action, filter, event_count)
    values ('pause', pg_catalog.jsonb_build_object('destination', destination, 'type', event_type), 0);
    return true;
end
$body$
$sql$,
$sql$
create or replace function {home}.resume_destination(destination text, event_type text default null) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
#variable_conflict use_variable
declare
    lifted bigint;
    released bigint;
begin
    delete from {home}.event_pause p
    where p.destination = destination and (event_type is null or p.event_type = event_type);
    get diagnostics lifted = row_count;
    if lifted = 0 then
        raise exception 'resume_destination: % is not paused%', destination,
            case when event_type is null then '' else ' for the types ' || event_type end
            using errcode = 'invalid_parameter_value';
    end if;
    update {home}.event_pause_changes c set changes = c.changes + 1;
    -- What was held back is due now.
    update {home}.event_outbox o set available_at = pg_catalog.statement_timestamp()
    where o.status = 'scheduled' and o.destination = destination and o.available_at > pg_catalog.statement_timestamp()
      and o.last_error is null;
    get diagnostics released = row_count;
    insert into {home}.event_operator_action (action, filter, event_count)
    values ('resume', pg_catalog.jsonb_strip_nulls(pg_catalog.jsonb_build_object('destination', destination, 'type', event_type)), released);
    -- Relays that sleep look at once.
    perform pg_catalog.pg_notify('event_outbox', '');
    return lifted;
end
$body$
$sql$,
$sql$
comment on function {home}.pause_destination(text, text) is
    'Stops giving events to a destination; of these types only, if a glob is given. They wait. Returns false if it was paused already.'
$sql$,
$sql$
comment on function {home}.resume_destination(text, text) is
    'Ends the pauses of a destination, or that of these types. Returns how many pauses those were.'
$sql$,
$sql$
revoke execute on function {home}.pause_destination(text, text), {home}.resume_destination(text, text) from public
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
        execute pg_catalog.format('grant execute on function %I.pause_destination(text, text), %I.resume_destination(text, text) to %s',
                                  schema, schema, grantee);
    end loop;
    perform pg_catalog.set_config('search_path', path, true);
end
$relay$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 29';
