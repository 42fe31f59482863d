"""The size of the relay's program, the time of its start, the CPU, WAL and transactions of an event, and the cost of idling."""
import contextlib
import json
import os
import tempfile
import time
import types

from backlog import check_books, clear, fill, setting
from common import RELAY, Table, psql, servers
from drain import drain
from processes import Relay, cpu_seconds, mebibytes
from resp import Client
from sinks import Stream

IDLE_RELAYS = 3
# Changes of PostgreSQL's settings.
KINDS = {
    "defaults": {},
    "defaults, no checkpoint since the inserts": {},
    "full_page_writes off": {"full_page_writes": "off"},
    "full_page_writes and autovacuum off": {"full_page_writes": "off", "autovacuum": "off"},
}


def elsewhere(database):
    """Another database of the server, so that the benchmark's own queries are not counted."""
    return types.SimpleNamespace(url=database.url.rpartition("/")[0] + "/template1")


def wal_position(database):
    return int(psql(elsewhere(database), "select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"))


def transactions(database):
    time.sleep(1.5)  # sessions report once a second
    return int(psql(elsewhere(database), "select xact_commit from pg_stat_database where datname = 'postgres'"))


def start(database, redis):
    """Milliseconds from the start of the process until its one pending event is in the stream, and MiB a second later."""
    stream = Stream(redis)
    clear(database)
    stream.clear()
    fill(database, 1)
    with Client(redis) as client:
        client.send("xread", "block", 20_000, "streams", "events", "0")
        begun = time.time()
        with Relay(database, stream.environment) as relay:
            if client.answer() is None:
                raise SystemExit("the relay did not begin")
            milliseconds = (client.answered_at - begun) * 1000
            time.sleep(1)
            memory = mebibytes(relay.pid, "VmRSS")
    check_books("start", database, 1)
    stream.check("start", 1)
    return milliseconds, memory


def costs(database, redis, kind, events):
    stream = Stream(redis)
    for name, value in KINDS[kind].items():
        setting(database, name, value)
    clear(database)
    stream.clear()
    commits = transactions(database)
    drain(database, redis, stream)
    of_nothing = transactions(database) - commits
    psql(database, "checkpoint")
    fill(database, events, checkpoint="no checkpoint" not in kind)
    position, commits = wal_position(database), transactions(database)
    with tempfile.TemporaryFile("w+") as log:
        settings = {"RELAY_LOG": "debug", "RELAY_LOG_FORMAT": "json"}
        spent = drain(database, redis, stream, settings, stderr=log)
        log.seek(0)
        batches = [entry["event_count"] for entry in map(json.loads, log) if entry["message"] == "batch settled"]
    written, committed = wal_position(database) - position, transactions(database) - commits - of_nothing
    check_books(f"costs, {kind}", database, events)
    stream.check(f"costs, {kind}", events)
    for name in KINDS[kind]:
        setting(database, name, None)
    return {
        **{name: spent[name] / events * 1e6 for name in ("relay", "postgres", "redis")}, "wal": written / events,
        "batch": events / len(batches), "transactions": committed / len(batches), "memory": spent["memory"],
    }


def preload_statistics(database):
    """Restarts the server so that it counts statements. Returns whether it does."""
    if psql(database, "select count(*) from pg_available_extensions where name = 'pg_stat_statements'") == "0":
        return False
    psql(database, "alter system set shared_preload_libraries = 'pg_stat_statements'")
    database.process.stdin.write("restart\n")
    database.process.stdin.flush()
    database.pid = json.loads(database.process.stdout.readline())["pid"]
    psql(database, "create extension pg_stat_statements")
    return True


