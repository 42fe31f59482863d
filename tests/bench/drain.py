"""How fast a backlog drains, with the processing log on, and the CPU time that an event costs each process."""
import dataclasses

import floor
from backlog import check_books, clear, fill
from common import Table, servers
from processes import Relay, cpu_seconds
from sinks import EventBridge, PubSub, Stdout, Stream

LANES = 3  # the default


@dataclasses.dataclass
class Variant:
    label: str
    sink: str = "stream"
    settings: dict = dataclasses.field(default_factory=dict)
    payload: int = 200
    relays: int = 1
    # The share of the events, which is smaller for variants with larger or slower events.
    share: float = 1.0
    floor: bool = True

    @property
    def loops(self):
        return self.relays * int(self.settings.get("RELAY_LANES", LANES))


VARIANTS = [
    Variant("Redis Stream"),
    Variant("Redis Stream, 1 lane", settings={"RELAY_LANES": "1"}),
    Variant("Redis Stream, 2 lanes", settings={"RELAY_LANES": "2"}),
    Variant("Redis Stream, 4 lanes", settings={"RELAY_LANES": "4"}),
    Variant("Redis Stream, two relays", relays=2),
    Variant("Redis Stream, exactly-once off", settings={"RELAY_REDIS_EXACTLY_ONCE": "false"}),
    Variant("Redis Stream, ghost barrier", settings={"RELAY_GHOST_BARRIER": "true"}),
    Variant("Redis Stream, 1 kB", payload=1_000, share=0.5),
    Variant("Redis Stream, 10 kB", payload=10_000, share=0.05),
    Variant("Redis Pub/Sub, one subscriber", sink="pubsub"),
    Variant("stdout to a file", sink="stdout"),
    Variant("EventBridge, answers after 5 ms", sink="eventbridge-5", share=0.2, floor=False),
    Variant("EventBridge, answers after 40 ms", sink="eventbridge-40", share=0.1, floor=False),
]


def drain(database, redis, sink, settings=None, relays=1, stderr=None):
    """Drains the outbox. Returns seconds, CPU seconds of each process, and the peak MiB of the largest relay."""
    before = cpu_seconds(database.pid), cpu_seconds(redis.pid)
    running = [
        Relay(database, {**sink.environment, **(settings or {})}, "--once", stdout=sink.stdout, stderr=stderr)
        for _ in range(relays)
    ]
    for relay in running:
        relay.wait()
    after = cpu_seconds(database.pid), cpu_seconds(redis.pid)
    return {
        "begun": running[0].begun,
        "seconds": max(relay.begun + relay.seconds for relay in running) - running[0].begun,
        "relay": sum(relay.cpu for relay in running),
        "postgres": after[0] - before[0],
        "redis": after[1] - before[1],
        "memory": max(relay.peak for relay in running),
    }


def open_sink(name, redis):
    if name.startswith("eventbridge-"):
        return EventBridge(int(name.rpartition("-")[2]))
    return {"stream": lambda: Stream(redis), "pubsub": lambda: PubSub(redis), "stdout": Stdout}[name]()


def measure(database, redis, variant, events):
    sink = open_sink(variant.sink, redis)
    try:
        clear(database)
        sink.clear()
        fill(database, events, variant.payload)
        spent = drain(database, redis, sink, variant.settings, variant.relays)
        check_books(variant.label, database, events)
        sink.check(variant.label, events)
    finally:
        sink.close()
    rate = events / spent["seconds"]
    each = {name: spent[name] / events * 1e6 for name in ("relay", "postgres", "redis")}
    found = {"events": events, "rate": rate, **each, "memory": spent["memory"]}
    if variant.floor:
        clear(database)
        fill(database, events, variant.payload)
        least = events / floor.seconds(database, variant.loops)
        check_books(f"floor of {variant.label}", database, events)
        found.update(floor=least, ratio=rate / least)
    return found


def run(options):
    columns = {
        "events": ("events", ",.0f"), "rate": ("events/s", ",.0f"), "floor": ("floor/s", ",.0f"), "ratio": ("of floor", ".2f"),
        "relay": ("relay us", ".1f"), "postgres": ("postgres us", ".1f"), "redis": ("redis us", ".1f"), "memory": ("relay MiB", ".0f"),
    }
    notes = [
        "us: CPU time an event, from the relay's start to its end; vacuum may go on after that. relay MiB: the most resident.",
        "floor: the same reads, deletes and log inserts by as many SQL loops as there are lanes, in the same run.",
        "The rate counts the relay's start and end. Redis keeps no file, and shares the CPUs with all others.",
    ]
    table = Table("drain", columns, spread=("rate", "ratio"), notes=notes)
    size = options.size(1_000_000, 5_000)
    with servers() as (database, redis):
        for number in options.rounds():
            for variant in VARIANTS:
                if not options.wants(variant.label):
                    continue
                # One variant is enough to warm up.
                found = measure(database, redis, variant, max(int(size * variant.share), 1_000))
                if number == 0:
                    break
                table.add(variant.label, **found)
    return [table]
