-- Every published event with its payload, for replay. Filled only where EVENT_HISTORY_ENABLED=true.

create table event_history (
    -- event_outbox.id.
    outbox_id integer not null,
    -- event_outbox.event_id.
    event_id text not null,
    -- The other columns of event_outbox.
    event_type text not null,
    source text not null,
    aggregate_type text,
    aggregate_id text,
    payload text not null,
    headers text not null,
    correlation_id text,
    causation_id text,
    schema_version integer not null,
    priority integer not null,
    created_at text not null,
    -- The destination that took it.
    destination text not null,
    -- This machine's clock, UTC, when that was recorded.
    published_at text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now'))
);

create index event_history_outbox_id_idx on event_history (outbox_id);

drop view relay_schema_version;
create view relay_schema_version as select 4 as version;
