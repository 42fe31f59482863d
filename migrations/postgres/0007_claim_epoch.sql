-- What sets one claim apart from the next, so that a destination that keeps a note of it can refuse an outdated one.
--
-- A claim reads the epoch once it holds its partition; every settle that takes rows away raises it. So of two claims of a
-- partition the later never has the lower one, and has a higher one unless the earlier settled nothing. Reading costs no
-- transaction id, which a claim must not hold while it publishes; the settle has one anyway.

create sequence event_outbox_epoch cache 1;

comment on sequence event_outbox_epoch is 'Raised by every settle that takes rows away; a claim reads it, and tells destinations that refuse outdated claims.';

-- Tells this outbox from others that publish to the same place. Copies of a database differ by its oid.
do $$
begin
    execute pg_catalog.format(
        'create function relay_outbox_id() returns text language sql stable as %L',
        pg_catalog.format('select %L || (select oid::text from pg_catalog.pg_database where datname = pg_catalog.current_database())',
            pg_catalog.substr(pg_catalog.md5(pg_catalog.gen_random_uuid()::text), 1, 12) || '-'));
end
$$;

comment on function relay_outbox_id is 'Tells this outbox from others that publish to the same place.';

-- For a claim that meets a note of its own epoch or a later one: after a crash, or where a failover took the epoch back.
create function relay_epoch_above(floor bigint) returns bigint
language plpgsql as $$
declare
    epoch bigint := pg_catalog.nextval('event_outbox_epoch');
begin
    if epoch <= floor then
        -- One at a time, or one could take back what another has just set; and so far ahead that those who merely raise it
        -- meanwhile stay below.
        perform pg_catalog.pg_advisory_xact_lock('event_outbox'::regclass::oid::int, 1000000);
        epoch := pg_catalog.nextval('event_outbox_epoch');
        if epoch <= floor then
            epoch := pg_catalog.setval('event_outbox_epoch', floor + 1000000);
        end if;
    end if;
    return epoch;
end
$$;

comment on function relay_epoch_above is 'Raises the epoch above the floor, and returns it.';

create or replace function relay_schema_version() returns integer language sql immutable as 'select 7';
