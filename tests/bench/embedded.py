#!/usr/bin/env python3
"""The relay on a SQLite file: drain to a file and to a Redis Stream, latency, idle cost, and the application's own commits.

Every drain checks that all events arrived once and in order. Compare figures of the same run only. If the machine is busy
with something else, the writer's figures suffer first.
Usage: python3 tests/bench/embedded.py [--only drain,latency,idle,writer] [--events 200000] [--runs 3] [--seconds 5]
"""
import argparse
import contextlib
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from throwaway import RELAY, Server, redis_cli  # noqa: E402

KEYS = 10_000


class File:
    """An application's throwaway file, migrated, in WAL mode, with `backlog` events of 200 bytes."""

    def __init__(self, home, backlog=0):
        self.path = os.path.join(home, "app.db")
        self.log = open(os.path.join(home, "relay.log"), "w+")
        self.environment = {**os.environ, "DATABASE_URL": f"sqlite:{self.path}", "RELAY_LOG": "warn"}
        self.database = sqlite3.connect(self.path, isolation_level=None, timeout=5)
        self.database.execute("pragma journal_mode = wal")
        subprocess.run([RELAY, "migrate"], env=self.environment, check=True, stdout=subprocess.DEVNULL)
        self.database.execute("create table orders (id integer primary key, total text)")
        self.database.execute("""
            insert into event_outbox (event_type, aggregate_type, aggregate_id, payload)
            with recursive n (i) as (select 1 where ?1 > 0 union all select i + 1 from n where i < ?1)
            select 'order.created', 'order', i % ?2, json_object('n', i, 'pad', substr(hex(zeroblob(100)), 1, 175)) from n
        """, (backlog, KEYS))
        self.database.execute("pragma wal_checkpoint(truncate)")

    @contextlib.contextmanager
    def relay(self, stdout, *arguments, **environment):
        process = subprocess.Popen([RELAY, *arguments], env={**self.environment, **environment}, stdout=stdout, stderr=self.log)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()

    def commit(self, name="order.created"):
        """Does what a request of the application does: it writes a row of its own and an event in one transaction."""
        self.database.execute("begin immediate")
        self.database.execute("insert into orders (total) values ('12.50')")
        self.database.execute("insert into event_outbox (event_type, aggregate_type, aggregate_id) values (?, 'order', '1')", (name,))
        self.database.execute("commit")

    def close(self):
        self.database.close()
        self.log.close()


@contextlib.contextmanager
def fresh(backlog=0):
    with tempfile.TemporaryDirectory() as home:
        file = File(home, backlog)
        try:
            yield file, home
        finally:
            file.close()


def drain(file, stdout, **environment):
    """Returns seconds and peak resident MiB. The peak is from /proc: rusage would count this program's memory at the fork."""
    begun, peak = time.monotonic(), 0
    process = subprocess.Popen([RELAY, "--once"], env={**file.environment, **environment}, stdout=stdout, stderr=file.log)
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            peak = max(peak, int(open(f"/proc/{process.pid}/status").read().split("VmHWM:")[1].split()[0]) / 1024)
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    if process.returncode != 0:
        file.log.seek(0)
        sys.exit(f"relay --once failed with status {process.returncode}: {file.log.read()}")
    return seconds, peak


def check(arrived, events, file):
    """`arrived`: key and sequence of each event, in order of arrival."""
    last = {}
    for key, sequence in arrived:
        if last.get(key, 0) >= sequence:
            sys.exit(f"event {sequence} of key {key} came after {last[key]}")
        last[key] = sequence
    logged = file.database.execute("select count(*), count(distinct outbox_id) from event_processing_log where status = 'published'").fetchone()
    left = file.database.execute("select count(*) from event_outbox").fetchone()[0]
    if len(arrived) != events or logged != (events, events) or left:
        sys.exit(f"{events} events, {len(arrived)} arrived, {logged} logged, {left} left")


