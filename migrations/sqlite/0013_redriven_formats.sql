-- A dead letter of another format goes back as what it was: as format 0 it would be published as if it were JSON.

drop trigger event_dead_letter_redrive;

-- update event_dead_letter set redriven_at = datetime('now') where id = 7;
-- puts a dead letter back as owed to its own destination only, with fresh attempts.
create trigger event_dead_letter_redrive after update of redriven_at on event_dead_letter when new.redriven_at is not null
begin
    select raise(abort, 'event_dead_letter: this dead letter has been redriven already') where old.redriven_at is not null;
    insert into event_outbox (copy_of, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                              correlation_id, causation_id, schema_version, priority, format, created_at, destination)
    values (new.outbox_id, new.event_id, new.event_type, new.source, new.aggregate_type, new.aggregate_id, new.payload, new.headers,
            new.correlation_id, new.causation_id, new.schema_version, new.priority, new.format, new.created_at, new.destination);
end;

drop view relay_schema_version;
create view relay_schema_version as select 13 as version;
