#!/usr/bin/env python3
"""A demonstration that needs no server: a shop on a SQLite file commits orders with their events, and the relay prints the
events. One event is dead-lettered and redriven. It ends by itself and leaves nothing behind. `make demo` builds the relay
and runs it."""
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RELAY = os.path.join(ROOT, "target", "demo", "relay")

ON_SERVERS = """\
The same on PostgreSQL and Redis, once they are there:

  export DATABASE_URL=postgres://me:secret@localhost/shop REDIS_URL=redis://localhost
  relay migrate && relay check
  relay emit order.created '{"total": "12.50"}' --aggregate-type order --aggregate-id 42
  relay --once && redis-cli xrange events - +

`make demo-servers` shows that on throwaway servers, with EventBridge besides."""


def title(text):
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def run(environment, *command, expect=0):
    """Runs a command and shows it; returns what it printed, a list of lines."""
    print(f"$ {os.path.basename(command[0])} {' '.join(command[1:])}", flush=True)
    ended = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    print(ended.stdout, end="", flush=True)
    if ended.returncode != expect:
        sys.exit(f"{os.path.basename(command[0])} ended with {ended.returncode}, expected {expect}")
    return ended.stdout.splitlines()


def show(database, statement):
    """Shows a statement and its rows as a table."""
    print(f"> {statement}")
    cursor = database.execute(statement)
    if cursor.description is None:
        return
    names = [column[0] for column in cursor.description]
    rows = [names] + [["" if value is None else str(value) for value in row] for row in cursor]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    for row in rows:
        print("  " + "  ".join(value.ljust(width) for value, width in zip(row, widths)).rstrip())


def place_order(database, order, customer, total):
    """Writes the order and its event in one transaction, so that either both exist afterwards or neither does."""
    database.execute("begin immediate")
    try:
        # The event comes first to show that the order of the inserts does not matter: if the other insert fails, both roll back.
        database.execute(
            "insert into event_outbox (event_type, payload, source, aggregate_type, aggregate_id, correlation_id) values ('order.created', ?, 'shop', 'order', ?, ?)",
            (json.dumps({"order": order, "customer": customer, "total": total}), str(order), f"request-{customer}-{order}"))
        database.execute("insert into shop_order (id, customer, total) values (?, ?, ?)", (order, customer, total))
        database.execute("commit")
        print(f"order {order} of {customer} committed")
    except sqlite3.IntegrityError:
        database.execute("rollback")
        print(f"order {order} of {customer} rolled back: the number is taken")


def pay_order(database, order):
    database.execute("begin immediate")
    database.execute("update shop_order set paid = true where id = ?", (order,))
    database.execute(
        "insert into event_outbox (event_type, payload, source, aggregate_type, aggregate_id) values ('order.paid', ?, 'shop', 'order', ?)",
        (json.dumps({"order": order}), str(order)))
    database.execute("commit")
    print(f"order {order} paid")


def look(environment):
    """Starts a relay, shows its status and the address of its page, and stops it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = f"http://127.0.0.1:{port}/"
    relay = subprocess.Popen([RELAY, "run"], env={**os.environ, **environment, "RELAY_HTTP_ADDR": f"127.0.0.1:{port}"})
    try:
        end = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(page + "readyz").close()
                break
            except OSError as error:  # it has only just been started
                if time.monotonic() > end:
                    sys.exit(f"the relay is not ready: {error}")
                time.sleep(0.05)
        run(environment, RELAY, "status")
        print(f"the same is a page, live, while the relay runs: {page} now, http://127.0.0.1:9464/ by default")
        urllib.request.urlopen(page).close()
    finally:
        relay.terminate()
        relay.wait()


def main():
    with tempfile.TemporaryDirectory() as home:
        file = os.path.join(home, "shop.db")
        environment = {
            "DATABASE_URL": f"sqlite:{file}", "RELAY_STDOUT": "true", "RELAY_LOG": "warn", "RELAY_LOG_FORMAT": "text",
            "EVENT_MAX_PAYLOAD_SIZE": "1000",
        }

        title("1. A new file with the tables")
        run({**environment, "DATABASE_URL": f"sqlite:{file}?mode=rwc"}, RELAY, "migrate")

        title("2. A shop commits orders with their events, and rolls one back")
        database = sqlite3.connect(file, isolation_level=None)
        database.execute("create table shop_order (id integer primary key, customer text, total text, paid integer)")
        for order, customer, total in [(1, "ada", "12.50"), (2, "grace", "7.00"), (3, "ada", "99.90")]:
            place_order(database, order, customer, total)
        pay_order(database, 1)
        place_order(database, 3, "mallory", "0.01")
        print("and one event with a payload over the limit of this demo, 1,000 bytes")
        database.execute("insert into event_outbox (event_type, payload) values ('report.made', json_object('pages', hex(zeroblob(1000))))")
        show(database, "select id, event_type, aggregate_id, status, length(payload) as bytes from event_outbox order by id")

        title("3. The relay publishes what is due, here to standard output (exit code 3: something was dead-lettered)")
        arrived = run(environment, RELAY, "--once", expect=3)

        title("4. The processing log: one row per event, destination and attempt")
        show(database, "select outbox_id, event_type, destination, status, attempt, error from event_processing_log order by outbox_id")

        title("5. The dead letter, and its redrive")
        run(environment, RELAY, "dead-letter", "list")
        run(environment, RELAY, "dead-letter", "redrive", "--id", "1")

        title("6. Once more, with a limit that lets it pass (its line is cut here)")
        again = subprocess.run([RELAY, "--once"], env={**os.environ, **environment, "EVENT_MAX_PAYLOAD_SIZE": "100000"},
                               stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        for line in again:
            print(line[:200] + "...")
        show(database, "select status, count(*) as events from event_processing_log group by status")

        arrived = [json.loads(line) for line in arrived + again]
        orders = [(event["type"], event.get("subject")) for event in arrived]
        expected = [("order.created", "1"), ("order.created", "2"), ("order.created", "3"), ("order.paid", "1"), ("report.made", None)]
        left = database.execute("select count(*) from event_outbox").fetchone()[0]
        if orders != expected or any("mallory" in json.dumps(event) for event in arrived) or left != 0:
            sys.exit(f"the demo did not end as it should: {orders}, {left} left in the outbox")
        database.close()
        title("7. A relay that stays, and a look at it")
        look(environment)
        title("Done: five events committed, five arrived, the one rolled back did not. The file is gone.\n")
        print(ON_SERVERS)


if __name__ == "__main__":
    main()
