"""An EventBridge that accepts every entry after a fixed time: python3 stub.py MILLISECONDS

Prints its URL. For each line of standard input it prints, as JSON, the counts since the last line: requests, entries, events
read in them, and events that came before an earlier one of their key. It exits at the end of standard input.
"""
import asyncio
import json
import re
import sys

from sinks import Arrivals

ENTRY = b'"DetailType":'  # unescaped only outside of Detail, so it occurs once an entry
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-amz-json-1.1\r\ncontent-length: %d\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Counts:
    def __init__(self):
        self.clear()

    def clear(self):
        self.requests, self.entries, self.arrivals = 0, 0, Arrivals()

    def summary(self):
        return {"requests": self.requests, "entries": self.entries, "read": self.arrivals.count, "disorder": self.arrivals.disorder}


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, for a client that waits for each answer before its next request."""

    def __init__(self, counts, delay):
        self.counts, self.delay, self.buffer = counts, delay, bytearray()

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        head = bytes(self.buffer[:end])
        length = LENGTH.search(head)
        if len(self.buffer) < end + int(length[1]):
            return
        body = bytes(self.buffer[end:])
        self.buffer.clear()
        if b"AWSEvents.PutEvents" not in head:
            self.answer('{"Name":"bench","Arn":"arn:aws:events:eu-west-1:123456789012:event-bus/bench"}')
            return
        counts, entries = self.counts, body.count(ENTRY)
        ids = ",".join([f'{{"EventId":"stub-{counts.entries + index}"}}' for index in range(entries)])
        counts.requests += 1
        counts.entries += entries
        counts.arrivals.feed(body)
        asyncio.get_running_loop().call_later(self.delay, self.answer, f'{{"FailedEntryCount":0,"Entries":[{ids}]}}')

    def answer(self, document):
        body = document.encode()
        if not self.transport.is_closing():
            self.transport.write(HEAD % len(body) + body)


async def main():
    loop, counts, delay = asyncio.get_running_loop(), Counts(), float(sys.argv[1]) / 1000
    server = await loop.create_server(lambda: Connection(counts, delay), "127.0.0.1", 0, backlog=512)
    print("http://127.0.0.1:%d" % server.sockets[0].getsockname()[1], flush=True)
    asked = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), sys.stdin)
    while await asked.readline():
        print(json.dumps(counts.summary()), flush=True)
        counts.clear()


if __name__ == "__main__":
    asyncio.run(main())
