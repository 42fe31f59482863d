-- What the people on call look at first, without payloads. They count rows: for people, not for a scrape every few seconds.

create view event_outbox_lag as
select
    destination,
    status,
    priority,
    pg_catalog.count(*) as event_count,
    pg_catalog.count(*) filter (where available_at <= pg_catalog.now()) as due_count,
    pg_catalog.min(created_at) as oldest_created_at,
    extract(epoch from pg_catalog.now() - pg_catalog.min(available_at) filter (where available_at <= pg_catalog.now())) as lag_seconds
from event_outbox
group by destination, status, priority;

comment on view event_outbox_lag is 'Events still owed, by destination (empty: not routed yet), status and priority; lag_seconds is the age of the oldest due one.';

create view event_dead_letter_summary as
select
    destination,
    event_type,
    error_code,
    pg_catalog.count(*) as event_count,
    pg_catalog.min(failed_at) as first_failed_at,
    pg_catalog.max(failed_at) as last_failed_at,
    pg_catalog.max(error) as sample_error
from event_dead_letter
where redriven_at is null
group by destination, event_type, error_code;

comment on view event_dead_letter_summary is 'Dead letters not redriven yet, by destination, type and error code.';

create or replace function relay_schema_version() returns integer language sql immutable as 'select 6';
