-- From which relay on this schema can be used, so that a file may be migrated before its relay is replaced, and a relay
-- may go back to the version before.
--
-- A relay knows the migrations up to its own. It works with any later schema whose relay_schema_needs is not above that.
-- A migration that an older relay cannot work with must replace this view, with its own number; others leave it alone.

-- The migration of relay that a relay must know to work with this schema.
create view relay_schema_needs as select 8 as version;

drop view relay_schema_version;
create view relay_schema_version as select 8 as version;
