-- The same rules and partitions from a trigger: a table that can be replicated, and texts that have bounds.
--
-- No generated column may be part of a replica identity that is published, and the primary key is one: PostgreSQL 18 refused
-- every delete and update of a published event_outbox, and before 18 a subscription stopped at the first delete. So
-- `partition` is a plain column now, which this trigger fills whatever the statement says.
--
-- It reads each rule once in a session, where a CHECK is read anew for every statement. A row that is updated is asked only for
-- what has changed: one that is older than a rule must still move. It runs last, because what a trigger after it changed would
-- lie in the wrong partition; and also for rows that come by a subscription, which were judged where they come from.

create function event_outbox_rules() returns trigger
language plpgsql as $$
declare
    broken text := case
        when pg_catalog.char_length(new.event_type) not between 1 and 128 and new.event_type is distinct from old.event_type
            then 'event_type_has_1_to_128_characters'
        when pg_catalog.octet_length(new.source) > 16384 and new.source is distinct from old.source
            then 'source_has_at_most_16384_bytes'
        when pg_catalog.octet_length(new.aggregate_type) > 16384 and new.aggregate_type is distinct from old.aggregate_type
            then 'aggregate_type_has_at_most_16384_bytes'
        when pg_catalog.octet_length(new.aggregate_id) > 16384 and new.aggregate_id is distinct from old.aggregate_id
            then 'aggregate_id_has_at_most_16384_bytes'
        when pg_catalog.octet_length(new.correlation_id) > 16384 and new.correlation_id is distinct from old.correlation_id
            then 'correlation_id_has_at_most_16384_bytes'
        when pg_catalog.octet_length(new.causation_id) > 16384 and new.causation_id is distinct from old.causation_id
            then 'causation_id_has_at_most_16384_bytes'
        when new.headers <> '{}' and new.headers is distinct from old.headers then
            case
                -- Strict: the lax mode looks into arrays, and takes one of strings for a string.
                when pg_catalog.jsonb_typeof(new.headers) <> 'object'
                    or pg_catalog.jsonb_path_exists(new.headers, 'strict $.* ? (@.type() != "string")')
                    then 'headers_are_a_flat_string_map'
                -- Some who read them trim names, and ignore case.
                when pg_catalog.jsonb_path_exists(new.headers, 'strict $.keyvalue().key ? (@ like_regex
                    "^[[:space:][:cntrl:]]*(specversion|id|source|type|subject|time|datacontenttype|dataschema|sequence|partitionkey|correlationid|causationid|schemaversion|data|data_base64|replayed)[[:space:][:cntrl:]]*$"
                    flag "i")')
                    then 'headers_take_no_reserved_name'
                when pg_catalog.jsonb_path_exists(new.headers, 'strict $.keyvalue().key ? (@ like_regex "^[[:space:][:cntrl:]]*$")')
                    then 'header_names_are_not_empty'
                when pg_catalog.octet_length(new.headers::pg_catalog.text) > 262144 then 'headers_have_at_most_262144_bytes'
            end
        when new.schema_version < 1 and new.schema_version is distinct from old.schema_version then 'schema_version_starts_at_1'
        when new.priority not between 0 and 9 and new.priority is distinct from old.priority then 'priority_is_0_to_9'
        when new.status not in ('pending', 'scheduled') and new.status is distinct from old.status
            then 'status_is_pending_or_scheduled'
        when new.attempts < 0 and new.attempts is distinct from old.attempts then 'attempts_start_at_0'
    end;
begin
    -- A number of 8 characters, 1e131071, prints as 131,072 digits. No relay could read a payload whose text PostgreSQL cannot
    -- make: that fails here.
    if broken is null and pg_catalog.pg_column_size(new.payload) >= 100000 and new.payload is distinct from old.payload
        and pg_catalog.octet_length(new.payload::pg_catalog.text) = 0
    then
        broken := 'payload_can_be_printed';
    end if;
    if broken is not null and pg_catalog.current_setting('session_replication_role') <> 'replica' then
        raise exception 'new row for relation "event_outbox" violates check constraint "%"', broken
            using errcode = 'check_violation', table = 'event_outbox', constraint = broken;
    end if;
    -- The scheduled rows lie 640 above, so that the pending ones, which every claim reads, stay dense at the left.
    new.partition := (
        case new.status when 'scheduled' then 640 else 0 end
        + (9 - new.priority) * 64
        + (case
            when new.aggregate_id is null then pg_catalog.uuid_hash_extended(new.event_id, 0)
            else pg_catalog.hashtextextended(new.aggregate_id,
                                             pg_catalog.hashtextextended(coalesce(new.aggregate_type, ''), 0))
           end & 63::pg_catalog.int8)
    )::pg_catalog.int2;
    return new;
end
$$;

comment on function event_outbox_rules is 'Refuses an event that breaks a rule, by the name of the rule; fills event_outbox.partition.';

-- One statement: nobody sees the table without its rules, and its lock is waited for as a whole. Who inserts queues behind a
-- lock that waits, so it waits for a second only; `relay migrate` tries again.
do $$
begin
    perform pg_catalog.set_config('lock_timeout', '1s', true);
    alter table event_outbox
        alter column partition drop expression,
        drop constraint event_is_valid;
    create trigger zzz_event_outbox_rules
        before insert or update on event_outbox
        for each row
        execute function event_outbox_rules();
    alter table event_outbox enable always trigger zzz_event_outbox_rules;
    drop function event_is_valid;
end
$$;

-- PostgreSQL 13 and 14 still count the column as one that is made by this function, and would drop it together with it.
comment on function event_partition is 'Nothing calls it; PostgreSQL 13 would drop event_outbox.partition with it.';

create or replace function relay_schema_version() returns integer language sql immutable as 'select 16';
