-- Destinations that an operator has paused: their events wait, uncharged, until somebody resumes them. By hand:
-- insert into event_pause (destination) values ('redis'); delete from event_pause where destination = 'redis';

create table event_pause (
    destination text not null,
    -- A glob, * and ?: the types that are held back, with later events of their keys; *: all.
    event_type text not null default '*',
    paused_at text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
    -- The user that ran the command and the host; sql: somebody inserted the row.
    paused_by text not null default 'sql',
    primary key (destination, event_type)
) without rowid;

create trigger event_pause_added after insert on event_pause
begin
    -- The relay looks at event_pause where this number has changed.
    update event_relay_changes set changes = changes + 1;
    insert into event_operator_action (command, action, filter, event_count, done_by)
    values (lower(hex(randomblob(4))) || '-' || lower(hex(randomblob(2))) || '-4' || substr(lower(hex(randomblob(2))), 2) || '-'
            || substr('89ab', 1 + (random() & 3), 1) || substr(lower(hex(randomblob(2))), 2) || '-' || lower(hex(randomblob(6))),
            'pause', json_object('destination', new.destination, 'type', new.event_type), 0, new.paused_by);
end;

create trigger event_pause_removed after delete on event_pause
begin
    update event_relay_changes set changes = changes + 1;
    -- What was held back is due now.
    update event_outbox set available_at = strftime('%Y-%m-%d %H:%M:%f', 'now')
    where status = 'scheduled' and destination = old.destination and last_error is null
      and available_at > strftime('%Y-%m-%d %H:%M:%f', 'now');
    insert into event_operator_action (command, action, filter, event_count, done_by)
    values (lower(hex(randomblob(4))) || '-' || lower(hex(randomblob(2))) || '-4' || substr(lower(hex(randomblob(2))), 2) || '-'
            || substr('89ab', 1 + (random() & 3), 1) || substr(lower(hex(randomblob(2))), 2) || '-' || lower(hex(randomblob(6))),
            'resume', json_object('destination', old.destination, 'type', old.event_type), 0, 'sql');
end;

drop view relay_schema_version;
create view relay_schema_version as select 16 as version;
