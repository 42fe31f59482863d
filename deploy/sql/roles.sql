-- Creates three roles with the fewest rights that each needs: relay_app for applications, relay_worker for the relay,
-- relay_operator for people. Run it after every `relay migrate`, as the owner of the tables, with the search_path that the relay
-- uses:
--
--     psql -v ON_ERROR_STOP=1 -f deploy/sql/roles.sql "$DATABASE_URL"
--
-- The roles cannot log in. Grant them to roles that can:
--
--     create role shop login password '...';
--     grant relay_app to shop;
--
-- Creating roles needs CREATEROLE. If the owner does not have it, an administrator must run the three `create role` first.
-- The file reports which other roles may create objects in the schema: before PostgreSQL 15 every role may in `public`. The relay
-- and its functions run nothing that others create there, but the three roles could then use DDL too. `-v revoke_create=1`
-- revokes the right from all roles but the schema's owner. Check first whether applications need it for their migrations.

begin;

\if :{?revoke_create}
set local relay.revoke_create = 'on';
\endif

do $$
declare
    role text;
    schema regnamespace := (select relnamespace from pg_catalog.pg_class where oid = pg_catalog.to_regclass('event_outbox')::oid);
begin
    if schema is null then
        raise exception 'roles.sql: there is no table event_outbox on the search_path (%)', pg_catalog.current_setting('search_path')
            using hint = 'Run `relay migrate` first, or set the search_path that the relay uses.';
    end if;
    foreach role in array array['relay_app', 'relay_worker', 'relay_operator'] loop
        if pg_catalog.to_regrole(role) is null then
            execute pg_catalog.format('create role %I nologin', role);
        end if;
        -- If every role has the right already, as in an old `public`, only the schema's owner could grant it again.
        if not pg_catalog.has_schema_privilege(role, schema::oid, 'usage') then
            execute pg_catalog.format('grant usage on schema %s to %I', schema, role);
        end if;
    end loop;
    for role in
        select distinct case a.grantee when 0::oid then 'public' else a.grantee::regrole::text end
        from pg_catalog.pg_namespace n cross join lateral pg_catalog.aclexplode(coalesce(n.nspacl, pg_catalog.acldefault('n', n.nspowner))) a
        where n.oid = schema::oid and a.privilege_type = 'CREATE' and a.grantee <> n.nspowner
    loop
        if coalesce(pg_catalog.current_setting('relay.revoke_create', true), '') = 'on' then
            execute pg_catalog.format('revoke create on schema %s from %s', schema, role);
            raise notice 'roles.sql: % may no longer create objects in schema %', role, schema;
        else
            raise notice 'roles.sql: % may create objects in schema %; -v revoke_create=1 takes that right away', role, schema;
        end if;
    end loop;
end
$$;

-- Revoke what an earlier version of this file granted and this one does not. (For a table this includes its columns.)
revoke all on event_outbox, event_processing_log, event_dead_letter, event_history, event_outbox_lag, event_blocked_keys,
    event_dead_letter_summary, event_relay_run, event_crash_suspect, event_relay, event_operator_action, event_tally,
    event_pause, event_pause_changes
    from relay_app, relay_worker, relay_operator;
revoke all on sequence event_outbox_epoch, event_outbox_moves, event_outbox_id_seq, event_relay_changes
    from relay_app, relay_worker, relay_operator;
revoke all on function relay_add_days, relay_drop_days, relay_outbox_id, relay_epoch_above, redrive_dead_letter,
    redrive_dead_letters, discard_dead_letters, purge_dead_letters, move_owed, give_up_owed, pause_destination, resume_destination,
    count_waiting, retry_waiting, give_up_waiting, move_waiting
    from relay_app, relay_worker, relay_operator;

-- Applications insert events and can read only these two columns, which reveal nothing: an ORM that inserts with RETURNING needs
-- SELECT on what it returns, and otherwise it would be granted SELECT on all columns. Applications may insert the columns that
-- emit_event fills. The columns of the delivery are the relay's.
grant select (id, event_id) on event_outbox to relay_app;
grant insert (event_id, event_type, source, aggregate_type, aggregate_id, payload, headers, correlation_id, causation_id,
              schema_version, priority, available_at, status)
    on event_outbox to relay_app;
do $$
declare
    emit_event regprocedure;
begin
    for emit_event in
        select p.oid from pg_catalog.pg_proc p join pg_catalog.pg_class c on c.relnamespace = p.pronamespace
        where p.proname = 'emit_event'::name and c.oid = pg_catalog.to_regclass('event_outbox')::oid
    loop
        execute pg_catalog.format('revoke all on function %s from relay_app, relay_worker, relay_operator', emit_event);
        execute pg_catalog.format('grant execute on function %s to relay_app, relay_operator', emit_event);
    end loop;
end
$$;

-- The relay claims and settles events, and adds and drops days through functions that run with the owner's rights.
grant select, insert, update, delete on event_outbox to relay_worker;
grant insert on event_processing_log, event_dead_letter, event_history to relay_worker;
grant select, insert, update, delete on event_relay_run, event_crash_suspect, event_relay, event_tally to relay_worker;
grant select on event_pause, event_pause_changes to relay_worker;
grant select, update on sequence event_outbox_epoch, event_relay_changes to relay_worker;
grant select on sequence event_outbox_moves, event_outbox_id_seq to relay_worker;
grant execute on function relay_add_days, relay_drop_days, relay_outbox_id, relay_epoch_above, relay_schema_version,
    relay_schema_needs
    to relay_worker;

-- Operators read everything. They change dead letters and events that wait through functions, which record who did it.
grant select on event_outbox, event_processing_log, event_dead_letter, event_history, event_outbox_lag, event_blocked_keys,
    event_dead_letter_summary, event_relay_run, event_crash_suspect, event_relay, event_operator_action, event_tally,
    event_pause, event_pause_changes
    to relay_operator;
grant execute on function redrive_dead_letter, redrive_dead_letters, discard_dead_letters, purge_dead_letters, move_owed,
    give_up_owed, pause_destination, resume_destination, count_waiting, retry_waiting, give_up_waiting, move_waiting,
    relay_schema_version, relay_schema_needs
    to relay_operator;

commit;
