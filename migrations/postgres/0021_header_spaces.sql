-- What counts as space around a header's name: all of Unicode's, whatever the locale of the database. In that of C the rule let
-- names pass with U+0085, U+00A0, U+2003 or U+3000, and the relay, which trims them, gave their events up.

create or replace function event_outbox_rules() returns trigger
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
                -- Some who read them trim names, and ignore case. What [:space:] is depends on the database's locale; so the list
                -- of Unicode's spaces and control characters stands here, by their codes in UTF-8.
                when pg_catalog.jsonb_path_exists(new.headers, e'strict $.keyvalue().key ? (@ like_regex
                    "^[[:space:][:cntrl:]\\\\u0001-\\\\u0020\\\\u007f-\\\\u00a0\\\\u1680\\\\u2000-\\\\u200a\\\\u2028\\\\u2029\\\\u202f\\\\u205f\\\\u3000]*(specversion|id|source|type|subject|time|datacontenttype|dataschema|sequence|partitionkey|correlationid|causationid|schemaversion|data|data_base64|replayed)[[:space:][:cntrl:]\\\\u0001-\\\\u0020\\\\u007f-\\\\u00a0\\\\u1680\\\\u2000-\\\\u200a\\\\u2028\\\\u2029\\\\u202f\\\\u205f\\\\u3000]*$"
                    flag "i")')
                    then 'headers_take_no_reserved_name'
                when pg_catalog.jsonb_path_exists(new.headers, e'strict $.keyvalue().key ? (@ like_regex "^[[:space:][:cntrl:]\\\\u0001-\\\\u0020\\\\u007f-\\\\u00a0\\\\u1680\\\\u2000-\\\\u200a\\\\u2028\\\\u2029\\\\u202f\\\\u205f\\\\u3000]*$")')
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
    -- What no relay of this schema can read lies 1280 above, where none of them looks.
    new.partition := (
        case new.status when 'scheduled' then 640 else 0 end
        + case new.format when 0 then 0 else 1280 end
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

create or replace function relay_schema_version() returns integer language sql immutable as 'select 21';
