-- What operators do with events that wait: make them due now, give them up, move them to another destination. See
-- 0023_operator_functions.sql for filters. What cannot be settled (settle_failed) is changed only where it is named by its id or
-- by that error: it may have been delivered.
--
-- A key lies in one partition, and these functions work on one partition at a time where they are told which: so a transaction is
-- small, and a key is changed whole.
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
create or replace function {home}.relay_waiting_filter(action_name text, filter jsonb, in_partition integer) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $body$
declare
    is_named boolean := filter ? 'id' or filter ->> 'error' = 'settle_failed';
begin
    return {home}.relay_event_filter(filter, false)
        || case when action_name = 'retry_now' then
            $q$ and (e.status = 'scheduled' or e.available_at = 'infinity') and e.available_at > pg_catalog.statement_timestamp()
               and e.partition < 1280::smallint $q$
           else '' end
        || case when coalesce(is_named, false) then $q$ and (e.destination <> '' or e.last_error is not null) $q$
           else $q$ and e.destination <> '' and (e.last_error is null or not pg_catalog.starts_with(e.last_error, 'settle_failed: ')) $q$
           end
        || case when in_partition is null then ''
           else pg_catalog.format(' and e.partition in (%s::smallint, %s::smallint, %s::smallint, %s::smallint)', in_partition,
                       in_partition + 640, in_partition + 1280, in_partition + 1920)
           end;
end
$body$
$sql$,
$sql$
create or replace function {home}.relay_waiting_last(condition text, max_events bigint) returns bigint
language plpgsql stable set search_path = pg_catalog, pg_temp as $body$
declare
    last_id bigint := 9223372036854775807;
