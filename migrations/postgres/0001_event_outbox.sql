-- The outbox: applications insert here in their own transactions, `relay` publishes and deletes.

create table event_outbox (
    id bigint generated always as identity (cache 1),
    event_id uuid not null default pg_catalog.gen_random_uuid(),
    event_type text not null,
    source text not null default '',
    aggregate_type text,
    aggregate_id text,
    payload jsonb not null default '{}',
    headers jsonb not null default '{}',
    correlation_id text,
    causation_id text,
    schema_version integer not null default 1,
    priority smallint not null default 0,
    available_at timestamptz not null default pg_catalog.now(),
    status text not null default 'pending',
    destination text not null default '',
    attempts integer not null default 0,
    last_error text,
    first_failed_at timestamptz,
    created_at timestamptz not null default pg_catalog.now(),
    -- The scheduled rows lie 640 above, so that the pending ones, which every claim reads, stay dense at the left.
    partition smallint not null generated always as ((
        case status when 'scheduled' then 640 else 0 end
        + (9 - priority) * 64
        + (case
            when aggregate_id is null then pg_catalog.uuid_hash_extended(event_id, 0)
            else pg_catalog.hashtextextended(aggregate_id, pg_catalog.hashtextextended(coalesce(aggregate_type, ''), 0))
           end & 63::bigint)
    )::smallint) stored,
    constraint event_outbox_pkey primary key (partition, id, destination),
    constraint event_type_has_1_to_128_characters check (pg_catalog.char_length(event_type) between 1 and 128),
    constraint headers_are_a_flat_string_map check (
        headers = '{}'
        -- Strict: the lax mode looks into arrays, and takes one of strings for a string.
        or (pg_catalog.jsonb_typeof(headers) = 'object'
            and not pg_catalog.jsonb_path_exists(headers, 'strict $.* ? (@.type() != "string")'))
    ),
    constraint headers_take_no_reserved_name check (
        headers = '{}'
        or not headers ?| array['specversion', 'id', 'source', 'type', 'subject', 'time', 'datacontenttype', 'dataschema',
            'sequence', 'partitionkey', 'correlationid', 'causationid', 'schemaversion', 'data', 'data_base64']
    ),
    -- A number of 8 characters, 1e131071, prints as 131,072 digits. No relay could read a payload whose text PostgreSQL cannot make.
    constraint payload_can_be_printed check (pg_catalog.pg_column_size(payload) < 100000 or pg_catalog.octet_length(payload::text) > 0),
    constraint schema_version_starts_at_1 check (schema_version >= 1),
    constraint priority_is_0_to_9 check (priority between 0 and 9),
    constraint status_is_pending_or_scheduled check (status in ('pending', 'scheduled')),
    constraint attempts_start_at_0 check (attempts >= 0)
) with (
    -- A queue dies as fast as it lives: vacuum after a fixed number of dead rows, not a share of the table, and at full speed.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = 100000,
    autovacuum_vacuum_cost_delay = 0,
    autovacuum_analyze_scale_factor = 0,
    autovacuum_analyze_threshold = 50000,
    toast.autovacuum_vacuum_scale_factor = 0,
    toast.autovacuum_vacuum_threshold = 5000,
    toast.autovacuum_vacuum_cost_delay = 0,
    -- Giving the tail of the file back takes an exclusive lock that producers would feel.
    vacuum_truncate = false,
    toast.vacuum_truncate = false
);

comment on table event_outbox is 'Events that are still owed to a destination. Applications insert; relay publishes, then deletes.';
comment on column event_outbox.id is 'Insertion order; the order of a key''s events.';
comment on column event_outbox.event_id is 'The identity consumers see; every destination carries it.';
comment on column event_outbox.event_type is 'What happened, as in order.created: 1 to 128 characters.';
comment on column event_outbox.source is 'The module or service that emitted it; empty: the relay''s own default.';
comment on column event_outbox.aggregate_type is 'With aggregate_id the ordering key, as in order.';
comment on column event_outbox.aggregate_id is 'With aggregate_type the ordering key, as in 42; null: no order wanted.';
comment on column event_outbox.payload is 'Any JSON; consumers get exactly payload::text.';
comment on column event_outbox.headers is 'A flat map of strings: traceparent, tenant, ...';
comment on column event_outbox.correlation_id is 'Shared by all events of one business operation.';
comment on column event_outbox.causation_id is 'The event or command that caused this one.';
comment on column event_outbox.schema_version is 'Version of the payload''s schema, from 1.';
comment on column event_outbox.priority is '0 to 9, 9 first; order within a key holds among equal priorities.';
comment on column event_outbox.available_at is 'Not before; a later one is a delayed event, which holds up nobody.';
comment on column event_outbox.status is 'pending, or scheduled: delayed, waiting for its next attempt, or for its destination. A plain insert need not set it.';
comment on column event_outbox.destination is 'Empty: routed when claimed. Set: only the delivery to this one is still owed.';
comment on column event_outbox.attempts is 'Attempts charged to the event so far; an outage of a destination charges none.';
comment on column event_outbox.last_error is 'Why it is not delivered yet: code and message of the last failed attempt.';
comment on column event_outbox.first_failed_at is 'When its first charged attempt failed.';
comment on column event_outbox.created_at is 'When the transaction that emitted it began.';
comment on column event_outbox.partition is 'The unit that a relay takes: 64 per priority by hash of the key; scheduled rows 640 higher.';

-- What is due next, by destination, so that rows owed to a destination that is down are never walked over.
create index event_outbox_scheduled_idx on event_outbox (destination, available_at, id) where status = 'scheduled';

-- The earlier events that a key waits behind. By hash: a key may be longer than an index entry.
create index event_outbox_waiting_idx on event_outbox (
    destination,
    pg_catalog.hashtextextended(aggregate_id, pg_catalog.hashtextextended(coalesce(aggregate_type, ''), 0)),
    id
) where status = 'scheduled' and destination <> '' and aggregate_id is not null;

create function emit_event(
    event_type text,
    payload jsonb default '{}',
    aggregate_type text default null,
    aggregate_id text default null,
    source text default '',
    headers jsonb default '{}',
    correlation_id text default null,
    causation_id text default null,
    schema_version integer default 1,
    priority integer default 0,
    delay interval default '0',
    event_id uuid default pg_catalog.gen_random_uuid()
) returns uuid
language plpgsql as $$
#variable_conflict use_variable
begin
    insert into event_outbox (event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                              correlation_id, causation_id, schema_version, priority, available_at, status)
    values (event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
            correlation_id, causation_id, schema_version, priority::smallint, pg_catalog.now() + delay,
            case when delay > interval '0' then 'scheduled' else 'pending' end);
    return event_id;
end
$$;

comment on function emit_event is 'Inserts one event in the caller''s transaction and returns its event_id.';

create function relay_schema_version() returns integer language sql immutable as 'select 1';

comment on function relay_schema_version is 'The number of the last migration of relay that was applied here.';
