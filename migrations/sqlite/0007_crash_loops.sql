-- What ends a crash loop: an event that kills the relay each time it is published.
--
-- Nothing is written here for events as long as relays end in good order. A relay writes one row when it publishes for the
-- first time, and removes it when it ends or has lived for a minute. One that finds others' rows notes, before it publishes
-- an event, that it is about to, and removes the note afterwards: what is left are the events that a relay died of.

-- Relays that began to publish in the last minute, or died within one.
create table event_relay_run (
    run_id text not null primary key,
    -- Host name and process id.
    worker text not null,
    begun_at text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now'))
);

-- Events during whose publishing a relay died, or that one publishes with care right now.
create table event_crash_suspect (
    event_id text not null,
    -- Which relay; one that died three times was three.
    run_id text not null,
    -- How many events were published together. Alone with three that died, it is dead-lettered.
    together integer not null,
    noted_at text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
    primary key (event_id, run_id)
);

drop view relay_schema_version;
create view relay_schema_version as select 7 as version;
