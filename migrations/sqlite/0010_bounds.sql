-- Bounds for texts, and header names as they are read: trimmed, and without regard to case.
--
-- A row is asked when it is inserted, and again only where one of these columns is changed: one that is older than a rule must
-- still move. Bytes are those of the database's encoding. (Triggers, because SQLite adds no CHECK to a table; not by
-- octet_length, which the application's SQLite may be too old for.)

create trigger event_outbox_bounds before insert on event_outbox
when length(cast(new.source as blob)) > 16384 or length(cast(new.aggregate_type as blob)) > 16384
  or length(cast(new.aggregate_id as blob)) > 16384 or length(cast(new.correlation_id as blob)) > 16384
  or length(cast(new.causation_id as blob)) > 16384 or length(cast(new.headers as blob)) > 262144
begin
    select raise(abort, 'CHECK constraint failed: source_has_at_most_16384_bytes')
    where length(cast(new.source as blob)) > 16384;
    select raise(abort, 'CHECK constraint failed: aggregate_type_has_at_most_16384_bytes')
    where length(cast(new.aggregate_type as blob)) > 16384;
    select raise(abort, 'CHECK constraint failed: aggregate_id_has_at_most_16384_bytes')
    where length(cast(new.aggregate_id as blob)) > 16384;
    select raise(abort, 'CHECK constraint failed: correlation_id_has_at_most_16384_bytes')
    where length(cast(new.correlation_id as blob)) > 16384;
    select raise(abort, 'CHECK constraint failed: causation_id_has_at_most_16384_bytes')
    where length(cast(new.causation_id as blob)) > 16384;
    select raise(abort, 'CHECK constraint failed: headers_have_at_most_262144_bytes')
    where length(cast(new.headers as blob)) > 262144;
end;

create trigger event_outbox_source_bound before update of source on event_outbox
when length(cast(new.source as blob)) > 16384 and new.source is not old.source
begin
    select raise(abort, 'CHECK constraint failed: source_has_at_most_16384_bytes');
end;

create trigger event_outbox_aggregate_type_bound before update of aggregate_type on event_outbox
when length(cast(new.aggregate_type as blob)) > 16384 and new.aggregate_type is not old.aggregate_type
begin
    select raise(abort, 'CHECK constraint failed: aggregate_type_has_at_most_16384_bytes');
end;

create trigger event_outbox_aggregate_id_bound before update of aggregate_id on event_outbox
when length(cast(new.aggregate_id as blob)) > 16384 and new.aggregate_id is not old.aggregate_id
begin
    select raise(abort, 'CHECK constraint failed: aggregate_id_has_at_most_16384_bytes');
end;

create trigger event_outbox_correlation_id_bound before update of correlation_id on event_outbox
when length(cast(new.correlation_id as blob)) > 16384 and new.correlation_id is not old.correlation_id
begin
    select raise(abort, 'CHECK constraint failed: correlation_id_has_at_most_16384_bytes');
end;

create trigger event_outbox_causation_id_bound before update of causation_id on event_outbox
when length(cast(new.causation_id as blob)) > 16384 and new.causation_id is not old.causation_id
begin
    select raise(abort, 'CHECK constraint failed: causation_id_has_at_most_16384_bytes');
end;

drop trigger event_outbox_headers;

-- What counts as space around a name: all of Unicode's, and control characters.
create view event_header_space as select char(
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32,
    127, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141, 142, 143, 144, 145, 146, 147, 148, 149,
    150, 151, 152, 153, 154, 155, 156, 157, 158, 159, 160, 5760, 8192, 8193, 8194, 8195, 8196, 8197, 8198, 8199, 8200,
    8201, 8202, 8232, 8233, 8239, 8287, 12288
) as characters;

-- What a CHECK cannot say, for it may not look into JSON.
create trigger event_outbox_headers before insert on event_outbox when new.headers <> '{}'
begin
    select raise(abort, 'CHECK constraint failed: headers_are_a_flat_string_map')
    where exists (select 1 from json_each(new.headers) where type <> 'text');
    select raise(abort, 'CHECK constraint failed: headers_take_no_reserved_name')
    where exists (
        select 1 from json_each(new.headers)
        where lower(trim(key, (select characters from event_header_space))) in (
            'specversion', 'id', 'source', 'type', 'subject', 'time', 'datacontenttype', 'dataschema', 'sequence',
            'partitionkey', 'correlationid', 'causationid', 'schemaversion', 'data', 'data_base64', 'replayed'
        )
    );
    select raise(abort, 'CHECK constraint failed: header_names_are_not_empty')
    where exists (
        select 1 from json_each(new.headers) where trim(key, (select characters from event_header_space)) = ''
    );
end;

create trigger event_outbox_headers_changed before update of headers on event_outbox
when new.headers <> '{}' and new.headers is not old.headers
begin
    select raise(abort, 'CHECK constraint failed: headers_have_at_most_262144_bytes')
    where length(cast(new.headers as blob)) > 262144;
    select raise(abort, 'CHECK constraint failed: headers_are_a_flat_string_map')
    where exists (select 1 from json_each(new.headers) where type <> 'text');
    select raise(abort, 'CHECK constraint failed: headers_take_no_reserved_name')
    where exists (
        select 1 from json_each(new.headers)
        where lower(trim(key, (select characters from event_header_space))) in (
            'specversion', 'id', 'source', 'type', 'subject', 'time', 'datacontenttype', 'dataschema', 'sequence',
            'partitionkey', 'correlationid', 'causationid', 'schemaversion', 'data', 'data_base64', 'replayed'
        )
    );
    select raise(abort, 'CHECK constraint failed: header_names_are_not_empty')
    where exists (
        select 1 from json_each(new.headers) where trim(key, (select characters from event_header_space)) = ''
    );
end;

drop view relay_schema_version;
create view relay_schema_version as select 10 as version;
