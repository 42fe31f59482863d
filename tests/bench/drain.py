#!/usr/bin/env python3
"""How fast a backlog drains from PostgreSQL into a Redis Stream, the processing log written: events/s and peak memory.

Beside it, in the same run, the floor: the same reads, deletes and log inserts done by as many server-side SQL loops as the
relay has lanes, with no relay and no Redis. Their ratio holds where the machine is noisy; the times alone do not.
Usage: python3 tests/bench/drain.py [--events 200000] [--runs 3] [--payload 200] [--keys 10000]
"""
import argparse
import os
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from throwaway import RELAY, Server, psql, redis_cli  # noqa: E402

LANES = 3

FLOOR = """
do $$
declare
    batch bigint[]; p smallint;
begin
    for p in select distinct partition from event_outbox where partition %% {lanes} = {lane} loop
        loop
            select array_agg(id) into batch from (
                select id, payload::text from event_outbox where partition = p order by id limit 1000) b;
            exit when batch is null;
            with gone as (
                delete from event_outbox o using unnest(batch) r(id)
                where o.partition = p and o.id = r.id and o.destination = ''
                returning o.event_id, o.id, o.event_type)
            insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, message_id,
                duration_ms, worker, processed_at)
            select event_id, id, event_type, 'redis', 'published', 1, '1700000000000-0', 1, 'floor', now() from gone;
            commit;
        end loop;
    end loop;
end $$""".replace("%%", "%")


def fill(database, options):
    psql(database, f"""
        insert into event_outbox (event_type, aggregate_type, aggregate_id, payload)
        select 'order.created', 'order', (i % {options.keys})::text,
               jsonb_build_object('n', i, 'pad', repeat('x', {max(options.payload - 30, 0)}))
        from generate_series(1, {options.events}) i""")
    psql(database, "vacuum analyze event_outbox")
    psql(database, "checkpoint")


def drain(database, redis, options):
    environment = {**os.environ, "DATABASE_URL": database.url, "REDIS_URL": redis.url, "RELAY_LOG": "warn", "RELAY_LANES": str(LANES)}
    begun = time.monotonic()
    relay = subprocess.Popen([RELAY, "--once"], env=environment)
    _, status, usage = os.wait4(relay.pid, 0)
    seconds = time.monotonic() - begun
    if status != 0:
        sys.exit(f"relay --once failed with status {status}")
    return seconds, usage.ru_maxrss / 1024


def floor(database):
    begun = time.monotonic()
    loops = [database.psql_process(FLOOR.format(lanes=LANES, lane=lane)) for lane in range(LANES)]
    if any(loop.wait() for loop in loops):
        sys.exit("a loop of the floor failed")
    return time.monotonic() - begun


def check(database, redis, options):
    """What arrived is what was emitted, once, in order per key."""
    left = int(psql(database, "select count(*) from event_outbox"))
    logged = int(psql(database, "select count(*) from event_processing_log where status = 'published' and worker <> 'floor'"))
    length = int(redis_cli(redis, "xlen", "events"))
    disorder = redis_cli(redis, "eval", """
        local last, start, wrong = {}, '-', 0
        while true do
          local entries = redis.call('xrange', 'events', start, '+', 'count', 1000)
          if #entries == 0 then return wrong end
          for _, entry in ipairs(entries) do
            local field = {}
            for i = 1, #entry[2], 2 do field[entry[2][i]] = entry[2][i + 1] end
            local key, sequence = field.partitionkey, tonumber(field.sequence)
            if last[key] and last[key] >= sequence then wrong = wrong + 1 end
            last[key] = sequence
          end
          start = '(' .. entries[#entries][1]
        end""", "0")
    if (left, logged, length, int(disorder)) != (0, options.events, options.events, 0):
        sys.exit(f"wrong result: {left} left, {logged} logged, {length} in the stream, {disorder} out of order")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--payload", type=int, default=200, help="bytes")
    parser.add_argument("--keys", type=int, default=10_000)
    options = parser.parse_args()
    rates, floors, memory = [], [], []
    with Server("postgres") as database, Server("redis") as redis:
        subprocess.run([RELAY, "migrate"], env={**os.environ, "DATABASE_URL": database.url}, check=True, stdout=subprocess.DEVNULL)
        for run in range(options.runs + 1):
            redis_cli(redis, "flushall")
            psql(database, "truncate event_outbox, event_processing_log")
            fill(database, options)
            seconds, megabytes = drain(database, redis, options)
            check(database, redis, options)
            fill(database, options)
            least = floor(database)
            if run == 0:
                continue  # a warm-up
            rates.append(options.events / seconds)
            floors.append(options.events / least)
            memory.append(megabytes)
            print(f"run {run}: {rates[-1]:8,.0f} events/s   floor {floors[-1]:8,.0f}   ratio {rates[-1] / floors[-1]:.2f}   {megabytes:.0f} MiB")
    ratios = [rate / least for rate, least in zip(rates, floors)]
    print(f"median: {statistics.median(rates):,.0f} events/s ({min(rates):,.0f} to {max(rates):,.0f}), "
          f"{statistics.median(ratios):.2f} of the floor, at most {max(memory):.0f} MiB")


if __name__ == "__main__":
    main()