def bench_drain(options):
    rates = {"stdout": [], "redis": []}
    memory = {"stdout": 0, "redis": 0}
    with Server("redis") as redis:
        for _ in range(options.runs):
            with fresh(options.events) as (file, home):
                with open(os.path.join(home, "out"), "w+") as out:
                    seconds, mebibytes = drain(file, out, RELAY_STDOUT="true")
                    out.seek(0)
                    events = map(json.loads, out)
                    check([(event["partitionkey"], int(event["sequence"])) for event in events], options.events, file)
                rates["stdout"].append(options.events / seconds)
                memory["stdout"] = max(memory["stdout"], mebibytes)
            with fresh(options.events) as (file, _):
                redis_cli(redis, "flushall")
                seconds, mebibytes = drain(file, subprocess.DEVNULL, REDIS_URL=redis.url)
                entries = json.loads(redis_cli(redis, "--json", "xrange", "events", "-", "+"))
                entries = (dict(zip(fields[::2], fields[1::2])) for _, fields in entries)
                check([(entry["partitionkey"], int(entry["sequence"])) for entry in entries], options.events, file)
                rates["redis"].append(options.events / seconds)
                memory["redis"] = max(memory["redis"], mebibytes)
    for name, rate in rates.items():
        print(f"drain to {name:6}  {statistics.median(rate):9,.0f} events/s  (runs: {' '.join(f'{r:,.0f}' for r in rate)}), {memory[name]:.0f} MiB resident")


def bench_latency(options):
    with fresh() as (file, _), file.relay(subprocess.PIPE, RELAY_STDOUT="true") as relay:
        seen = {}

        def read():
            for line in relay.stdout:
                seen[json.loads(line)["type"]] = time.perf_counter()

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(1)
        for rate, count in ((4, 60), (20, 100), (100, 300), (500, 1500)):
            committed = {}
            for index in range(count):
                file.commit(f"{rate}-{index}")
                committed[f"{rate}-{index}"] = time.perf_counter()
                time.sleep(1 / rate)
            deadline = time.monotonic() + 30
            while not committed.keys() <= seen.keys():
                if time.monotonic() > deadline:
                    sys.exit("not every event arrived")
                time.sleep(0.01)
            milliseconds = sorted((seen[name] - at) * 1000 for name, at in committed.items())
            print(f"commit to stdout at {rate:3} commits/s  p50 {milliseconds[count // 2]:5.1f} ms  p99 {milliseconds[count * 99 // 100]:5.1f} ms")
        relay.terminate()
        reader.join()


def bench_idle(options):
    with fresh() as (file, _), file.relay(subprocess.DEVNULL, RELAY_STDOUT="true") as relay:
        def seconds():
            fields = open(f"/proc/{relay.pid}/stat").read().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        time.sleep(3)
        before, pause = seconds(), 6 * options.seconds
        time.sleep(pause)
        print(f"idle for {pause} s  {(seconds() - before) / pause:.2%} of a core")


def write(file, seconds):
    """Makes 500 commits a second. Returns the milliseconds of each."""
    times, due, end = [], time.perf_counter(), time.perf_counter() + seconds
    while due < end:
        time.sleep(max(0, due - time.perf_counter()))
        begun = time.perf_counter()
        file.commit()
        times.append((time.perf_counter() - begun) * 1000)
        due += 1 / 500
    times.sort()
    return times[len(times) // 2], times[len(times) * 99 // 100], times[-1]


def bench_writer(options):
    factors = []
    for _ in range(options.runs):
        # Both files have the same backlog, which keeps the relay busy the whole time.
        with fresh(500_000) as (file, _):
            alone = write(file, options.seconds)
        with fresh(500_000) as (file, home), open(os.path.join(home, "out"), "w") as out, file.relay(out, RELAY_STDOUT="true"):
            time.sleep(0.3)
            beside = write(file, options.seconds)
            left, done = (file.database.execute(f"select count(*) from {table}").fetchone()[0] for table in ("event_outbox", "event_processing_log"))
            if not left:
                sys.exit("the relay was not busy throughout")
        factors.append(beside[1] / alone[1])
        print("500 commits/s alone  p50 %.2f  p99 %.2f  max %.1f ms" % alone,
              "| beside a busy relay  p50 %.2f  p99 %.2f  max %.1f ms" % beside,
              f"| p99 x {factors[-1]:.2f}, {done / (options.seconds + 0.3):,.0f} events/s published")
    print(f"p99 beside a busy relay: {statistics.median(factors):.2f} times as long")


def main():
    sections = {"drain": bench_drain, "latency": bench_latency, "idle": bench_idle, "writer": bench_writer}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(sections))
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    options = parser.parse_args()
    for name in options.only.split(","):
        sections[name](options)


if __name__ == "__main__":
    main()