begin
    if max_events is not null then
        execute $q$select coalesce(pg_catalog.max(c.id), 0) from (select e.id from {home}.event_outbox e where $q$ || condition
            || ' order by e.id limit $1) c'
            into last_id using max_events;
    end if;
    return last_id;
end
$body$
$sql$,
$sql$
create or replace function {home}.relay_hold_partitions(condition text, in_partition integer) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $body$
begin
    -- Relays that publish events of these keys right now come first.
    if in_partition is not null then
        perform pg_catalog.pg_advisory_xact_lock('{home}.event_outbox'::regclass::oid::integer, in_partition);
        return;
    end if;
    execute $q$
        select pg_catalog.pg_advisory_xact_lock(held.relation, held.partition)
        from (
            select distinct e.tableoid::integer as relation, (e.partition % 640::smallint)::integer as partition
            from {home}.event_outbox e where $q$ || condition || ' order by 2) held';
end
$body$
$sql$,
$sql$
create or replace function {home}.count_waiting(action_name text, filter jsonb default '{}')
    returns table (in_partition integer, destination text, error text, events bigint, oldest timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $body$
begin
    if action_name is null or action_name not in ('retry_now', 'give_up', 'move_owed') then
        raise exception 'count_waiting: retry_now, give_up or move_owed' using errcode = 'invalid_parameter_value';
    end if;
    return query execute $q$
        select (e.partition % 640::smallint)::integer, e.destination, pg_catalog.split_part(coalesce(e.last_error, ''), ':', 1), pg_catalog.count(*),
            pg_catalog.min(e.created_at)
        from {home}.event_outbox e where $q$ || {home}.relay_waiting_filter(action_name, filter, null) || ' group by 1, 2, 3';
end
$body$
$sql$,
$sql$
create or replace function {home}.retry_waiting(filter jsonb default '{}', in_partition integer default null,
    max_events bigint default null, command uuid default pg_catalog.gen_random_uuid()) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
-- The application may have added columns of any name.
#variable_conflict use_variable
declare
    condition text := {home}.relay_waiting_filter('retry_now', filter, in_partition);
    last_id bigint := {home}.relay_waiting_last(condition, max_events);
    due timestamptz := pg_catalog.clock_timestamp();
    retried bigint;
begin
    execute $q$update {home}.event_outbox e set available_at = $1 where e.id <= $2 and $q$ || condition using due, last_id;
    get diagnostics retried = row_count;
    if retried > 0 then
        -- What waits behind them comes with them, in its place.
        update {home}.event_outbox f set available_at = due
        from (
            select h.destination, h.aggregate_type, h.aggregate_id, pg_catalog.min(h.id) as id from {home}.event_outbox h
            where h.status = 'scheduled' and h.available_at = due and h.last_error is not null and h.aggregate_id is not null
              and (in_partition is null or h.partition = (in_partition + 640)::smallint)
            group by 1, 2, 3
        ) h
        where f.status = 'scheduled' and f.destination <> '' and f.aggregate_id is not null and f.destination = h.destination
          and pg_catalog.hashtextextended(f.aggregate_id, pg_catalog.hashtextextended(coalesce(f.aggregate_type, ''), 0))
            = pg_catalog.hashtextextended(h.aggregate_id, pg_catalog.hashtextextended(coalesce(h.aggregate_type, ''), 0))
          and f.aggregate_id = h.aggregate_id and coalesce(f.aggregate_type, '') = coalesce(h.aggregate_type, '')
          and f.id > h.id and f.last_error is null and f.available_at > due and f.partition < 1280::smallint;
        perform pg_catalog.pg_notify('event_outbox', '');
    end if;
    perform {home}.relay_note_action('retry_now', filter, '{}', retried, command);
    return retried;
end
$body$
$sql$,
$sql$
create or replace function {home}.give_up_waiting(filter jsonb, reason text default null, in_partition integer default null,
    max_events bigint default null, command uuid default pg_catalog.gen_random_uuid()) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
declare
    condition text := {home}.relay_waiting_filter('give_up', filter, in_partition);
    last_id bigint;
    words text := 'given up by hand' || coalesce(': ' || nullif(pg_catalog.btrim(reason), ''), '');
    given_up bigint;
begin
    perform {home}.relay_hold_partitions(condition, in_partition);
    last_id := {home}.relay_waiting_last(condition, max_events);
    execute $q$
        with gone as (
            delete from {home}.event_outbox e where e.id <= $1 and $q$ || condition || $q$ returning e.*
        ), letters as (
            insert into {home}.event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload,
                headers, correlation_id, causation_id, schema_version, priority, format, created_at, destination, attempts,
                error_code, error, first_failed_at, failed_at)
            select id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers, correlation_id,
                causation_id, schema_version, priority, greatest(format, 0::smallint), created_at, destination,
                greatest(attempts, 1), 'given_up', $2 || coalesce('; before that: ' || last_error, ''),
                least(first_failed_at, pg_catalog.statement_timestamp()), pg_catalog.statement_timestamp()
            from gone
            order by id
        ), behind as (
            -- What waits behind them goes on at once.
            update {home}.event_outbox f set available_at = pg_catalog.statement_timestamp()
            from (
                select g.destination, g.aggregate_type, g.aggregate_id, pg_catalog.min(g.id) as id from gone g
                where g.aggregate_id is not null group by 1, 2, 3
            ) g
            where f.status = 'scheduled' and f.destination <> '' and f.aggregate_id is not null and f.destination = g.destination
              and pg_catalog.hashtextextended(f.aggregate_id, pg_catalog.hashtextextended(coalesce(f.aggregate_type, ''), 0))
                = pg_catalog.hashtextextended(g.aggregate_id, pg_catalog.hashtextextended(coalesce(g.aggregate_type, ''), 0))
              and f.aggregate_id = g.aggregate_id and coalesce(f.aggregate_type, '') = coalesce(g.aggregate_type, '')
              and f.id > g.id and f.last_error is null and f.available_at > pg_catalog.statement_timestamp() and f.partition < 1280::smallint
              and not exists (select from gone x where x.id = f.id and x.destination = f.destination)
        )
        insert into {home}.event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, error,
            duration_ms, worker, processed_at)
        select event_id, id, event_type, destination, 'dead_lettered', greatest(attempts, 1), 'given_up: ' || $2, 0,
            session_user::text, pg_catalog.statement_timestamp()
        from gone
        $q$
        using last_id, words;
    get diagnostics given_up = row_count;
    if given_up > 0 then
        perform pg_catalog.pg_notify('event_outbox', '');
    end if;
    perform {home}.relay_note_action('give_up', filter, pg_catalog.jsonb_build_object('reason', nullif(pg_catalog.btrim(reason), '')), given_up, command);
    return given_up;
end
$body$
$sql$,
$sql$
create or replace function {home}.move_waiting(from_destination text, to_destination text, filter jsonb default '{}',
    in_partition integer default null, max_events bigint default null, command uuid default pg_catalog.gen_random_uuid()) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
declare
    condition text;
    last_id bigint;
    doubled bigint;
    moved bigint;
begin
    if coalesce(from_destination, '') = '' or coalesce(to_destination, '') = '' or from_destination = to_destination then
        raise exception 'move_waiting: it takes the names of two destinations' using errcode = 'invalid_parameter_value';
    end if;
    filter := filter || pg_catalog.jsonb_build_object('destination', from_destination);
    condition := {home}.relay_waiting_filter('move_owed', filter, in_partition);
    perform {home}.relay_hold_partitions(condition, in_partition);
    last_id := {home}.relay_waiting_last(condition, max_events);
    -- An event that is owed to both is owed once.
    execute $q$
        delete from {home}.event_outbox e
        where e.id <= $1 and $q$ || condition || $q$ and exists (
            select from {home}.event_outbox n
            where n.partition in (e.partition % 640::smallint, e.partition % 640::smallint + 640::smallint,
                                  e.partition % 640::smallint + 1280::smallint, e.partition % 640::smallint + 1920::smallint)
              and n.id = e.id and n.destination = $2
        )
        $q$
        using last_id, to_destination;
    get diagnostics doubled = row_count;
    -- What failed at the one begins anew at the other.
    execute $q$
        update {home}.event_outbox e
        set destination = $2,
            attempts = case when e.first_failed_at is null then e.attempts else 0 end,
            available_at = case when e.first_failed_at is null then e.available_at
                                else least(e.available_at, pg_catalog.statement_timestamp()) end,
            last_error = case when e.first_failed_at is null then e.last_error end,
            first_failed_at = null
        where e.id <= $1 and $q$ || condition
        using last_id, to_destination;
    get diagnostics moved = row_count;
    if doubled + moved > 0 then
        perform pg_catalog.pg_notify('event_outbox', '');
    end if;
    perform {home}.relay_note_action('move_owed', filter, pg_catalog.jsonb_build_object('to', to_destination), doubled + moved, command);
    return doubled + moved;
end
$body$
$sql$,
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
    perform {home}.relay_note_action('move_owed', pg_catalog.jsonb_build_object('destination', from_destination),
                                     pg_catalog.jsonb_build_object('to', to_destination), doubled + moved, null);
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
    perform {home}.relay_note_action('give_up', pg_catalog.jsonb_build_object('destination', from_destination), '{}', given_up, null);
    return given_up;
end
$body$
$sql$,
$sql$
comment on function {home}.relay_waiting_filter(text, jsonb, integer) is
    'The condition in SQL for the events that an action with this filter is about.'
$sql$,
$sql$
comment on function {home}.relay_waiting_last(text, bigint) is
    'The id up to which there are at most so many events.'
$sql$,
$sql$
comment on function {home}.relay_hold_partitions(text, integer) is
    'Waits for the relays that publish events of the same keys, and keeps them away until the transaction ends.'
$sql$,
$sql$
comment on function {home}.count_waiting(text, jsonb) is
    'How many events retry_now, give_up or move_owed would change, by partition, destination and error code.'
$sql$,
$sql$
comment on function {home}.retry_waiting(jsonb, integer, bigint, uuid) is
    'Makes events due now that wait for a retry, and what waits behind them: select retry_waiting(''{"destination": "redis"}''). Returns how many.'
$sql$,
$sql$
comment on function {home}.give_up_waiting(jsonb, text, integer, bigint, uuid) is
    'Makes dead letters of events that are owed to a destination: select give_up_waiting(''{"id": 42}'', ''reason''). Returns how many.'
$sql$,
$sql$
comment on function {home}.move_waiting(text, text, jsonb, integer, bigint, uuid) is
    'Gives what is owed to one destination to another, in the order of keys, as far as a filter says. Returns how many events.'
$sql$
    ]
    loop
        -- Within a literal a quote of the name is doubled.
        execute pg_catalog.replace(pg_catalog.replace(definition,
            '''{home}.', '''' || pg_catalog.replace(pg_catalog.quote_ident(schema), '''', '''''') || '.'),
            '{home}', pg_catalog.quote_ident(schema));
    end loop;
    foreach signature in array array[
        'relay_waiting_filter(text, jsonb, integer)',
        'relay_waiting_last(text, bigint)',
        'relay_hold_partitions(text, integer)',
        'count_waiting(text, jsonb)',
        'retry_waiting(jsonb, integer, bigint, uuid)',
        'give_up_waiting(jsonb, text, integer, bigint, uuid)',
        'move_waiting(text, text, jsonb, integer, bigint, uuid)'
    ] loop
        execute pg_catalog.format('revoke execute on function %I.%s from public', schema, signature);
        -- Whoever may put dead letters back may call these; the others take SQL as text.
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

create or replace function relay_schema_version() returns integer language sql immutable as 'select 26';
