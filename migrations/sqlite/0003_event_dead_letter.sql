-- The events that relay gave up on: whole, with the reason. Nothing here expires by itself.

create table event_dead_letter (
    -- What a redrive names.
    id integer primary key autoincrement,
    -- event_outbox.id, kept by a redrive.
    outbox_id integer not null,
    -- event_outbox.event_id, kept by a redrive.
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
    -- The destination that it could not be delivered to; empty: no route took it, or it was unfit for any.
    destination text not null,
    -- How many attempts were charged to it.
    attempts integer not null,
    -- The destination's code for the last failure, or relay's own, in lower case.
    error_code text not null,
    -- The message of the last failure.
    error text not null,
    -- When the first attempt failed.
    first_failed_at text not null,
    -- When the last attempt failed and it came here.
    failed_at text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
    -- When it was put back into the outbox; null: never. Setting it puts it back.
    redriven_at text,
    constraint attempts_start_at_1 check (attempts >= 1),
    constraint first_failure_is_not_after_last check (first_failed_at <= failed_at)
);

create index event_dead_letter_failed_at_idx on event_dead_letter (failed_at);

-- update event_dead_letter set redriven_at = datetime('now') where id = 7;
-- puts a dead letter back as owed to its own destination only, with fresh attempts.
create trigger event_dead_letter_redrive after update of redriven_at on event_dead_letter when new.redriven_at is not null
begin
    select raise(abort, 'event_dead_letter: this dead letter has been redriven already') where old.redriven_at is not null;
    insert into event_outbox (copy_of, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                              correlation_id, causation_id, schema_version, priority, created_at, destination)
    values (new.outbox_id, new.event_id, new.event_type, new.source, new.aggregate_type, new.aggregate_id, new.payload, new.headers,
            new.correlation_id, new.causation_id, new.schema_version, new.priority, new.created_at, new.destination);
end;

drop view relay_schema_version;
create view relay_schema_version as select 3 as version;
