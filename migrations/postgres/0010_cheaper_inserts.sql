-- The same rules for headers, at a third of what they cost an insert without any.
--
-- PostgreSQL reads each CHECK of a table from its text anew for each statement: the list of reserved names alone took a fifth
-- of the time of an insert. A call is short to read, and is made only where there are headers. In PL/pgSQL, because of a
-- function in SQL the body would be put in the place of the call, and be read each time again.

create function event_headers_are_flat(headers jsonb) returns boolean
language plpgsql immutable parallel safe as $$
begin
    -- Strict: the lax mode looks into arrays, and takes one of strings for a string.
    return jsonb_typeof(headers) = 'object' and not jsonb_path_exists(headers, 'strict $.* ? (@.type() != "string")');
end
$$;

comment on function event_headers_are_flat is 'Whether headers are a flat map of strings.';

create function event_headers_are_free(headers jsonb) returns boolean
language plpgsql immutable parallel safe as $$
begin
    return not headers ?| array['specversion', 'id', 'source', 'type', 'subject', 'time', 'datacontenttype', 'dataschema',
        'sequence', 'partitionkey', 'correlationid', 'causationid', 'schemaversion', 'data', 'data_base64'];
end
$$;

comment on function event_headers_are_free is 'Whether headers take no name that a CloudEvent has for itself.';

alter table event_outbox
    drop constraint if exists headers_are_a_flat_string_map,
    add constraint headers_are_a_flat_string_map check (headers = '{}' or event_headers_are_flat(headers)),
    drop constraint if exists headers_take_no_reserved_name,
    add constraint headers_take_no_reserved_name check (headers = '{}' or event_headers_are_free(headers));

create or replace function relay_schema_version() returns integer language sql immutable as 'select 10';