def idle(database, redis, relays, seconds, counted):
    """Returns the counts of a while in which nobody inserts."""
    def look():
        return {
            "xids": int(psql(elsewhere(database), "select txid_snapshot_xmax(txid_current_snapshot())")),
            "wal": wal_position(database), "transactions": transactions(database),
            "relay": sum(cpu_seconds(relay.pid) for relay in running),
            "postgres": cpu_seconds(database.pid), "redis": cpu_seconds(redis.pid), "at": time.monotonic(),
        }

    stream = Stream(redis)
    clear(database)
    stream.clear()
    psql(database, "vacuum analyze")
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(Relay(database, stream.environment)) for _ in range(relays)]
        time.sleep(5)
        psql(database, "checkpoint")
        time.sleep(1)
        if counted:
            psql(database, "select pg_stat_statements_reset()")
            reset = time.monotonic()
        before = look()
        time.sleep(seconds)
        after = look()
        found = {name: after[name] - before[name] for name in before}
        elapsed = found.pop("at")
        if counted:
            mine = "s.query !~ 'pg_stat_|pg_current_wal_lsn|txid_snapshot'"
            calls = psql(database, f"select coalesce(sum(s.calls), 0) from pg_stat_statements s where {mine}")
            found["statements"] = int(calls) / (time.monotonic() - reset)
        found["transactions"] /= elapsed
        for name in ("relay", "postgres", "redis"):
            found[name] *= 100 / elapsed
        if relays:
            found["memory"] = max(mebibytes(relay.pid, "VmRSS") for relay in running)
            psql(database, "insert into event_outbox (event_type, aggregate_id) values ('order.created', 'last')")
            with Client(redis) as client:
                client.ask("xread", "block", 20_000, "streams", "events", "0")
    if relays:
        check_books("idle", database, 1)
        stream.check("idle", 1)
    return found


def tables(tries):
    size = Table(
        "size and start",
        {"binary": ("binary MiB", ".1f"), "start": ("start to entry ms", ".1f"), "memory": ("MiB after", ".1f")},
        spread=("start",),
        notes=[f"From the start of the process to its one pending event in the stream; the median of {tries} starts a run."],
    )
    cost = Table("an event", {
        "relay": ("relay us", ".1f"), "postgres": ("postgres us", ".1f"), "redis": ("redis us", ".1f"), "wal": ("WAL bytes", ",.0f"),
        "batch": ("events a batch", ",.0f"), "transactions": ("transactions a batch", ".2f"), "memory": ("relay MiB", ".0f"),
    }, spread=("postgres", "wal"), notes=[
        "A drain to a Redis Stream, 200 bytes, where not said otherwise right after a checkpoint. us an event is CPU seconds a \
million events.",
        "With autovacuum on, its WAL and transactions count too, as far as they fall into the drain.",
        "transactions: less those of a drain of nothing. The last batch of each partition is not full.",
    ])
    quiet = Table("idle", {
        "xids": ("xids", ",.0f"), "wal": ("WAL bytes", ",.0f"), "statements": ("statements/s", ".2f"),
        "transactions": ("transactions/s", ".2f"), "relay": ("relays %", ".2f"), "postgres": ("postgres %", ".2f"),
        "redis": ("redis %", ".2f"), "memory": ("MiB a relay", ".1f"),
    }, notes=[
        "%: of one CPU. xids and WAL: in all of the time, autovacuum off.",
        "What the server does by itself is in the row without a relay.",
    ])
    return size, cost, quiet


def run(options):
    tries = 1 if options.short else 5
    size, cost, quiet = tables(tries)
    events, seconds = options.size(1_000_000, 5_000), 3 if options.short else 60
    with servers() as (database, redis):
        for number in options.rounds():
            starts = [start(database, redis) for _ in range(tries)]
            if number > 0:
                size.add("relay", binary=os.path.getsize(RELAY) / 2**20, start=sorted(starts)[tries // 2][0],
                         memory=max(memory for _, memory in starts))
            for kind in KINDS:
                found = costs(database, redis, kind, events)
                if number == 0:
                    break
                cost.add(kind, **found)
        setting(database, "autovacuum", "off")
        counted = preload_statistics(database)
        if not counted:
            quiet.notes.append("statements/s are left out: this server lacks pg_stat_statements.")
        for _ in range(options.runs):
            for relays, label in ((0, f"{seconds} s, no relay"), (IDLE_RELAYS, f"{seconds} s, three relays")):
                quiet.add(label, **idle(database, redis, relays, seconds, counted))
    return [size, cost, quiet]
