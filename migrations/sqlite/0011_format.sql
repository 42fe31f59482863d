-- The format of an event: 0 is the payload as JSON, the only one so far.
--
-- Relays that know no other leave events of another format where they are, and the later events of their keys too; they must
-- not publish them as if they were empty. So such rows are scheduled for the end of time. Their last_error says what their
-- available_at was, so that a relay that knows the format can give it back.

alter table event_outbox add column format integer not null default 0;
alter table event_dead_letter add column format integer not null default 0;
alter table event_history add column format integer not null default 0;

create index event_outbox_format_idx on event_outbox (aggregate_id, coalesce(aggregate_type, '')) where format <> 0;

create trigger event_outbox_other_format after insert on event_outbox when new.format <> 0
begin
    update event_outbox
    set status = 'scheduled', available_at = '9999-12-31 23:59:59', last_error = 'format_unknown: available_at ' || available_at
    where row_id = new.row_id;
end;

create trigger event_outbox_behind_other_format after insert on event_outbox
when new.format = 0 and new.aggregate_id is not null and exists (
    select 1 from event_outbox h
    where h.format <> 0 and h.aggregate_id = new.aggregate_id
      and coalesce(h.aggregate_type, '') = coalesce(new.aggregate_type, '') and h.id < new.id
)
begin
    update event_outbox
    set status = 'scheduled', available_at = '9999-12-31 23:59:59',
        last_error = 'format_unknown: behind such an event, available_at ' || available_at
    where row_id = new.row_id;
end;

-- What waited behind an event of another format goes on when that is gone, or of a format that is known.
create trigger event_outbox_other_format_gone after delete on event_outbox when old.format <> 0
begin
    update event_outbox
    set available_at = substr(last_error, 52), last_error = null
    where status = 'scheduled' and format = 0 and last_error glob 'format_unknown: behind *'
      and aggregate_id = old.aggregate_id and coalesce(aggregate_type, '') = coalesce(old.aggregate_type, '')
      and not exists (
          select 1 from event_outbox h
          where h.format <> 0 and h.aggregate_id = old.aggregate_id
            and coalesce(h.aggregate_type, '') = coalesce(old.aggregate_type, '') and h.id < event_outbox.id
      );
end;

create trigger event_outbox_format_changed after update of format on event_outbox when old.format <> 0 and new.format = 0
begin
    update event_outbox
    set available_at = substr(last_error, 30), last_error = null
    where row_id = new.row_id and last_error glob 'format_unknown: available_at *';
    update event_outbox
    set available_at = substr(last_error, 52), last_error = null
    where status = 'scheduled' and format = 0 and last_error glob 'format_unknown: behind *'
      and aggregate_id = old.aggregate_id and coalesce(aggregate_type, '') = coalesce(old.aggregate_type, '')
      and not exists (
          select 1 from event_outbox h
          where h.format <> 0 and h.aggregate_id = old.aggregate_id
            and coalesce(h.aggregate_type, '') = coalesce(old.aggregate_type, '') and h.id < event_outbox.id
      );
end;

drop view relay_schema_version;
create view relay_schema_version as select 11 as version;
