-- What operators do with dead letters and with events that wait: functions that the role relay_operator may call. Each writes
-- down in event_operator_action what it did, and for whom.
--
-- A filter is a JSON object: type (a glob, * and ?), key (the aggregate_id, or aggregate_type:aggregate_id), destination, error
-- (a code), since and until (times), id (a number or several), and for dead letters state. Dead letters are chosen by failed_at
-- and their own id, events that wait by created_at and event_outbox.id.
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
    signature text;
begin
    -- So that names are looked up nowhere else.
    perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    foreach definition in array array[
$sql$
create or replace function {home}.relay_event_filter(filter jsonb, of_dead_letters boolean) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $body$
declare
    known text[] := array['type', 'key', 'destination', 'error', 'since', 'until', 'id']
        || case when of_dead_letters then array['state'] else array[]::text[] end;
    moment text := case when of_dead_letters then 'e.failed_at' else 'e.created_at' end;
    condition text := 'true';
    field text;
begin
    if filter is null or pg_catalog.jsonb_typeof(filter) <> 'object' then
        raise exception 'a filter is a JSON object, such as {"destination": "redis"}' using errcode = 'invalid_parameter_value';
    end if;
    filter := pg_catalog.jsonb_strip_nulls(filter);
    select name into field from pg_catalog.jsonb_object_keys(filter) name where name <> all (known) limit 1;
    if field is not null then
        raise exception 'a filter has no field %; it has %', field, pg_catalog.array_to_string(known, ', ')
            using errcode = 'invalid_parameter_value';
    end if;
    if filter ? 'type' then
        condition := condition || pg_catalog.format(' and e.event_type like %L', pg_catalog.translate(
            pg_catalog.replace(pg_catalog.replace(pg_catalog.replace(filter ->> 'type', '\', '\\'), '%', '\%'), '_', '\_'), '*?', '%_'));
    end if;
    if filter ? 'key' then
        condition := condition || pg_catalog.format($q$ and (e.aggregate_id = %1$L or e.aggregate_type || ':' || e.aggregate_id = %1$L)$q$,
                                         filter ->> 'key');
    end if;
    if filter ? 'destination' then
        condition := condition || pg_catalog.format(' and e.destination = %L', filter ->> 'destination');
    end if;
    if filter ? 'error' then
        condition := condition || case
            when of_dead_letters then pg_catalog.format(' and e.error_code = %L', filter ->> 'error')
            else pg_catalog.format($q$ and (e.last_error = %1$L or pg_catalog.starts_with(e.last_error, %1$L || ':'))$q$, filter ->> 'error')
        end;
    end if;
    if filter ? 'since' then
        condition := condition || pg_catalog.format(' and %s >= %L::timestamptz', moment, (filter ->> 'since')::timestamptz);
    end if;
    if filter ? 'until' then
        condition := condition || pg_catalog.format(' and %s < %L::timestamptz', moment, (filter ->> 'until')::timestamptz);
    end if;
    if filter ? 'id' then
        condition := condition || pg_catalog.format(' and e.id = any (%L::bigint[])', (
            select pg_catalog.array_agg(id::bigint)
            from pg_catalog.jsonb_array_elements_text(
                case pg_catalog.jsonb_typeof(filter -> 'id') when 'array' then filter -> 'id' else pg_catalog.jsonb_build_array(filter -> 'id') end
            ) id
        ));
    end if;
    if filter ? 'state' then
        condition := condition || case filter ->> 'state'
            when 'open' then ' and e.redriven_at is null and e.discarded_at is null'
            when 'redriven' then ' and e.redriven_at is not null'
            when 'discarded' then ' and e.discarded_at is not null and e.redriven_at is null'
            when 'closed' then ' and (e.redriven_at is not null or e.discarded_at is not null)'
            when 'all' then ''
        end;
        if condition is null then
            raise exception 'the state of a dead letter is open, redriven, discarded, closed or all, not %', filter ->> 'state'
                using errcode = 'invalid_parameter_value';
        end if;
    end if;
    return condition;
end
$body$
$sql$,
$sql$
create or replace function {home}.relay_note_action(action_name text, action_filter jsonb, action_details jsonb, events bigint,
                                                    of_command uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $body$
begin
    if events = 0 then
        return;
    end if;
    insert into {home}.event_operator_action as a (command, action, filter, details, event_count, done_by)
    values (coalesce(of_command, pg_catalog.gen_random_uuid()), action_name, action_filter, pg_catalog.jsonb_strip_nulls(action_details), events,
            session_user)
    on conflict (command) do update
        set event_count = a.event_count + excluded.event_count, done_at = pg_catalog.clock_timestamp()
        where a.done_by = excluded.done_by and a.action = excluded.action;
    if not found then
        raise exception 'the command % is another action, or somebody else''s', of_command
            using errcode = 'invalid_parameter_value';
    end if;
end
$body$
$sql$,
$sql$
create or replace function {home}.redrive_dead_letters(filter jsonb default '{}', to_destination text default null,
    new_payload jsonb default null, max_events integer default 1000, command uuid default pg_catalog.gen_random_uuid(),
    only_ids bigint[] default null) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
declare
    ids bigint[];
begin
    if to_destination = '' then
        raise exception 'redrive_dead_letters: to_destination is the name of a destination'
            using errcode = 'invalid_parameter_value';
    end if;
    -- In the order in which the events were emitted. One that is named by its id may have been discarded.
    execute $q$
        select coalesce(pg_catalog.array_agg(picked.id), '{}') from (
            select e.id from {home}.event_dead_letter e
            where e.redriven_at is null and (e.discarded_at is null or $3) and ($1 is null or e.id = any ($1)) and $q$
        || {home}.relay_event_filter(filter, true)
        || ' order by e.outbox_id, e.id limit $2 for update of e) picked'
        into ids using only_ids, max_events, filter ? 'id';
    if new_payload is not null and pg_catalog.cardinality(ids) > 1 then
        raise exception 'redrive_dead_letters: a payload is for one dead letter, and these are %', pg_catalog.cardinality(ids)
            using errcode = 'invalid_parameter_value';
    end if;
    update {home}.event_dead_letter
    set redriven_at = pg_catalog.clock_timestamp(), redriven_by = session_user, redriven_to = to_destination
    where id = any (ids);
    -- An event that is still owed to that destination is owed once.
    insert into {home}.event_outbox (id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                                     correlation_id, causation_id, schema_version, priority, format, created_at, destination)
    overriding system value
    select d.outbox_id, d.event_id, d.event_type, d.source, d.aggregate_type, d.aggregate_id, coalesce(new_payload, d.payload),
        d.headers, d.correlation_id, d.causation_id, d.schema_version, d.priority, d.format, d.created_at,
        coalesce(to_destination, d.destination)
    from {home}.event_dead_letter d
    cross join lateral (
        select ((9 - d.priority) * 64 + (case
            when d.aggregate_id is null then pg_catalog.uuid_hash_extended(d.event_id, 0)
            else pg_catalog.hashtextextended(d.aggregate_id, pg_catalog.hashtextextended(coalesce(d.aggregate_type, ''), 0))
        end & 63::bigint))::integer as first
    ) p
    where d.id = any (ids) and not exists (
        select from {home}.event_outbox o
        where o.partition in (p.first::smallint, (p.first + 640)::smallint, (p.first + 1280)::smallint, (p.first + 1920)::smallint)
          and o.id = d.outbox_id and o.destination = coalesce(to_destination, d.destination) and o.event_id = d.event_id
    )
    order by d.outbox_id, d.id;
    if pg_catalog.cardinality(ids) > 0 then
        perform pg_catalog.nextval('{home}.event_outbox_moves');
    end if;
    perform {home}.relay_note_action('redrive', filter, pg_catalog.jsonb_build_object('to', to_destination, 'payload',
        case when new_payload is not null then 'corrected' end), pg_catalog.cardinality(ids), command);
    return pg_catalog.cardinality(ids);
end
$body$
$sql$,
$sql$
create or replace function {home}.redrive_dead_letter(dead_letter_id bigint) returns uuid
language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
declare
    dead {home}.event_dead_letter;
begin
    select * into dead from {home}.event_dead_letter where id = dead_letter_id for update;
    if not found then
        raise exception 'redrive_dead_letter: there is no dead letter %', dead_letter_id;
    end if;
    if dead.redriven_at is not null then
        raise exception 'redrive_dead_letter: dead letter % has been redriven already', dead_letter_id;
    end if;
    perform {home}.redrive_dead_letters(pg_catalog.jsonb_build_object('id', dead_letter_id));
    return dead.event_id;
end
$body$
$sql$,
$sql$
create or replace function {home}.discard_dead_letters(filter jsonb, reason text, max_events integer default 1000,
    command uuid default pg_catalog.gen_random_uuid(), only_ids bigint[] default null) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
declare
    ids bigint[];
begin
    if reason is null or pg_catalog.btrim(reason) = '' then
        raise exception 'discard_dead_letters: it takes a reason' using errcode = 'invalid_parameter_value';
    end if;
    execute $q$
        select coalesce(pg_catalog.array_agg(picked.id), '{}') from (
            select e.id from {home}.event_dead_letter e
            where e.redriven_at is null and e.discarded_at is null and ($1 is null or e.id = any ($1)) and $q$
        || {home}.relay_event_filter(filter, true)
        || ' order by e.outbox_id, e.id limit $2 for update of e) picked'
        into ids using only_ids, max_events;
    update {home}.event_dead_letter
    set discarded_at = pg_catalog.clock_timestamp(), discarded_by = session_user, discard_reason = reason
    where id = any (ids);
    perform {home}.relay_note_action('discard', filter, pg_catalog.jsonb_build_object('reason', reason), pg_catalog.cardinality(ids), command);
    return pg_catalog.cardinality(ids);
end
$body$
$sql$,
$sql$
create or replace function {home}.purge_dead_letters(filter jsonb, max_events integer default 1000,
    command uuid default pg_catalog.gen_random_uuid(), only_ids bigint[] default null) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
declare
    ids bigint[];
begin
    -- What is neither redriven nor discarded is deleted only where somebody says so.
    execute $q$
        select coalesce(pg_catalog.array_agg(picked.id), '{}') from (
            select e.id from {home}.event_dead_letter e where ($1 is null or e.id = any ($1)) and $q$
        || {home}.relay_event_filter(
            case when filter ?| array['state', 'id'] then filter else filter || '{"state": "closed"}' end, true)
        || ' order by e.outbox_id, e.id limit $2 for update of e) picked'
        into ids using only_ids, max_events;
    delete from {home}.event_dead_letter where id = any (ids);
    perform {home}.relay_note_action('purge', filter, '{}', pg_catalog.cardinality(ids), command);
    return pg_catalog.cardinality(ids);
end
$body$
$sql$,
$sql$
comment on function {home}.relay_event_filter(jsonb, boolean) is
    'The condition in SQL that a filter of events or of dead letters stands for.'
$sql$,
$sql$
comment on function {home}.relay_note_action(text, jsonb, jsonb, bigint, uuid) is
    'Writes down in event_operator_action what an operator did.'
$sql$,
$sql$
comment on function {home}.redrive_dead_letters(jsonb, text, jsonb, integer, uuid, bigint[]) is
    'Puts dead letters back, the earliest event first, at most max_events at a time: select redrive_dead_letters(''{"destination": "redis"}''). Returns how many.'
$sql$,
$sql$
comment on function {home}.redrive_dead_letter(bigint) is
    'Puts a dead letter back as owed to its own destination only, with fresh attempts; returns its event_id.'
$sql$,
$sql$
comment on function {home}.discard_dead_letters(jsonb, text, integer, uuid, bigint[]) is
    'Marks dead letters that are not to be redriven, with the reason; they stay, outside the summary. Returns how many.'
$sql$,
$sql$
comment on function {home}.purge_dead_letters(jsonb, integer, uuid, bigint[]) is
    'Deletes dead letters that were redriven or discarded; others only by id or with {"state": "open"} or {"state": "all"}. Returns how many.'
$sql$
    ]
    loop
        -- Within a literal a quote of the name is doubled.
        execute pg_catalog.replace(pg_catalog.replace(definition,
            '''{home}.', '''' || pg_catalog.replace(pg_catalog.quote_ident(schema), '''', '''''') || '.'),
            '{home}', pg_catalog.quote_ident(schema));
    end loop;
    foreach signature in array array[
        'relay_event_filter(jsonb, boolean)',
        'relay_note_action(text, jsonb, jsonb, bigint, uuid)',
        'redrive_dead_letters(jsonb, text, jsonb, integer, uuid, bigint[])',
        'discard_dead_letters(jsonb, text, integer, uuid, bigint[])',
        'purge_dead_letters(jsonb, integer, uuid, bigint[])'
    ] loop
        execute pg_catalog.format('revoke execute on function %I.%s from public', schema, signature);
        -- Whoever may put one dead letter back may call these. What an operator did is written down by them alone.
        if pg_catalog.starts_with(signature, 'relay_') then
            continue;
        end if;
        for grantee in
            select pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)::text)
            from pg_catalog.pg_proc p cross join lateral pg_catalog.aclexplode(p.proacl) a
            where p.oid = pg_catalog.to_regprocedure(pg_catalog.format('%I.redrive_dead_letter(bigint)', schema))::oid
              and a.grantee <> 0::oid
            group by a.grantee
        loop
            execute pg_catalog.format('grant execute on function %I.%s to %s', schema, signature, grantee);
        end loop;
    end loop;
    perform pg_catalog.set_config('search_path', path, true);
end
$relay$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 23';
