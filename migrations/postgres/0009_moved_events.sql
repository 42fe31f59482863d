-- What lets a relay leave out the dead rows at the left of a partition.
--
-- While any session holds an old snapshot, deleted rows cannot be vacuumed, and each claim would walk over all of them. So a
-- relay remembers up to which id a partition has nothing left. An insert is no danger to that: it locks the table before it
-- draws its id, and a relay counts an id only once all who held that lock then are gone. But whoever moves a row into a
-- partition, or puts one back, brings an old id: they raise this sequence, with the lock held, and a relay that reads another
-- number than before forgets what it remembered.

create sequence event_outbox_moves cache 1;

comment on sequence event_outbox_moves is 'Raised by whatever brings an event with an old id into a partition; relays that remember where one begins start anew.';

create function event_outbox_moved() returns trigger
language plpgsql security definer as $$
begin
    if exists (select from moved where status = 'pending') then
        perform pg_catalog.nextval('event_outbox_moves');
    end if;
    return null;
end
$$;

comment on function event_outbox_moved is 'Raises event_outbox_moves where rows became pending, or may have moved.';

create trigger event_outbox_moved
    after update on event_outbox
    referencing new table as moved
    for each statement
    execute function event_outbox_moved();

create or replace function redrive_dead_letter(dead_letter_id bigint) returns uuid
language plpgsql security definer as $$
declare
    dead event_dead_letter;
begin
    update event_dead_letter set redriven_at = pg_catalog.clock_timestamp()
    where id = dead_letter_id and redriven_at is null
    returning * into dead;
    if not found then
        if exists (select from event_dead_letter where id = dead_letter_id) then
            raise exception 'redrive_dead_letter: dead letter % has been redriven already', dead_letter_id;
        end if;
        raise exception 'redrive_dead_letter: there is no dead letter %', dead_letter_id;
    end if;
    insert into event_outbox (id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                              correlation_id, causation_id, schema_version, priority, created_at, destination)
    overriding system value
    values (dead.outbox_id, dead.event_id, dead.event_type, dead.source, dead.aggregate_type, dead.aggregate_id, dead.payload,
            dead.headers, dead.correlation_id, dead.causation_id, dead.schema_version, dead.priority, dead.created_at, dead.destination);
    perform pg_catalog.nextval('event_outbox_moves');
    return dead.event_id;
end
$$;

do $$
begin
    execute pg_catalog.format('alter function event_outbox_moved() set search_path = %I, pg_temp', pg_catalog.current_schema());
    execute pg_catalog.format('alter function redrive_dead_letter(bigint) set search_path = %I, pg_temp', pg_catalog.current_schema());
end
$$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 9';
