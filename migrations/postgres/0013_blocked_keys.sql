-- What keeps a key from going on. Each retry moves available_at, so that the view of lag showed nothing due, and no lag, while a
-- key was blocked for hours. Now it tells apart what is delayed, what is tried again, and what waits behind such an event.

create or replace view event_outbox_lag as
select
    o.destination,
    o.status,
    o.priority,
    pg_catalog.count(*) as event_count,
    pg_catalog.count(*) filter (where o.available_at <= pg_catalog.now()) as due_count,
    pg_catalog.min(o.created_at) as oldest_created_at,
    extract(epoch from pg_catalog.now() - pg_catalog.min(
        case when s.retrying then coalesce(o.first_failed_at, o.created_at)
             when o.available_at <= pg_catalog.now() then o.available_at end
    )) as lag_seconds,
    pg_catalog.count(*) filter (where o.available_at > pg_catalog.now() and not s.retrying and not s.waiting_behind) as delayed_count,
    pg_catalog.count(*) filter (where s.retrying) as retrying_count,
    pg_catalog.count(*) filter (where s.waiting_behind) as waiting_behind_count
from event_outbox o
cross join lateral (
    select
        o.status = 'scheduled' and o.destination <> '' and o.last_error is not null as retrying,
        o.status = 'scheduled' and o.destination <> '' and o.last_error is null and o.aggregate_id is not null and exists (
            select from event_outbox b
            where b.status = 'scheduled' and b.destination <> '' and b.aggregate_id is not null and b.destination = o.destination
              and pg_catalog.hashtextextended(b.aggregate_id, pg_catalog.hashtextextended(coalesce(b.aggregate_type, ''), 0))
                = pg_catalog.hashtextextended(o.aggregate_id, pg_catalog.hashtextextended(coalesce(o.aggregate_type, ''), 0))
              and b.aggregate_id = o.aggregate_id and coalesce(b.aggregate_type, '') = coalesce(o.aggregate_type, '')
              and b.id < o.id and b.last_error is not null
        ) as waiting_behind
) s
group by o.destination, o.status, o.priority;

comment on view event_outbox_lag is 'Events still owed, by destination (empty: not routed yet), status and priority.';
comment on column event_outbox_lag.due_count is 'Events whose available_at has come.';
comment on column event_outbox_lag.lag_seconds is 'For how long the oldest event is due. One that is tried again is due since its first failure.';
comment on column event_outbox_lag.delayed_count is 'Events that are not due yet, and have not failed.';
comment on column event_outbox_lag.retrying_count is 'Events that have failed at this destination and are tried again: see event_blocked_keys.';
comment on column event_outbox_lag.waiting_behind_count is 'Events that wait because an earlier event of their key is tried again.';

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
    nullif(b.available_at, 'infinity') as next_attempt_at,
    b.last_error as error,
    case when b.aggregate_id is null then 0 else (
        select pg_catalog.count(*)
        from (
            select from event_outbox w
            where w.status = 'scheduled' and w.destination <> '' and w.aggregate_id is not null and w.destination = b.destination
              and pg_catalog.hashtextextended(w.aggregate_id, pg_catalog.hashtextextended(coalesce(w.aggregate_type, ''), 0))
                = pg_catalog.hashtextextended(b.aggregate_id, pg_catalog.hashtextextended(coalesce(b.aggregate_type, ''), 0))
              and w.aggregate_id = b.aggregate_id and coalesce(w.aggregate_type, '') = coalesce(b.aggregate_type, '')
              and w.id > b.id
            limit 1000
        ) behind
    ) end as waiting_behind_count
from event_outbox b
where b.status = 'scheduled' and b.destination <> '' and b.last_error is not null;

comment on view event_blocked_keys is 'Events that have failed at their destination and are tried again; later events of the same key wait for them. Without payloads.';
comment on column event_blocked_keys.destination is 'Where the key is blocked. At other destinations it goes on.';
comment on column event_blocked_keys.aggregate_type is 'With aggregate_id the key that is blocked.';
comment on column event_blocked_keys.aggregate_id is 'With aggregate_type the key that is blocked; null: the event has no key, and blocks nobody.';
comment on column event_blocked_keys.outbox_id is 'event_outbox.id of the event that blocks.';
comment on column event_blocked_keys.event_id is 'event_outbox.event_id of the event that blocks.';
comment on column event_blocked_keys.event_type is 'event_outbox.event_type of the event that blocks.';
comment on column event_blocked_keys.attempts is 'Attempts charged to it so far.';
comment on column event_blocked_keys.blocked_since is 'When its first attempt failed.';
comment on column event_blocked_keys.next_attempt_at is 'When it is tried again; null: not before somebody sets its available_at.';
comment on column event_blocked_keys.error is 'Code and message of its last failure.';
comment on column event_blocked_keys.waiting_behind_count is 'Later events of its key that wait for it, counted up to 1000. One that was just inserted counts once a relay has seen it.';

-- Whoever may read the one view may read the other.
do $$
declare
    grantee text;
begin
    for grantee in
        select case a.grantee when 0::oid then 'public' else a.grantee::regrole::text end
        from pg_catalog.pg_class c, pg_catalog.aclexplode(c.relacl) a
        where c.oid = 'event_outbox_lag'::regclass::oid and a.privilege_type = 'SELECT'
    loop
        execute pg_catalog.format('grant select on event_blocked_keys to %s', grantee);
    end loop;
end
$$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 13';
