-- The outbox: applications insert here in their own transactions, `relay` publishes and deletes.
-- The application's own SQLite must be 3.31 or later (generated columns) with its JSON functions.

create table event_outbox (
    -- Where relay finds the row again; never used twice.
    row_id integer primary key autoincrement,
    -- The id of the event, where this row is what one destination is still owed of it.
    copy_of integer,
    -- Insertion order, which is commit order here; the order of a key's events.
    id integer generated always as (coalesce(copy_of, row_id)) virtual,
    -- The identity consumers see; every destination carries it. A random UUID.
    event_id text not null default (
        lower(hex(randomblob(4))) || '-' || lower(hex(randomblob(2))) || '-4' || substr(lower(hex(randomblob(2))), 2) || '-'
        || substr('89ab', 1 + (random() & 3), 1) || substr(lower(hex(randomblob(2))), 2) || '-' || lower(hex(randomblob(6)))
    ),
    -- What happened, as in order.created: 1 to 128 characters.
    event_type text not null,
    -- The module or service that emitted it; empty: the relay's own default.
    source text not null default '',
    -- Together the ordering key, as in order and 42; a null aggregate_id: no order wanted.
    aggregate_type text,
    aggregate_id text,
    -- Any JSON text; consumers get exactly these bytes.
    payload text not null default '{}',
    -- A flat map of strings: traceparent, tenant, ...
    headers text not null default '{}',
    -- Shared by all events of one business operation.
    correlation_id text,
    -- The event or command that caused this one.
    causation_id text,
    -- Version of the payload's schema, from 1.
    schema_version integer not null default 1,
    -- 0 to 9, 9 first; order within a key holds among equal priorities.
    priority integer not null default 0,
    -- UTC, as datetime('now', '+15 minutes') gives it. Not before; a later one is a delayed event, which holds up nobody.
    available_at text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
    -- pending, or scheduled: delayed, waiting for its next attempt, or for its destination. A plain insert need not set it.
    status text not null default 'pending',
    -- Empty: routed when claimed. Set: only the delivery to this one is still owed.
    destination text not null default '',
    -- Attempts charged to the event so far; an outage of a destination charges none.
    attempts integer not null default 0,
    -- Why it is not delivered yet: code and message of the last failed attempt.
    last_error text,
    -- When its first charged attempt failed.
    first_failed_at text,
    -- When it was emitted.
    created_at text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
    -- Urgent first; the scheduled rows lie 640 above. One partition per priority: here one relay works at a time.
    partition integer generated always as (case status when 'scheduled' then 640 else 0 end + (9 - priority) * 64) virtual,
    -- A UUID, the only thing that a consumer is promised.
    constraint event_id_is_a_uuid check (
        typeof(event_id) = 'text' and length(event_id) = 36
        and replace(event_id, '-', '') not glob '*[^0-9a-fA-F]*' and length(replace(event_id, '-', '')) = 32
        and substr(event_id, 9, 1) || substr(event_id, 14, 1) || substr(event_id, 19, 1) || substr(event_id, 24, 1) = '----'
    ),
    constraint event_type_has_1_to_128_characters check (typeof(event_type) = 'text' and length(event_type) between 1 and 128),
    -- SQLite keeps a BLOB as such in a column of text; a key as text and the same as a BLOB would be two.
    constraint text_is_no_blob check (
        typeof(source) <> 'blob' and typeof(aggregate_type) <> 'blob' and typeof(aggregate_id) <> 'blob'
        and typeof(correlation_id) <> 'blob' and typeof(causation_id) <> 'blob' and typeof(destination) <> 'blob'
    ),
    constraint payload_is_json check (typeof(payload) = 'text' and instr(payload, char(0)) = 0 and json_valid(payload)),
    constraint headers_are_a_json_object check (
        headers = '{}' or (typeof(headers) = 'text' and json_valid(headers) and json_type(headers) = 'object')
    ),
    -- Numbers have 32 bits, as everywhere else.
    constraint schema_version_starts_at_1 check (
        typeof(schema_version) = 'integer' and schema_version between 1 and 2147483647
    ),
    constraint priority_is_0_to_9 check (typeof(priority) = 'integer' and priority between 0 and 9),
    constraint status_is_pending_or_scheduled check (status in ('pending', 'scheduled')),
    constraint attempts_start_at_0 check (typeof(attempts) = 'integer' and attempts between 0 and 2147483647),
    -- Compared as text, so that only one way of writing a time will do. The day is asked for by calculation, because SQLite
    -- gives February 30th and 24 o'clock back as they are.
    constraint available_at_is_utc_as_datetime_gives_it check (
        (available_at is datetime(available_at) or available_at is strftime('%Y-%m-%d %H:%M:%f', available_at))
        and date(available_at, '+0 days') is substr(available_at, 1, 10)
    ),
    constraint created_at_is_utc_as_datetime_gives_it check (
        (created_at is datetime(created_at) or created_at is strftime('%Y-%m-%d %H:%M:%f', created_at))
        and date(created_at, '+0 days') is substr(created_at, 1, 10)
    )
);

-- What a claim reads: the pending rows, urgent first, each priority in insertion order.
create index event_outbox_claim_idx on event_outbox (partition, id, destination);

-- What is due next, by destination, so that rows owed to a destination that is down are never walked over.
create index event_outbox_scheduled_idx on event_outbox (destination, available_at, id) where status = 'scheduled';

-- The earlier events that a key waits behind.
create index event_outbox_waiting_idx on event_outbox (destination, aggregate_id, coalesce(aggregate_type, ''), id)
where status = 'scheduled' and destination <> '' and aggregate_id is not null;

-- What a CHECK cannot say, for it may not look into JSON.
create trigger event_outbox_headers before insert on event_outbox when new.headers <> '{}'
begin
    select raise(abort, 'CHECK constraint failed: headers_are_a_flat_string_map')
    where exists (select 1 from json_each(new.headers) where type <> 'text');
    select raise(abort, 'CHECK constraint failed: headers_take_no_reserved_name')
    where exists (
        select 1 from json_each(new.headers)
        where key in ('specversion', 'id', 'source', 'type', 'subject', 'time', 'datacontenttype', 'dataschema', 'sequence',
            'partitionkey', 'correlationid', 'causationid', 'schemaversion', 'data', 'data_base64')
    );
end;

-- The number of the last migration of relay that was applied here.
create view relay_schema_version as select 1 as version;
