"""How soon and how fast events drain that waited for one of two destinations, with and without an old snapshot."""
import contextlib
import os
import tempfile
import time

from backlog import clear, fill
from common import Server, Table, expect, fail, psql, redis_cli, servers
from flatness import Progress, of_other, old_snapshot
from processes import Relay
from sinks import Stream

# Redis refuses writes while it requires a replica and has none.
DOWN, UP = ("config", "set", "min-replicas-to-write", "1"), ("config", "set", "min-replicas-to-write", "0")
OWED = "select count(*) from event_outbox where status = 'scheduled' and destination = 'returning'"
LONGEST = 600
RECOVERY_MS = 1000

CONFIGURATION = """
[destinations.steady]
type = "redis-stream"
url = "{steady}"
[destinations.returning]
type = "redis-stream"
url = "{returning}"
"""


def until(relay, what, holds, pause=0.05):
    deadline = time.monotonic() + LONGEST
    while not holds():
        if os.waitid(os.P_PID, relay.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            fail(f"the relay ended before {what}")
        if time.monotonic() > deadline:
            fail(f"waited in vain until {what}")
        time.sleep(pause)


def measure(database, steady, returning, label, events, beside):
    streams = Stream(steady), Stream(returning)
    clear(database)
    for stream in streams:
        stream.clear()
    fill(database, events)
    redis_cli(returning, *DOWN)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file, beside():
        file.write(CONFIGURATION.format(steady=steady.url, returning=returning.url))
        file.flush()
        environment = {"EVENT_CIRCUIT_BREAKER_RECOVERY_TIMEOUT": str(RECOVERY_MS)}
        with Relay(database, environment, "--config", file.name) as relay:
            until(relay, "all events wait", lambda: int(psql(database, OWED)) == events)
            time.sleep(2 * RECOVERY_MS / 1000)
            progress = Progress(returning)
            back = time.monotonic()
            redis_cli(returning, *UP)
            until(relay, "all events have come", lambda: progress.seen[-1][1] >= events)
            until(relay, "all is recorded", lambda: int(psql(database, "select count(*) from event_outbox")) == 0)
            progress.end()
            memory = relay.peak
    logged = int(psql(database, "select count(distinct (outbox_id, destination)) from event_processing_log where status = 'published'"))
    expect(label, logged=(logged, 2 * events))
    for stream in streams:
        stream.check(label, events)
    first, end = progress.reached(1), progress.reached(events)
    return {"first": (first - back) * 1000, "seconds": end - back, "all": events / (end - back), "memory": memory}


def run(options):
    columns = {
        "first": ("first after ms", ",.0f"), "seconds": ("all after s", ".2f"), "all": ("all/s", ",.0f"), "all_ratio": ("ratio", ".2f"),
        "memory": ("relay MiB", ".0f"),
    }
    events = options.size(60_000, 3_000)
    notes = [
        "Times count from the destination's return. The relay asks it each second: EVENT_CIRCUIT_BREAKER_RECOVERY_TIMEOUT = 1000.",
        "The snapshot is taken before the relay starts.",
    ]
    table = Table("promotion", columns, spread=("first", "all"), notes=notes)
    besides = {f"{events:,} events, no other session": False, f"{events:,} events, snapshot from before the first": True}
    with servers() as (database, steady), Server("redis") as returning:
        for number in options.rounds():
            for label, holds in besides.items():
                if not options.wants(label):
                    continue
                beside = (lambda: old_snapshot(database)) if holds else contextlib.nullcontext
                found = measure(database, steady, returning, label, events, beside)
                if number == 0:
                    break
                table.add(label, **found)
    of_other(table, *reversed(besides), ["all"])
    return [table]
