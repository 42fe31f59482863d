-- Where ids begin anew, what a relay remembers of lower ones counts no more.
--
-- A relay leaves out the dead rows of a partition up to some id. After `truncate event_outbox restart identity` the next events
-- would lie below it. Whoever truncates raises event_outbox_moves, as whoever moves an event does. A sequence that is set back
-- by hand, and a table that is restored or swapped, relays find by themselves.

create function event_outbox_truncated() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    perform pg_catalog.nextval(pg_catalog.format('%I.event_outbox_moves', tg_table_schema)::pg_catalog.regclass);
    return null;
end
$$;

comment on function event_outbox_truncated is 'Raises event_outbox_moves where the table was emptied, and ids may begin anew.';

-- Who inserts queues behind a lock that waits, so it waits for a second only; `relay migrate` tries again.
do $$
begin
    perform pg_catalog.set_config('lock_timeout', '1s', true);
    create trigger event_outbox_truncated
        after truncate on event_outbox
        for each statement
        execute function event_outbox_truncated();
end
$$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 15';
