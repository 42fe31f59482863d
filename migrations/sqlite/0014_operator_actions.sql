-- What operators do with dead letters and with events that wait, and who did it.
--
-- A dead letter keeps its row when it is redriven. If the event fails again, that is a row of its own with the same event_id. So
-- the rows of one event show how often it was redriven, by whom and when.

-- One row per command. Nothing here expires by itself.
create table event_operator_action (
    id integer primary key autoincrement,
    -- The command, a UUID. One that works in several transactions adds to its row.
    command text not null unique,
    -- redrive, discard, purge, retry_now, give_up, move_owed, ...
    action text not null,
    -- What was chosen, as JSON: type, key, destination, error, since, until, id, state; {}: everything.
    filter text not null default '{}',
    -- What else was given, as JSON, such as the reason, or the destination that events were moved to.
    details text not null default '{}',
    -- How many events or dead letters were changed.
    event_count integer not null,
    -- The user that ran the command and the host; sql: somebody set event_dead_letter.redriven_at.
    done_by text not null,
    -- When its first and its last transaction was.
    begun_at text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
    done_at text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now'))
);

-- Who put it back.
alter table event_dead_letter add column redriven_by text;
-- The destination that it was redriven to; null: its own.
alter table event_dead_letter add column redriven_to text;
-- When somebody decided that it is not redriven, who did, and why; null: never.
alter table event_dead_letter add column discarded_at text;
alter table event_dead_letter add column discarded_by text;
alter table event_dead_letter add column discard_reason text;

drop trigger event_dead_letter_redrive;

-- update event_dead_letter set redriven_at = datetime('now') where id = 7;
-- puts a dead letter back as owed to its own destination only, with fresh attempts; redriven_to: to that one. An event that is
-- still owed to that destination is owed once.
create trigger event_dead_letter_redrive after update of redriven_at on event_dead_letter when new.redriven_at is not null
begin
    select raise(abort, 'event_dead_letter: this dead letter has been redriven already') where old.redriven_at is not null;
    insert into event_outbox (copy_of, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                              correlation_id, causation_id, schema_version, priority, format, created_at, destination)
    select new.outbox_id, new.event_id, new.event_type, new.source, new.aggregate_type, new.aggregate_id, new.payload, new.headers,
           new.correlation_id, new.causation_id, new.schema_version, new.priority, new.format, new.created_at,
           coalesce(new.redriven_to, new.destination)
    where not exists (
        select 1 from event_outbox o
        where o.partition in ((9 - new.priority) * 64, (9 - new.priority) * 64 + 640) and o.id = new.outbox_id
          and o.destination = coalesce(new.redriven_to, new.destination) and o.event_id = new.event_id
    );
    -- By hand; `relay dead-letter` says who did it, and writes a row for all together.
    insert into event_operator_action (command, action, filter, event_count, done_by)
    select lower(hex(randomblob(4))) || '-' || lower(hex(randomblob(2))) || '-4' || substr(lower(hex(randomblob(2))), 2) || '-'
           || substr('89ab', 1 + (random() & 3), 1) || substr(lower(hex(randomblob(2))), 2) || '-' || lower(hex(randomblob(6))),
           'redrive', '{"id":' || new.id || '}', 1, 'sql'
    where new.redriven_by is null;
end;

-- Dead letters that are neither redriven nor discarded, by destination, type and error code.
drop view event_dead_letter_summary;
create view event_dead_letter_summary as
select
    destination,
    event_type,
    error_code,
    count(*) as event_count,
    min(failed_at) as first_failed_at,
    max(failed_at) as last_failed_at,
    max(error) as sample_error
from event_dead_letter
where redriven_at is null and discarded_at is null
group by destination, event_type, error_code;

drop view relay_schema_version;
create view relay_schema_version as select 14 as version;
