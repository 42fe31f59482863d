-- Which relays use the file, by what configuration, so that a difference is told. One relay works at a time, by a lock.

create table event_relay (
    -- A later start has a higher one.
    id integer primary key,
    -- Host name and process id.
    worker text not null,
    -- The version of the program, and the newest schema that it knows.
    version text not null,
    schema_version integer not null,
    -- A run of relay --once.
    once integer not null,
    since text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
    -- The same for equal destinations and routes.
    fingerprint text not null,
    -- What each destination is, without addresses and secrets; the routes in words, without the values of headers.
    destinations text not null,
    routes text not null,
    -- When it said last that it lives; it does so only while there are several configurations.
    seen_at text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now'))
);

-- Raised with each change, so that who looks need not read the rows. The last id that was given.
create table event_relay_changes (
    changes integer not null,
    last_id integer not null
);

insert into event_relay_changes values (1, 0);

drop view relay_schema_version;
create view relay_schema_version as select 12 as version;
