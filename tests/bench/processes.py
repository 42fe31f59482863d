"""Running relays, and what processes cost: time on the CPU and memory."""
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
    """Of a process and all below it, those that have ended included."""
    total = 0
    for one in [pid, *descendants(pid)]:
        with contextlib.suppress(OSError), open(f"/proc/{one}/stat") as stat:
            # utime, stime, and of children that were waited for cutime and cstime. The name may hold spaces.
            total += sum(map(int, stat.read().rpartition(")")[2].split()[11:15]))
    return total / TICKS


def mebibytes(pid, field="VmHWM"):
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/status") as status:
        return int(status.read().split(f"{field}:")[1].split()[0]) / 1024
    return 0.0


class Relay:
    """A relay, with the defaults in force but for `environment`."""

    def __init__(self, database, environment, *arguments, stdout=None, stderr=None):
        environment = {**ENVIRONMENT, "RELAY_LOG": "warn", "DATABASE_URL": database.url, **environment}
        self.begun = time.monotonic()
        self.process = subprocess.Popen([RELAY, *arguments], env=environment, stdout=stdout, stderr=stderr)
        self.pid = self.process.pid
        # Sampled, for rusage would count what this program had at the fork.
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
