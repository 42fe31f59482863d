"""The outbox as a section wants to find it, and the relay's books as they must be afterwards."""
from common import expect, psql


def clear(database):
    psql(database, "truncate event_outbox, event_processing_log, event_dead_letter")


def fill(database, events, payload=200, keys=10_000, checkpoint=True):
    """`events` of about `payload` bytes that do not compress, as a relay finds them after a while: after a checkpoint the
    first change of each page is logged with the whole page."""
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
    """Nothing is left, each event has its one row of the log, and none is dead."""
    left, rows, published, dead = map(int, psql(database, """
        select (select count(*) from event_outbox), count(*), count(distinct outbox_id) filter (where status = 'published'),
               (select count(*) from event_dead_letter)
        from event_processing_log""").split("|"))
    expect(what, left=(left, 0), logged=(rows, events), published=(published, events), dead=(dead, 0))


def setting(database, name, value):
    psql(database, f"alter system set {name} = '{value}'" if value is not None else f"alter system reset {name}")
    psql(database, "select pg_reload_conf()")
