-- Waking a relay that sleeps, at no cost to producers while none does.
--
-- A NOTIFY in every transaction would serialise all commits of the application. So a relay that wants to sleep holds
-- the advisory lock (oid of event_outbox, -1) exclusively. A producer tries it shared, which it then holds until its
-- commit: it gets it while every relay is awake, and notifies only where it does not. The test stands in the trigger's
-- WHEN, so that the usual insert never enters PL/pgSQL.

create function event_outbox_wake() returns trigger
language plpgsql as $$
begin
    perform pg_catalog.pg_notify('event_outbox', '');
    return null;
end
$$;

comment on function event_outbox_wake is 'Wakes the relays that sleep on channel event_outbox.';

create trigger event_outbox_wake
    after insert on event_outbox
    for each statement
    when (not pg_catalog.pg_try_advisory_xact_lock_shared('event_outbox'::regclass::oid::int, -1))
    execute function event_outbox_wake();

create or replace function relay_schema_version() returns integer language sql immutable as 'select 5';
