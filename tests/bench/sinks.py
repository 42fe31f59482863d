"""Destinations of drains. Each counts the events that arrive, and those that arrive before an earlier event of their key."""
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time

from common import expect, redis_cli
from resp import Client

# In a CloudEvent, which may be a string in another document. It begins with letters, because a search finds these fast.
MARK = re.compile(rb'sequence\\?":\\?"(\d+)\\?",\\?"partitionkey\\?":\\?"([^"\\]*)')
LONGEST_MARK = 500


class Arrivals:
    """Counts events in order of arrival. The sequences of a key must ascend, so no event is counted twice."""

    def __init__(self):
        self.count, self.disorder, self.last, self.rest = 0, 0, {}, b""

    def feed(self, data):
        data, end = self.rest + data, 0
        for match in MARK.finditer(data, 0, len(data)):
            if match.end() == len(data):
                break  # the key may continue in the next piece
            end = match.end()
            sequence, key = int(match[1]), match[2]
            self.count += 1
            self.disorder += self.last.get(key, 0) >= sequence
            self.last[key] = sequence
        self.rest = data[max(end, len(data) - LONGEST_MARK):]


class Stream:
    """A Redis Stream, which a script in Redis reads after the drain."""

    ORDER = """
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
        end"""

    def __init__(self, redis):
        self.redis, self.environment, self.stdout = redis, {"REDIS_URL": redis.url}, None

    def clear(self):
        redis_cli(self.redis, "flushall")

    def check(self, what, events):
        found = int(redis_cli(self.redis, "xlen", "events")), int(redis_cli(self.redis, "eval", self.ORDER, "0"))
        expect(what, arrived=(found[0], events), disorder=(found[1], 0))

    def close(self):
        self.clear()


class PubSub:
    """A Redis channel with one subscriber."""

    def __init__(self, redis):
        self.redis, self.stdout = redis, None
        self.environment = {"REDIS_URL": redis.url, "RELAY_REDIS_MODE": "pubsub"}
        # By default Redis cuts off a subscriber that falls behind for a moment.
        redis_cli(redis, "config", "set", "client-output-buffer-limit", "pubsub 0 0 0")
        self.arrivals = Arrivals()
        self.client = Client(redis)
        self.client.ask("subscribe", "order.created")
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while data := self.client.socket.recv(1 << 20):
            self.arrivals.feed(data)

    def clear(self):
        redis_cli(self.redis, "flushall")
        self.arrivals = Arrivals()

    def check(self, what, events):
        deadline = time.monotonic() + 30
        while self.arrivals.count < events and time.monotonic() < deadline:
            time.sleep(0.01)
        expect(what, arrived=(self.arrivals.count, events), disorder=(self.arrivals.disorder, 0))

    def close(self):
        self.client.socket.shutdown(2)
        redis_cli(self.redis, "flushall")


class EventBridge:
    """The stub, in a process of its own. It answers after `delay` milliseconds."""

    def __init__(self, delay):
        stub = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stub.py")
        self.process = subprocess.Popen([sys.executable, stub, str(delay)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.stdout = None
        self.environment = {
            "AWS_ENDPOINT_URL": self.process.stdout.readline().strip(), "AWS_EVENTBRIDGE_BUS_NAME": "bench",
            "AWS_REGION": "eu-west-1", "AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench",
        }

    def clear(self):
        """Returns the counts of what arrived since the last call."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def check(self, what, events):
        found = self.clear()
        expect(what, arrived=(found["entries"], events), disorder=(found["disorder"], 0), read=(found["read"], events))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Stdout:
    """Lines in a file."""

    def __init__(self):
        self.environment, self.stdout = {"RELAY_STDOUT": "true"}, tempfile.TemporaryFile()

    def clear(self):
        self.stdout.seek(0)
        self.stdout.truncate()

    def check(self, what, events):
        arrivals, lines = Arrivals(), 0
        self.stdout.seek(0)
        while data := self.stdout.read(1 << 20):
            arrivals.feed(data)
            lines += data.count(b"\n")
        expect(what, lines=(lines, events), arrived=(arrivals.count, events), disorder=(arrivals.disorder, 0))

    def close(self):
        self.stdout.close()
