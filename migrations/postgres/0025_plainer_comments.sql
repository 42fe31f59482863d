-- Comments of tables, columns, views, sequences and functions in plainer words. It changes nothing else.
--
-- Functions whose definition `relay migrate` runs again after a renaming are left out: their comments come with it.

comment on column event_outbox.id is 'Ascends in the order of the inserts. The events of a key are published in this order; consumers see it as sequence.';
comment on column event_outbox.event_id is 'The identity of the event for its consumers.';
comment on column event_outbox.source is 'The module or service that emitted the event. Empty: the default of the relay''s configuration.';
comment on column event_outbox.aggregate_type is 'Together with aggregate_id the key of the event, for example order.';
comment on column event_outbox.aggregate_id is 'Together with aggregate_type the key of the event, for example 42. Null: the event has no key and no order.';
comment on column event_outbox.payload is 'Any JSON. Consumers get exactly payload::text.';
comment on column event_outbox.priority is 'From 0 to 9; 9 is published first. The events of a key keep their order only among equal priorities.';
comment on column event_outbox.available_at is 'The event is not published before this time. A delayed event does not block later events of its key.';
comment on column event_outbox.status is 'pending; or scheduled: the event is delayed, or waits for its next attempt or for its destination. An insert need not set it.';
comment on column event_outbox.destination is 'Empty: the event is not routed yet; a claim routes it. Otherwise the only destination that still has to get it.';
comment on column event_outbox.attempts is 'How many attempts count against the event so far. An outage of a destination does not count.';
comment on column event_outbox.last_error is 'Code and message of the last failed attempt.';
comment on column event_outbox.first_failed_at is 'When an attempt to deliver the event first failed.';
comment on column event_outbox.partition is 'Relays claim events by partition. Each priority has 64, chosen by a hash of the key. Scheduled rows are 640 higher, rows of another format 1280 higher.';
comment on column event_outbox.format is 'The format of the event; 0 is JSON. An event of another format waits for a relay that knows the format. -1: of format 0, and waiting behind such an event.';

comment on column event_processing_log.outbox_id is 'event_outbox.id, which consumers see as sequence. This column has an index.';
comment on column event_processing_log.destination is 'The name of the destination in the configuration. Empty: the event failed before it was routed.';
comment on column event_processing_log.status is 'published; failed: it is tried again; dead_lettered; duplicate: the destination had the event already; dropped: no route took the event, and RELAY_UNROUTED is drop.';
comment on column event_processing_log.message_id is 'The id that the destination gave to the event: of the stream entry, or EventBridge''s event id.';
comment on column event_processing_log.duration_ms is 'How long the publish call with this event took, in milliseconds.';
comment on column event_processing_log.worker is 'The relay that made the attempt: host name and process id.';
comment on column event_processing_log.processed_at is 'When the attempt was recorded, by the database''s clock.';

comment on column event_dead_letter.id is 'The number of the dead letter, which redrive_dead_letter takes.';
comment on column event_dead_letter.outbox_id is 'event_outbox.id. After a redrive the event has the same id.';
comment on column event_dead_letter.event_id is 'event_outbox.event_id. After a redrive the event has the same event_id.';
comment on column event_dead_letter.destination is 'The destination to which the event could not be delivered. Empty: no route took the event, or no destination can take it.';
comment on column event_dead_letter.attempts is 'How many attempts counted against the event.';
comment on column event_dead_letter.failed_at is 'When the last attempt failed and the event was dead-lettered.';
comment on column event_dead_letter.discarded_at is 'When an operator discarded it, which means that it is not to be redriven; null: never.';
comment on column event_dead_letter.discarded_by is 'The login that discarded it.';
comment on column event_dead_letter.discard_reason is 'Why it was discarded.';

comment on column event_history.destination is 'The destination that accepted the event.';
comment on column event_history.published_at is 'When the delivery was recorded, by the database''s clock.';

comment on column event_outbox_lag.due_count is 'Events that are due: their available_at has passed.';
comment on column event_outbox_lag.lag_seconds is 'For how many seconds the oldest event has been due. An event that is tried again counts as due since its first failure.';

comment on view event_blocked_keys is 'Events that failed at their destination and are tried again. Later events of the same key wait for them. It shows no payloads.';
comment on column event_blocked_keys.destination is 'The destination for which the key is blocked. To other destinations its events are published.';
comment on column event_blocked_keys.aggregate_type is 'Together with aggregate_id the blocked key.';
comment on column event_blocked_keys.aggregate_id is 'Together with aggregate_type the blocked key. Null: the event has no key and blocks no other event.';
comment on column event_blocked_keys.outbox_id is 'event_outbox.id of the event that blocks the key.';
comment on column event_blocked_keys.event_id is 'event_outbox.event_id of the event that blocks the key.';
comment on column event_blocked_keys.event_type is 'event_outbox.event_type of the event that blocks the key.';
comment on column event_blocked_keys.attempts is 'How many attempts count against the event so far.';
comment on column event_blocked_keys.blocked_since is 'When an attempt to deliver the event first failed.';
comment on column event_blocked_keys.next_attempt_at is 'When the event is tried again. Null: only after an operator sets its available_at.';
comment on column event_blocked_keys.error is 'Code and message of the last failed attempt.';
comment on column event_blocked_keys.waiting_behind_count is 'How many later events of the key wait for it, counted up to 1000. A new event counts after a relay has claimed it once.';

