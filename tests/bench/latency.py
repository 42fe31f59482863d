"""The time from a commit to the entry in the stream, for a client that waits in XREAD.

pgbench spreads single-event transactions at random over time, at a given mean rate, and notes when the answer to each
commit arrived. The client notes when Redis's answer with the entry began to arrive. Both read the clock of this machine.
If the entry arrives before the producer has its answer, the time is negative.
"""
import sys
import time

from backlog import check_books, clear
from common import Table, expect, percentile, psql, redis_cli, servers
from pgbench import Producers
from processes import Relay
from resp import Client

RATES = {100: 4, 1_000: 8, 5_000: 16}  # events/s, and the clients that commit them
# Without a wake-up; the relay warns of that.
POLLING = {"RELAY_DATABASE_POOLED": "true", "RELAY_LOG": "error"}
MODES = {
    "wake-up": {},
    "polling every 10 ms": {**POLLING, "EVENT_OUTBOX_POLLING_INTERVAL": "10"},
    "polling every 100 ms": {**POLLING, "EVENT_OUTBOX_POLLING_INTERVAL": "100"},
}


class Reader:
    """Continues to read the stream, and checks the order of each key."""

    def __init__(self, redis):
        self.client, self.position, self.last = Client(redis), "0", {}

    def read(self, events):
        """Returns when each of the next `events` arrived, by correlation id."""
        seen, count, disorder, deadline = {}, 0, 0, time.monotonic() + 60
        while count < events:
            answer = self.client.ask("xread", "block", 5000, "streams", "events", self.position)
            if time.monotonic() > deadline:
                break
            deadline = deadline if answer is None else time.monotonic() + 60
            for position, fields in answer[0][1] if answer else []:
                event = dict(zip(fields[::2], fields[1::2]))
                key, sequence = event[b"partitionkey"], int(event[b"sequence"])
                disorder += self.last.get(key, 0) >= sequence
                self.last[key] = sequence
                seen[event.get(b"correlationid", b"").decode()] = self.client.answered_at
                self.position, count = position.decode(), count + 1
        expect("latency", arrived=(count, events), distinct=(len(seen), events), disorder=(disorder, 0))
        return seen


def measure(database, reader, rate, seconds):
    clients = RATES[rate]
    each = max(int(rate * seconds / clients), 1)
    producers = Producers(database, clients, "-R", rate, "-t", each, log=True)
    seen = reader.read(each * clients)
    producers.wait()
    committed = producers.commits()
    if committed.keys() != seen.keys():
        sys.exit("wrong result: what arrived is not what was committed")
    times = [(seen[event] - at) * 1000 for event, at in committed.items()]
    span = max(committed.values()) - min(committed.values())
    return {"rate": len(times) / span, "p50": percentile(times, 0.5), "p99": percentile(times, 0.99), "max": max(times)}


def run(options):
    columns = {
        "rate": ("commits/s", ",.0f"), "p50": ("p50 ms", ".2f"), "p99": ("p99 ms", ".2f"), "max": ("max ms", ".1f"),
        "memory": ("relay MiB", ".0f"),
    }
    table = Table("latency", columns, spread=("p50", "p99"), notes=[
        "From the answer to the commit to the entry read by XREAD BLOCK. Polling only: RELAY_DATABASE_POOLED=true.",
        "Producers, PostgreSQL, relay, Redis and the reader share the CPUs.",
    ])
    with servers() as (database, redis):
        for number in options.rounds():
            for mode, settings in MODES.items():
                if not options.wants(mode):
                    continue
                clear(database)
                redis_cli(redis, "flushall")
                total, reader = 1, Reader(redis)
                with Relay(database, {"REDIS_URL": redis.url, **settings}) as relay:
                    psql(database, "insert into event_outbox (event_type, aggregate_id) values ('order.created', 'first')")
                    reader.read(1)
                    for rate in RATES:
                        # The option counts the events at the highest rate. The other rates run for the same time.
                        seconds = 2 if number == 0 else options.size(50_000, 5_000) / max(RATES)
                        clients = RATES[rate]
                        found = measure(database, reader, rate, seconds)
                        total += max(int(rate * seconds / clients), 1) * clients
                        if number > 0:
                            table.add(f"{mode}, {rate:,}/s", **found, memory=relay.peak)
                check_books(f"latency, {mode}", database, total)
        for mode in MODES:
            for rate in RATES:
                label = f"{mode}, {rate:,}/s"
                # In a run of a second or two, the rate can be a tenth lower by chance.
                if not options.short and label in table.rows and table.median(label, "rate") < 0.9 * rate:
                    table.notes.append(f"{label}: the producers did not reach that rate here; the times are those of a full machine.")
    return [table]
