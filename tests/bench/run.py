#!/usr/bin/env python3
"""What the relay costs and how fast it is, on throwaway servers.

PostgreSQL and the relay run with their defaults, with fsync and exactly-once on, unless a section is about a setting. Every
section checks that each committed event arrived once, in the order of its key, and has its row in the log. If not, it exits
with code 1.

sections:
  drain      a backlog to each destination, against the floor of the database; payloads, lanes, relays
  latency    from a commit to the entry in the stream, at 100, 1,000 and 5,000 events/s
  producers  what the outbox, its trigger and a relay cost those who insert
  flatness   a backlog of 10,000,000 against one of 100,000; beside a session that holds a snapshot
  promotion  the return of a destination for which events waited; beside a session that holds a snapshot
  footprint  size, start, memory, WAL, transactions, and what an idle relay costs
"""
import argparse
import importlib
import json
import os
import platform
import signal
import sys
import time

from common import RELAY, Options, Server, psql

SECTIONS = ["drain", "latency", "producers", "flatness", "promotion", "footprint"]
SETTINGS = ["server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_wal_size", "autovacuum"]


def surroundings():
    with Server("postgres") as database:
        names = ", ".join(f"'{name}'" for name in SETTINGS)
        rows = psql(database, f"select name, current_setting(name) from pg_settings where name in ({names})")
    settings = dict(row.split("|") for row in rows.splitlines())
    with open("/proc/meminfo") as meminfo:
        memory = int(meminfo.readline().split()[1]) / 1024 / 1024
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "cpus": os.cpu_count(), "memory_gib": round(memory, 1),
        "system": platform.platform(), "load": os.getloadavg()[0], "postgresql": settings,
    }


def main():
    # On SIGTERM it also ends its relays. Servers end when their pipe closes, but a relay would wait for its database for ever.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="all of them by default")
    parser.add_argument("--runs", type=int, default=3, help="besides a warm-up (3)")
    parser.add_argument("--events", type=int, help="instead of each section's own number")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name holds it; not of footprint")
    parser.add_argument("--json", metavar="FILE", help="every run's figures")
    parser.add_argument("--short", action="store_true", help="tiny and once: for the checks, not for the times")
    given = parser.parse_args()
    unknown = set(given.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    if not os.path.exists(RELAY):
        sys.exit("no relay is built: run make build")
    options = Options(1 if given.short else given.runs, given.events, given.short, given.only)
    about = surroundings()
    print(f"{about['date']}, {about['cpus']} CPUs, {about['memory_gib']} GiB, load {about['load']:.1f}, {about['system']}")
    print("PostgreSQL:", ", ".join(f"{name} {value}" for name, value in about["postgresql"].items()))
    results = {}
    for name in given.sections or SECTIONS:
        print(f"\n== {name}", flush=True)
        tables = importlib.import_module(name).run(options)
        if not any(table.rows for table in tables):
            sys.exit(f"{name}: no variant's name holds {given.only!r}")
        for table in tables:
            table.show()
        results[name] = [table.data() for table in tables]
        if given.json:
            # After each section, so that the figures are kept if a later section fails.
            with open(given.json, "w") as file:
                json.dump({"surroundings": about, "sections": results}, file, indent=1)
    if given.short:
        print("all checks passed; the times above mean nothing")


if __name__ == "__main__":
    main()
