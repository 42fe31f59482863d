-- What ends a crash loop: an event that kills the relay each time it is published.
--
-- Nothing is written here for events as long as relays end in good order. A relay writes one row when it publishes for the
-- first time, and removes it when it ends or has lived for a minute. One that finds others' rows notes, before it publishes
-- an event, that it is about to, and removes the note afterwards: what is left are the events that a relay died of.

create table event_relay_run (
    run_id uuid not null,
    worker text not null,
    begun_at timestamptz not null default pg_catalog.clock_timestamp(),
    constraint event_relay_run_pkey primary key (run_id)
);

comment on table event_relay_run is 'Relays that began to publish in the last minute, or died within one.';
comment on column event_relay_run.run_id is 'Which relay: made anew at each start.';
comment on column event_relay_run.begun_at is 'When it published for the first time.';
comment on column event_relay_run.worker is 'Host name and process id.';

create table event_crash_suspect (
    event_id uuid not null,
    run_id uuid not null,
    together integer not null,
    noted_at timestamptz not null default pg_catalog.clock_timestamp(),
    constraint event_crash_suspect_pkey primary key (event_id, run_id)
);

comment on table event_crash_suspect is 'Events during whose publishing a relay died, or that one publishes with care right now.';
comment on column event_crash_suspect.event_id is 'As in event_outbox.';
comment on column event_crash_suspect.noted_at is 'When, by the clock of the database.';
comment on column event_crash_suspect.run_id is 'Which relay; one that died three times was three.';
comment on column event_crash_suspect.together is 'How many events were published together. Alone with three that died, it is dead-lettered.';

create or replace function relay_schema_version() returns integer language sql immutable as 'select 8';
