-- From which relay on this schema can be used, so that a database may be migrated before its relays are replaced, and
-- relays may go back to the version before.
--
-- A relay knows the migrations up to its own. It works with any later schema whose relay_schema_needs() is not above that.
-- A migration that an older relay cannot work with must replace this function, with its own number; others leave it alone.

create function relay_schema_needs() returns integer language sql immutable as 'select 11';

comment on function relay_schema_needs() is 'The migration of relay that a relay must know to work with this schema.';

-- Whoever may ask for the version may ask for this.
do $$
declare
    grantee text;
begin
    for grantee in
        select case a.grantee when 0::oid then 'public' else a.grantee::regrole::text end
        from pg_catalog.pg_proc p, pg_catalog.aclexplode(p.proacl) a
        where p.oid = 'relay_schema_version()'::regprocedure::oid
    loop
        execute pg_catalog.format('grant execute on function relay_schema_needs() to %s', grantee);
    end loop;
end
$$;

create or replace function relay_schema_version() returns integer language sql immutable as 'select 11';
