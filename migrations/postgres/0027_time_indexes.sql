-- Days of the processing log and of the history have an index on time, for `relay tail` and `relay replay`.
--
-- By blocks, because rows are written in the order of time: a b-tree would double the cost of a row. Days that have rows stay as
-- they are, because building an index would hold up those who write to them. So the index of the whole table is not valid until
-- those days are dropped, which is of no matter: a day that is attached gets it.

do $$
declare
    parent text;
    moment text;
    day pg_catalog.regclass;
    name text;
    has_rows boolean;
begin
    perform pg_catalog.set_config('lock_timeout', '1s', true);
    foreach parent in array array['event_processing_log', 'event_history'] loop
        moment := case parent when 'event_history' then 'published_at' else 'processed_at' end;
        execute pg_catalog.format('create index %1$s_%2$s_idx on only %1$s using brin (%2$s) with (pages_per_range = 16, autosummarize = on)',
                                  parent, moment);
        for day, name in
            select c.oid::pg_catalog.regclass, c.relname
            from pg_catalog.pg_inherits i join pg_catalog.pg_class c on c.oid = i.inhrelid
            where i.inhparent = parent::pg_catalog.regclass::pg_catalog.oid and c.relkind = 'r'
              and c.relname::text ~ ('^' || parent || '_\d{8}$') and pg_catalog.pg_has_role(c.relowner, 'usage')
            order by c.relname
        loop
            execute pg_catalog.format('select exists (select from %s)', day) into has_rows;
            if not has_rows then
                execute pg_catalog.format('create index %2$I on %1$s using brin (%3$s) with (pages_per_range = 16, autosummarize = on)',
                                          day, name || '_' || moment || '_idx', moment);
                execute pg_catalog.format('alter index %s_%s_idx attach partition %s', parent, moment, (
                    select i.indexrelid::pg_catalog.regclass
                    from pg_catalog.pg_index i join pg_catalog.pg_class c on c.oid = i.indexrelid
                    where i.indrelid = day::pg_catalog.oid and c.relname::text = name || '_' || moment || '_idx'
                ));
            end if;
        end loop;
    end loop;
end
$$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 27';
