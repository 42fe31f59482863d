"""The lowest cost of a drain for the database: the relay's reads, deletes and log inserts, run by SQL loops in the server.

There is no relay and no destination. On a noisy machine a relay's ratio to this cost is still valid, the times alone are not.
"""
import sys
import time

LOOP = """
do $$
declare
    batch bigint[]; bytes bigint; p smallint;
begin
    for p in select distinct partition from event_outbox where partition % {loops} = {number} loop
        loop
            -- The sum is there so that payloads are read.
            select array_agg(id), sum(octet_length(payload)) into batch, bytes from (
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
end $$"""


def seconds(database, loops):
    begun = time.monotonic()
    processes = [database.psql_process(LOOP.format(loops=loops, number=number)) for number in range(loops)]
    if any([process.wait() for process in processes]):
        sys.exit("a loop of the floor failed")
    return time.monotonic() - begun
