"""Fills the outbox for a section, and checks the relay's tables afterwards."""
from common import expect, psql


def clear(database):
    psql(database, "truncate event_outbox, event_processing_log, event_dead_letter")


def fill(database, events, payload=200, keys=10_000, checkpoint=True):
    """Inserts `events` of about `payload` bytes that do not compress. The checkpoint makes the WAL like that of a server at
    work: after it, the first change of each page logs the whole page."""
    psql(database, f"""
        with pad as materialized (select string_agg(md5(j::text), '') as hex from generate_series(1, {payload // 32 + 5}) j)
        insert into event_outbox (event_type, aggregate_type, aggregate_id, payload)
        select 'order.created', 'order', (i % {keys})::text,
               jsonb_build_object('n', i, 'pad', substr(hex, 1 + i % 97, {max(payload - 25, 0)}))
        from generate_series(1, {events}) i cross join pad""")
    psql(database, "vacuum analyze event_outbox")
    if checkpoint:
        psql(database, "checkpoint")


def check_books(what, database, events):
    """The outbox is empty, each event has exactly one row in the log, and there is no dead letter."""
    left, rows, published, dead = map(int, psql(database, """
        select (select count(*) from event_outbox), count(*), count(distinct outbox_id) filter (where status = 'published'),
               (select count(*) from event_dead_letter)
        from event_processing_log""").split("|"))
    expect(what, left=(left, 0), logged=(rows, events), published=(published, events), dead=(dead, 0))


def setting(database, name, value):
    psql(database, f"alter system set {name} = '{value}'" if value is not None else f"alter system reset {name}")
    psql(database, "select pg_reload_conf()")
