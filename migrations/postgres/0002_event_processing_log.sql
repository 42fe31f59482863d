-- What became of every event: one row per event, destination and attempt. Days are made ahead and dropped whole by relay.

create table event_processing_log (
    event_id uuid not null,
    outbox_id bigint not null,
    event_type text not null,
    destination text not null,
    status text not null,
    attempt integer not null,
    message_id text,
    error text,
    duration_ms integer not null,
    worker text not null,
    processed_at timestamptz not null default pg_catalog.clock_timestamp(),
    constraint status_is_known check (status in ('published', 'failed', 'dead_lettered', 'duplicate', 'dropped')),
    constraint error_iff_not_delivered check ((error is not null) = (status in ('failed', 'dead_lettered', 'dropped')))
) partition by range (processed_at);

comment on table event_processing_log is 'One row per event, destination and attempt, in day partitions.';
comment on column event_processing_log.event_id is 'event_outbox.event_id.';
comment on column event_processing_log.outbox_id is 'event_outbox.id, which consumers see as sequence. Look events up by it: it is indexed.';
comment on column event_processing_log.event_type is 'event_outbox.event_type.';
comment on column event_processing_log.destination is 'The configured name of the destination; empty where the event never got as far as one.';
comment on column event_processing_log.status is 'published; failed: will be tried again; dead_lettered; duplicate: the destination had it already; dropped: no route, by setting.';
comment on column event_processing_log.attempt is 'The number of this attempt, from 1.';
comment on column event_processing_log.message_id is 'What the destination called it: the stream entry''s id, EventBridge''s event id.';
comment on column event_processing_log.error is 'Code and message of the failure.';
comment on column event_processing_log.duration_ms is 'Milliseconds that the publish call took which carried it.';
comment on column event_processing_log.worker is 'The relay that did it: host name and process id.';
comment on column event_processing_log.processed_at is 'The database''s clock.';

-- Ids grow with time, so a block-range index finds an event for next to nothing; a b-tree would double the cost of a row.
create index event_processing_log_outbox_id_idx on event_processing_log using brin (outbox_id) with (pages_per_range = 16, autosummarize = on);

-- Adds the day partitions of today and the days after. A new table is attached, not created in place: attaching
-- does not wait for, nor hold up, those who read or write the other days.
create function relay_add_days(parent text, days_ahead integer) returns integer
language plpgsql security definer as $$
declare
    day date;
    name text;
    added integer := 0;
begin
    if parent not in ('event_processing_log', 'event_history') then
        raise exception 'relay_add_days: % is not a table that relay keeps by day', parent;
    end if;
    perform pg_catalog.pg_advisory_xact_lock(parent::regclass::oid::int, -2);
    for day in select pg_catalog.generate_series(0, days_ahead) + (pg_catalog.clock_timestamp() at time zone 'UTC')::date loop
        name := parent || pg_catalog.to_char(day, '_YYYYMMDD');
        if pg_catalog.to_regclass(name) is null then
            execute pg_catalog.format('create table %I (like %I including defaults including constraints including comments)', name, parent);
            execute pg_catalog.format('alter table %I attach partition %I for values from (%L) to (%L)',
                           parent, name, day::text || ' 00:00:00+00', (day + 1)::text || ' 00:00:00+00');
            added := added + 1;
        end if;
    end loop;
    return added;
end
$$;

-- Drops the days that ended longer than `retention` ago. Gives up after a second where somebody reads them; it is asked again.
create function relay_drop_days(parent text, retention interval) returns integer
language plpgsql security definer set lock_timeout = '1s' as $$
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
        from pg_inherits i join pg_class c on c.oid = i.inhrelid
        where i.inhparent = parent::regclass and c.relname ~ ('^' || parent || '_\d{8}$')
          and (pg_catalog.to_date(pg_catalog."right"(c.relname, 8), 'YYYYMMDD') + 1)::timestamp at time zone 'UTC' < pg_catalog.clock_timestamp() - retention
        order by 1
    loop
        execute pg_catalog.format('drop table %I', name);
        dropped := dropped + 1;
    end loop;
    return dropped;
end
$$;

comment on function relay_add_days is 'Adds day partitions of event_processing_log or event_history, from today on; returns how many were missing.';
comment on function relay_drop_days is 'Drops the day partitions that ended longer than the retention ago; returns how many.';

-- They run with their owner's rights, so that the relay itself needs no DDL: names must not be found in a caller's schema.
do $$
begin
    execute pg_catalog.format('alter function relay_add_days(text, integer) set search_path = %I, pg_temp', pg_catalog.current_schema());
    execute pg_catalog.format('alter function relay_drop_days(text, interval) set search_path = %I, pg_temp', pg_catalog.current_schema());
end
$$;
revoke execute on function relay_add_days, relay_drop_days from public;

select relay_add_days('event_processing_log', 7);

create or replace function relay_schema_version() returns integer language sql immutable as 'select 2';
