-- What the people on call look at first, without payloads. They count rows: for people, not for a scrape every few seconds.

-- Events still owed, by destination (empty: not routed yet), status and priority; lag_seconds is the age of the oldest due one.
create view event_outbox_lag as
select
    destination,
    status,
    priority,
    count(*) as event_count,
    sum(available_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')) as due_count,
    min(created_at) as oldest_created_at,
    (julianday('now') - julianday(min(case when available_at <= strftime('%Y-%m-%d %H:%M:%f', 'now') then available_at end))) * 86400
        as lag_seconds
from event_outbox
group by destination, status, priority;

-- Dead letters not redriven yet, by destination, type and error code.
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
where redriven_at is null
group by destination, event_type, error_code;

drop view relay_schema_version;
create view relay_schema_version as select 5 as version;
