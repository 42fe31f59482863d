-- The events that relay gave up on: whole, with the reason. Nothing here expires by itself.

create table event_dead_letter (
    id bigint generated always as identity primary key,
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
    attempts integer not null,
    error_code text not null,
    error text not null,
    first_failed_at timestamptz not null,
    failed_at timestamptz not null default pg_catalog.clock_timestamp(),
    redriven_at timestamptz,
    constraint attempts_start_at_1 check (attempts >= 1),
    constraint first_failure_is_not_after_last check (first_failed_at <= failed_at)
);

comment on table event_dead_letter is 'Events that relay gave up on, one row per event and destination.';
comment on column event_dead_letter.id is 'What redrive_dead_letter takes.';
comment on column event_dead_letter.outbox_id is 'event_outbox.id, kept by a redrive.';
comment on column event_dead_letter.event_id is 'event_outbox.event_id, kept by a redrive.';
comment on column event_dead_letter.event_type is 'event_outbox.event_type.';
comment on column event_dead_letter.source is 'event_outbox.source.';
comment on column event_dead_letter.aggregate_type is 'event_outbox.aggregate_type.';
comment on column event_dead_letter.aggregate_id is 'event_outbox.aggregate_id.';
comment on column event_dead_letter.payload is 'event_outbox.payload.';
comment on column event_dead_letter.headers is 'event_outbox.headers.';
comment on column event_dead_letter.correlation_id is 'event_outbox.correlation_id.';
comment on column event_dead_letter.causation_id is 'event_outbox.causation_id.';
comment on column event_dead_letter.schema_version is 'event_outbox.schema_version.';
comment on column event_dead_letter.priority is 'event_outbox.priority.';
comment on column event_dead_letter.created_at is 'event_outbox.created_at.';
comment on column event_dead_letter.destination is 'The destination that it could not be delivered to; empty: no route took it, or it was unfit for any.';
comment on column event_dead_letter.attempts is 'How many attempts were charged to it.';
comment on column event_dead_letter.error_code is 'The destination''s code for the last failure, or relay''s own, in lower case.';
comment on column event_dead_letter.error is 'The message of the last failure.';
comment on column event_dead_letter.first_failed_at is 'When the first attempt failed.';
comment on column event_dead_letter.failed_at is 'When the last attempt failed and it came here.';
comment on column event_dead_letter.redriven_at is 'When it was put back into the outbox; null: never.';

create index event_dead_letter_failed_at_idx on event_dead_letter (failed_at);

create function redrive_dead_letter(dead_letter_id bigint) returns uuid
language plpgsql security definer as $$
declare
    dead event_dead_letter;
begin
    update event_dead_letter set redriven_at = pg_catalog.clock_timestamp()
    where id = dead_letter_id and redriven_at is null
    returning * into dead;
    if not found then
        if exists (select from event_dead_letter where id = dead_letter_id) then
            raise exception 'redrive_dead_letter: dead letter % has been redriven already', dead_letter_id;
        end if;
        raise exception 'redrive_dead_letter: there is no dead letter %', dead_letter_id;
    end if;
    insert into event_outbox (id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                              correlation_id, causation_id, schema_version, priority, created_at, destination)
    overriding system value
    values (dead.outbox_id, dead.event_id, dead.event_type, dead.source, dead.aggregate_type, dead.aggregate_id, dead.payload,
            dead.headers, dead.correlation_id, dead.causation_id, dead.schema_version, dead.priority, dead.created_at, dead.destination);
    return dead.event_id;
end
$$;

comment on function redrive_dead_letter is 'Puts a dead letter back as owed to its own destination only, with fresh attempts; returns its event_id.';

do $$
begin
    execute pg_catalog.format('alter function redrive_dead_letter(bigint) set search_path = %I, pg_temp', pg_catalog.current_schema());
end
$$;
revoke execute on function redrive_dead_letter from public;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 3';