comment on table event_relay_run is 'Relays that began to publish in the last minute, and relays that crashed within a minute of it.';
comment on column event_relay_run.run_id is 'The identity of one run of a relay: each start has a new one.';
comment on column event_relay_run.begun_at is 'When the relay began to publish.';

comment on table event_crash_suspect is 'Events that were being published when a relay crashed, or that a relay is publishing carefully now.';
comment on column event_crash_suspect.event_id is 'event_outbox.event_id.';
comment on column event_crash_suspect.noted_at is 'When the relay noted that it was about to publish the event, by the database''s clock.';
comment on column event_crash_suspect.run_id is 'The run of the relay that published the event. A relay that was restarted has another one.';
comment on column event_crash_suspect.together is 'How many events were published together; negative once the relay has run on for a second. An event that was alone in three runs that crashed sooner is dead-lettered.';

comment on table event_relay is 'The running relays. The configuration of the one with the highest id routes new events.';
comment on column event_relay.id is 'Ascends in the order in which the relays started.';
comment on column event_relay.version is 'The version of the relay program.';
comment on column event_relay.schema_version is 'The newest schema version that the relay knows.';
comment on column event_relay.once is 'Whether this is a run of relay --once. Such a run never supersedes another relay.';
comment on column event_relay.since is 'When the relay started.';
comment on column event_relay.fingerprint is 'A hash of the destinations and routes, which is the same for equal configurations.';
comment on column event_relay.destinations is 'A description of each destination, without addresses and secrets.';
comment on column event_relay.routes is 'A description of the routes, without the values of headers.';
comment on column event_relay.pid is 'The server process of the session that holds the advisory lock 2000000 + id while the relay runs; null behind a pooler.';
comment on column event_relay.seen_at is 'When the relay last reported that it is running. It reports only while there are several configurations.';
comment on column event_relay.looked_at is 'When the relay last looked for events, according to that report.';
comment on column event_relay.hung is 'Whether the relay left events that were due unpublished, so that another relay took over the routing.';

comment on column event_operator_action.id is 'Ascends in the order in which the actions began.';
comment on column event_operator_action.command is 'The identity of the command. A command of several transactions updates its one row.';
comment on column event_operator_action.filter is 'The filter that chose the events: type, key, destination, error, since, until, id, state. Empty: all events.';
comment on column event_operator_action.details is 'Further arguments, such as the reason, or the destination to which events were moved.';
comment on column event_operator_action.done_by is 'The login of the operator: session_user.';
comment on column event_operator_action.begun_at is 'When the first transaction of the command ran.';
comment on column event_operator_action.done_at is 'When the last transaction of the command ran.';

comment on sequence event_outbox_epoch is 'Advanced by every settle that deletes rows. A claim reads it and sends it to destinations that refuse outdated claims.';
comment on sequence event_outbox_moves is 'Advanced whenever an event with an old id comes into a partition. Relays then forget below which ids they found no rows.';
comment on sequence event_relay_changes is 'Advanced after each change of event_relay. Each claim reads it, and reads event_relay if it has changed.';

comment on function relay_schema_needs is 'The lowest schema version that a relay must know to work with this schema.';
comment on function relay_add_days is 'Adds the missing day partitions of event_processing_log or event_history, from today on. Returns how many it added.';
comment on function relay_drop_days is 'Drops the day partitions that ended longer ago than the retention. Returns how many it dropped.';
comment on function relay_outbox_id is 'The identity of this outbox, which distinguishes it from others that publish to the same destination.';
comment on function relay_epoch_above is 'Advances event_outbox_epoch above the floor. Returns the new value.';
comment on function event_outbox_wake is 'Notifies sleeping relays on the channel event_outbox.';
comment on function event_outbox_moved is 'Advances event_outbox_moves if rows became pending or may be in another partition.';
comment on function event_outbox_truncated is 'Advances event_outbox_moves after a truncate, because ids may restart.';
comment on function event_outbox_rules is 'Refuses an event that breaks a rule, with the name of the rule in the error. Sets event_outbox.partition.';

create or replace function relay_schema_version() returns integer language sql immutable as 'select 25';
