-- What keeps a key from going on. Each retry moves available_at, so that the view of lag showed nothing due, and no lag, while a
-- key was blocked for hours. Now it tells apart what is delayed, what is tried again, and what waits behind such an event.

-- Events still owed, by destination (empty: not routed yet), status and priority. due_count: available_at has come; lag_seconds:
-- for how long the oldest event is due, where one that is tried again is due since its first failure; delayed_count: not due yet,
-- and not failed; retrying_count: failed at this destination and tried again, see event_blocked_keys; waiting_behind_count: an
-- earlier event of the key is tried again.
drop view event_outbox_lag;
create view event_outbox_lag as
select
    destination,
    status,
    priority,
    count(*) as event_count,
    sum(due) as due_count,
    min(created_at) as oldest_created_at,
    (julianday('now') - julianday(min(
        case when retrying then coalesce(first_failed_at, created_at) when due then available_at end
    ))) * 86400 as lag_seconds,
    sum(not due and not retrying and not waiting_behind) as delayed_count,
    sum(retrying) as retrying_count,
    sum(waiting_behind) as waiting_behind_count
from (
    select
        o.destination,
        o.status,
        o.priority,
        o.created_at,
        o.available_at,
        o.first_failed_at,
        o.available_at <= strftime('%Y-%m-%d %H:%M:%f', 'now') as due,
        o.status = 'scheduled' and o.destination <> '' and o.last_error is not null as retrying,
        o.status = 'scheduled' and o.destination <> '' and o.last_error is null and o.aggregate_id is not null and exists (
            select 1 from event_outbox b
            where b.status = 'scheduled' and b.destination <> '' and b.aggregate_id is not null
              and b.destination = o.destination and b.aggregate_id = o.aggregate_id
              and coalesce(b.aggregate_type, '') = coalesce(o.aggregate_type, '') and b.id < o.id and b.last_error is not null
        ) as waiting_behind
    from event_outbox o
)
group by destination, status, priority;

-- Events that have failed at their destination and are tried again; later events of the same key wait for them. Without payloads.
-- aggregate_type, aggregate_id: the key that is blocked (null: the event has no key, and blocks nobody); outbox_id, event_id,
-- event_type: the event that blocks; attempts: charged to it so far; blocked_since: when its first attempt failed;
-- next_attempt_at: null: not before somebody sets its available_at; error: code and message of its last failure;
-- waiting_behind_count: later events of its key that wait for it, counted up to 1000. One that was just inserted counts once the
-- relay has seen it.
create view event_blocked_keys as
select
    b.destination,
    b.aggregate_type,
    b.aggregate_id,
    b.id as outbox_id,
    b.event_id,
    b.event_type,
    b.attempts,
    b.first_failed_at as blocked_since,
    case when b.available_at < '9999-12-31' then b.available_at end as next_attempt_at,
    b.last_error as error,
    case when b.aggregate_id is null then 0 else (
        select count(*)
        from (
            select 1 from event_outbox w
            where w.status = 'scheduled' and w.destination <> '' and w.aggregate_id is not null
              and w.destination = b.destination and w.aggregate_id = b.aggregate_id
              and coalesce(w.aggregate_type, '') = coalesce(b.aggregate_type, '') and w.id > b.id
            limit 1000
        )
    ) end as waiting_behind_count
from event_outbox b
where b.status = 'scheduled' and b.destination <> '' and b.last_error is not null;

drop view relay_schema_version;
create view relay_schema_version as select 9 as version;
