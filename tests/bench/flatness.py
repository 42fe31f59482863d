"""Whether a deep backlog, or a session that holds an old snapshot, slows the drain."""
import contextlib
import re
import subprocess
import threading
import time

from backlog import check_books, clear, fill, setting
from common import Table, percentile, psql_path, servers
from drain import drain
from resp import Client
from sinks import Stream

DURATION = re.compile(r"LOG:  duration: ([\d.]+) ms  execute [^:]*:")
# A claim has two statements: it takes partitions, then reads their rows. Each is recognised by a text that only it contains.
CLAIM = {"take": "pg_try_advisory_xact_lock(", "read": "ctid::text"}


class Progress:
    """The number of entries in the stream over time, read every 10 ms."""

    def __init__(self, redis):
        self.seen, self.ended = [(time.monotonic(), 0)], threading.Event()
        self.thread = threading.Thread(target=self.watch, args=(redis,), daemon=True)
        self.thread.start()

    def watch(self, redis):
        with Client(redis) as client:
            while not self.ended.wait(0.01):
                self.seen.append((time.monotonic(), client.ask("xlen", "events")))

    def end(self):
        self.ended.set()
        self.thread.join()

    def reached(self, count):
        """The time at which the stream had `count` entries, interpolated between two reads; None if it never had so many."""
        for (before, fewer), (after, more) in zip(self.seen, self.seen[1:]):
            if more >= count > fewer:
                return before + (after - before) * (count - fewer) / (more - fewer)
        return None


class ClaimTimes:
    """The durations of the statements of claims, from the server's log."""

    def __init__(self, database):
        self.database = database
        setting(database, "log_parameter_max_length", "0")
        setting(database, "log_min_duration_statement", "0")
        with open(database.log, "rb") as log:
            self.start = log.seek(0, 2)

    def p99(self):
        setting(self.database, "log_min_duration_statement", None)
        times = {name: [] for name in CLAIM}
        with open(self.database.log, errors="replace") as log:
            log.seek(self.start)
            duration = None
            for line in log:
                if not line.startswith("\t"):
                    match = DURATION.search(line)
                    duration = float(match[1]) if match else None
                for name, mark in CLAIM.items():
                    if duration is not None and mark in line:
                        times[name].append(duration)
                        duration = None  # once a statement
        return {name: percentile(taken, 0.99) for name, taken in times.items() if taken}


@contextlib.contextmanager
def old_snapshot(database):
    """A session in a repeatable read transaction that has run a query."""
    session = subprocess.Popen([psql_path(), database.url, "-qXAt"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    session.stdin.write("begin isolation level repeatable read; select count(*) from event_outbox;\n")
    session.stdin.flush()
    session.stdout.readline()
    try:
        yield
    finally:
        session.stdin.close()
        session.wait()


def measure(database, redis, label, events, first, beside=contextlib.nullcontext):
    stream = Stream(redis)
    clear(database)
    stream.clear()
    fill(database, events)
    claims = ClaimTimes(database)
    with beside():
        progress = Progress(redis)
        spent = drain(database, redis, stream)
        progress.end()
    claimed = claims.p99()
    check_books(label, database, events)
    stream.check(label, events)
    stream.clear()
    found = {"all": events / spent["seconds"]}
    early, late = progress.reached(first), progress.reached(events - events // 10)
    # The last read may have been before the end.
    end = progress.reached(events) or spent["begun"] + spent["seconds"]
    if early:
        found["first"] = first / (early - spent["begun"])
    if late and end > late:
        found["last"] = (events // 10) / (end - late)
    return {**found, **claimed, "memory": spent["memory"]}


def of_other(table, label, other, columns):
    if label in table.rows and other in table.rows:
        for name in columns:
            if name in table.rows[label] and name in table.rows[other]:
                table.rows[label][f"{name}_ratio"] = [table.median(label, name) / table.median(other, name)]


def run(options):
    common = {"take": ("take p99 ms", ".2f"), "read": ("read p99 ms", ".2f"), "memory": ("relay MiB", ".0f")}
    notes = [
        "take, read: the two statements of a claim, by the server's log (log_min_duration_statement = 0 in all runs).",
        "A rate counts from the relay's start; that of the last tenth from when nine tenths were in the stream.",
    ]
    deep = options.size(10_000_000, 10_000)
    shallow = max(deep // (100 if deep >= 1_000_000 else 10), 1_000)
    held = options.size(2_000_000, 10_000, share=0.2)
    depth = Table("backlog", {
        "first": (f"first {shallow:,}/s", ",.0f"), "first_ratio": ("ratio", ".2f"), "all": ("all/s", ",.0f"),
        "all_ratio": ("ratio", ".2f"), "last": ("last tenth/s", ",.0f"), **common,
    }, spread=("first", "all"), notes=notes)
    snapshot = Table("old snapshot", {
        "all": ("all/s", ",.0f"), "all_ratio": ("ratio", ".2f"), "first": ("first tenth/s", ",.0f"),
        "last": ("last tenth/s", ",.0f"), "last_ratio": ("ratio", ".2f"), **common,
    }, spread=("all", "last"), notes=notes)
    depths = {f"{events:,} events": events for events in (shallow, deep)}
    besides = {f"{held:,} events, no other session": False, f"{held:,} events, snapshot from before the first": True}
    with servers() as (database, redis):
        for number in options.rounds():
            if number == 0:
                measure(database, redis, "warm-up", shallow, shallow)
                continue
            for label, events in depths.items():
                if options.wants(label):
                    depth.add(label, **measure(database, redis, label, events, shallow))
            for label, holds in besides.items():
                if options.wants(label):
                    beside = (lambda: old_snapshot(database)) if holds else contextlib.nullcontext
                    snapshot.add(label, **measure(database, redis, label, held, held // 10, beside))
    of_other(depth, *reversed(depths), ["first", "all"])
    of_other(snapshot, *reversed(besides), ["all", "last"])
    for table in (depth, snapshot):
        if table.rows and not any("take" in row for row in table.rows.values()):
            table.notes.append("The log did not show the statements of a claim: their times are left out.")
    return [depth, snapshot]
