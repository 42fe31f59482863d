-- What `relay status` shows and no table has: how many events each destination took in the last minutes, and which
-- destinations a relay finds down.

-- Relays that work add to it every 5 s. Rows are kept for 15 minutes.
create table event_tally (
    -- The beginning of the minute in which a relay counted them.
    minute text not null,
    -- Empty: the event was decided before it was routed.
    destination text not null,
    -- Deliveries that the destination took.
    published integer not null,
    -- Attempts that failed and were charged; the events are tried again.
    retried integer not null,
    -- Events that became dead letters.
    dead_lettered integer not null,
    primary key (minute, destination)
) without rowid;

-- A JSON object: the destinations that this relay finds down or misconfigured, since when, and why.
alter table event_relay add column trouble text not null default '{}';

drop view relay_schema_version;
create view relay_schema_version as select 15 as version;
