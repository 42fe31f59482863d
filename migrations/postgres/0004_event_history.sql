-- Every published event with its payload, by day, for replay. Filled only where EVENT_HISTORY_ENABLED=true.

create table event_history (
    outbox_id bigint not null,
    event_id uuid not null,
    event_type text not null,
    source text not null,
    aggregate_type text,
    aggregate_id text,
    payload jsonb not null,
    headers jsonb not null,
    correlation_id text,
    causation_id text,
    schema_version integer not null,
    priority smallint not null,
    created_at timestamptz not null,
    destination text not null,
    published_at timestamptz not null default pg_catalog.clock_timestamp()
) partition by range (published_at);

comment on table event_history is 'Published events with their payloads, one row per event and destination, in day partitions.';
comment on column event_history.outbox_id is 'event_outbox.id.';
comment on column event_history.event_id is 'event_outbox.event_id.';
comment on column event_history.event_type is 'event_outbox.event_type.';
comment on column event_history.source is 'event_outbox.source.';
comment on column event_history.aggregate_type is 'event_outbox.aggregate_type.';
comment on column event_history.aggregate_id is 'event_outbox.aggregate_id.';
comment on column event_history.payload is 'event_outbox.payload.';
comment on column event_history.headers is 'event_outbox.headers.';
comment on column event_history.correlation_id is 'event_outbox.correlation_id.';
comment on column event_history.causation_id is 'event_outbox.causation_id.';
comment on column event_history.schema_version is 'event_outbox.schema_version.';
comment on column event_history.priority is 'event_outbox.priority.';
comment on column event_history.created_at is 'event_outbox.created_at.';
comment on column event_history.destination is 'The destination that took it.';
comment on column event_history.published_at is 'The database''s clock when that was recorded.';

create index event_history_outbox_id_idx on event_history using brin (outbox_id) with (pages_per_range = 16, autosummarize = on);

select relay_add_days('event_history', 7);

create or replace function relay_schema_version() returns integer language sql immutable as 'select 4';
