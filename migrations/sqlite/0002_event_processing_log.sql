-- What became of every event: one row per event, destination and attempt. relay deletes the oldest, a few at a time.

create table event_processing_log (
    -- event_outbox.event_id.
    event_id text not null,
    -- event_outbox.id, which consumers see as sequence. Look events up by it: it is indexed.
    outbox_id integer not null,
    -- event_outbox.event_type.
    event_type text not null,
    -- The configured name of the destination; empty where the event never got as far as one.
    destination text not null,
    -- published; failed: will be tried again; dead_lettered; duplicate: the destination had it already; dropped: no route, by setting.
    status text not null,
    -- The number of this attempt, from 1.
    attempt integer not null,
    -- What the destination called it: the stream entry's id, EventBridge's event id.
    message_id text,
    -- Code and message of the failure.
    error text,
    -- Milliseconds that the publish call took which carried it.
    duration_ms integer not null,
    -- The relay that did it: host name and process id.
    worker text not null,
    -- This machine's clock, UTC.
    processed_at text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
    -- Not by IN, which looks each row up in a table of its own: it would double the time of an insert.
    constraint status_is_known check (
        status = 'published' or status = 'failed' or status = 'dead_lettered' or status = 'duplicate' or status = 'dropped'
    ),
    constraint error_iff_not_delivered check (
        (error is null) = (status = 'published' or status = 'duplicate')
    )
);

create index event_processing_log_outbox_id_idx on event_processing_log (outbox_id);

drop view relay_schema_version;
create view relay_schema_version as select 2 as version;
