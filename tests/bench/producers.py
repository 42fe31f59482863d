"""What the outbox, its trigger and a relay cost producers that insert one event a transaction."""
import contextlib
import time

from backlog import check_books, clear
from common import Table, expect, psql, redis_cli, servers
from pgbench import PAYLOAD, Producers
from processes import Relay, cpu_seconds
from resp import Client
from sinks import Stream

CLIENTS = (32, 4)
NOTIFY = """
create function plain_notify() returns trigger language plpgsql as
$$ begin perform pg_notify('event_outbox', ''); return null; end $$"""
NOTIFY_TRIGGER = "create trigger plain_notify after insert on event_outbox for each statement execute function plain_notify()"

BARE = "no trigger, no relay"
POLLED = "no trigger, relay polling every 10 ms"
POLLING = {"EVENT_OUTBOX_POLLING_INTERVAL": "10"}
# The trigger, and the relay's settings if a relay runs.
CASES = {
    BARE: (None, None),
    "wake-up trigger, no relay": ("ours", None),
    "plain NOTIFY, no relay": ("notify", None),
    POLLED: (None, POLLING),
    "wake-up trigger, relay woken by it": ("ours", {}),
    "plain NOTIFY, relay woken by it": ("notify", {}),
}

# Tables, and the statements that make them from the outbox.
COPIES = {
    "outbox, its trigger dropped": ("event_outbox", []),
    "its columns and primary key only": ("copied", [
        "create table copied (like event_outbox including defaults including identity including generated)",
        # In the outbox a trigger sets it.
        "alter table copied alter column partition set default 0",
        "alter table copied add primary key (partition, id, destination)"]),
    "no partition either, primary key (id)": ("plain", [
        "create table plain (like event_outbox including defaults including identity)",
        "alter table plain drop column partition, add primary key (id)"]),
}
OUTBOX = "outbox as migrated"


class Triggers:
    def __init__(self, database):
        self.database = database
        ours = psql(database, "select pg_get_triggerdef(oid) from pg_trigger where tgname = 'event_outbox_wake'")
        self.make = {"ours": ours, "notify": NOTIFY_TRIGGER}
        psql(database, NOTIFY)

    def use(self, name):
        made = "; ".join(f"drop trigger if exists {trigger} on event_outbox" for trigger in ("event_outbox_wake", "plain_notify"))
        psql(self.database, f"set client_min_messages = warning; {made}; {self.make.get(name, '')}")


@contextlib.contextmanager
def relay_at_work(database, redis, settings):
    """A relay that has published a first event."""
    with Relay(database, {"REDIS_URL": redis.url, **settings}) as relay, Client(redis) as client:
        psql(database, "insert into event_outbox (event_type, aggregate_id) values ('order.created', 'first')")
        if client.ask("xread", "block", 20_000, "streams", "events", "0") is None:
            raise SystemExit("the relay did not begin")
        yield relay


def measure(database, redis, label, clients, seconds, settings):
    clear(database)
    redis_cli(redis, "flushall")
    psql(database, "checkpoint")
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(relay_at_work(database, redis, settings)) if settings is not None else None
        before = cpu_seconds(database.pid)
        done, rate = Producers(database, clients, "-T", seconds).wait()
        spent = cpu_seconds(database.pid) - before
        found = {"rate": rate, "postgres": spent / done * 1e6}
        if relay:
            found["memory"] = relay.peak
            deadline = time.monotonic() + 60
            while psql(database, "select exists (select from event_outbox)") == "t" and time.monotonic() < deadline:
                time.sleep(0.1)
            check_books(label, database, done + 1)
            Stream(redis).check(label, done + 1)
        else:
            expect(label, inserted=(int(psql(database, "select count(*) from event_outbox")), done))
    return found


def commits(options, database, redis, triggers):
    columns = {
        "rate": ("commits/s", ",.0f"), "of_bare": ("of bare", ".2f"), "of_polled": ("of polling", ".2f"),
        "postgres": ("postgres us", ".0f"), "memory": ("relay MiB", ".0f"),
    }
    table = Table("producers", columns, spread=("rate",), notes=[
        "pgbench, one event a transaction, the cases in turn. of bare: of no trigger, no relay; of polling: of the relay that polls.",
        "Ratios of medians. postgres us: CPU time a commit, the relay's own statements included.",
    ])
    seconds = 1 if options.short else 10
    for number in options.rounds():
        for clients in CLIENTS:
            for case, (trigger, settings) in CASES.items():
                label = f"{clients} clients, {case}"
                if not options.wants(label):
                    continue
                triggers.use(trigger)
                found = measure(database, redis, label, clients, 2 if number == 0 else seconds, settings)
                if number > 0:
                    table.add(label, **found)
    for clients in CLIENTS:
        for case, (_, settings) in CASES.items():
            label = f"{clients} clients, {case}"
            for column, other in (("of_bare", BARE), ("of_polled", POLLED)):
                base = f"{clients} clients, {other}"
                if label in table.rows and base in table.rows and label != base and (column == "of_bare" or settings is not None):
                    table.rows[label][column] = [table.median(label, "rate") / table.median(base, "rate")]
    return table


def inserts(options, database, triggers):
    table = Table("insert", {"each": ("us", ".1f"), "ratio": ("of the least", ".2f"), "cpu": ("CPU us", ".1f")}, spread=("each",), notes=[
        "One INSERT of one event after the other, in one transaction of a loop in the server: no round trip, no commit.",
    ])
    events = options.size(100_000, 2_000)
    clear(database)
    for number in options.rounds():
        for label, (name, make) in {OUTBOX: ("event_outbox", []), **COPIES}.items():
            if not options.wants(label):
                continue
            triggers.use("ours" if label == OUTBOX else None)
            for statement in make:
                psql(database, statement)
            psql(database, "checkpoint")
            before, begun = cpu_seconds(database.pid), time.monotonic()
            psql(database, f"""
                do $$ begin for i in 1..{events} loop
                    insert into {name} (event_type, aggregate_type, aggregate_id, payload)
                    values ('order.created', 'order', (i % 10000)::text, '{PAYLOAD}');
                end loop; end $$""")
            each = (time.monotonic() - begun) / events * 1e6
            cpu = (cpu_seconds(database.pid) - before) / events * 1e6
            expect(label, inserted=(int(psql(database, f"select count(*) from {name}")), events))
            psql(database, f"drop table {name}" if make else f"truncate {name}")
            if number > 0:
                table.add(label, each=each, cpu=cpu)
    least = list(COPIES)[-1]
    for label in table.rows if least in table.rows else []:
        table.rows[label]["ratio"] = [table.median(label, "each") / table.median(least, "each")]
    return table


def run(options):
    with servers() as (database, redis):
        triggers = Triggers(database)
        return [commits(options, database, redis, triggers), inserts(options, database, triggers)]
