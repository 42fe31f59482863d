-- What sets one claim apart from the next, so that a destination that keeps a note of it can refuse an outdated one.
-- A claim reads the epoch, every settle raises it. `outbox_id` tells this outbox from others that publish to the same place.
create table event_outbox_epoch (
    outbox_id text not null,
    epoch integer not null
);

insert into event_outbox_epoch values (lower(hex(randomblob(6))), 1);

drop view relay_schema_version;
create view relay_schema_version as select 6 as version;
