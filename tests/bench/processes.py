"""Runs relays, and measures the CPU time and memory of processes."""
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

from common import ENVIRONMENT, RELAY
from servers.server import descendants

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    """The CPU seconds of a process and its descendants, with those that have ended."""
    while True:
        ended = sum(ticks(pid)[2:])
        total = sum(sum(ticks(one)) for one in [pid, *descendants(pid)])
        # When a child ends, its time moves to its parent, which may just have been read.
        if sum(ticks(pid)[2:]) == ended:
            return total / TICKS


def ticks(pid):
    """utime and stime; and cutime and cstime, which are of children that were waited for."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        # The name, in parentheses, may hold spaces.
        return list(map(int, stat.read().rpartition(")")[2].split()[11:15]))
    return [0] * 4


def mebibytes(pid, field="VmHWM"):
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/status") as status:
        return int(status.read().split(f"{field}:")[1].split()[0]) / 1024
    return 0.0


class Relay:
    """A running relay, with default settings except for `environment`."""

    def __init__(self, database, environment, *arguments, stdout=None, stderr=None):
        environment = {**ENVIRONMENT, "RELAY_LOG": "warn", "DATABASE_URL": database.url, **environment}
        self.begun = time.monotonic()
        self.process = subprocess.Popen([RELAY, *arguments], env=environment, stdout=stdout, stderr=stderr)
        self.pid = self.process.pid
        # The peak is sampled: rusage would count this program's memory at the fork.
        self.peak = 0.0
        self.ended = threading.Event()
        threading.Thread(target=self.sample, daemon=True).start()

    def sample(self):
        while not self.ended.wait(0.02):
            self.peak = max(self.peak, mebibytes(self.pid))

    def wait(self):
        _, status, usage = os.wait4(self.pid, 0)
        self.seconds = time.monotonic() - self.begun
        self.cpu = usage.ru_utime + usage.ru_stime
        self.ended.set()
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode != 0:
            sys.exit(f"a relay ended with {self.process.returncode}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.ended.is_set():
            self.process.send_signal(signal.SIGTERM)
            self.wait()
