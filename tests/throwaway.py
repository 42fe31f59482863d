"""Shared by demonstrations and benchmarks: throwaway servers of tests/servers, psql and redis-cli, and the built relay."""
import glob
import json
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RELAY = os.environ.get("BENCH_RELAY") or os.path.join(ROOT, "target", "release", "relay")


def psql_path():
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/psql"), key=lambda path: int(path.split("/")[4]))
    path = found[-1] if found else shutil.which("psql")
    return path or sys.exit("psql is missing: run tests/setup")


class Server:
    """A throwaway server that runs during a `with` statement."""

    def __init__(self, kind, *options):
        self.kind, self.options = kind, options

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, os.path.join(ROOT, "tests", "servers"), self.kind, *self.options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"no {self.kind}: run tests/setup")
        self.__dict__.update(json.loads(line))
        return self

    def __exit__(self, *_):
        self.process.stdin.close()  # the supervisor stops the server and removes its folder
        self.process.wait()

    def psql_process(self, statement, *options):
        return subprocess.Popen([psql_path(), self.url, "-qX", "-v", "ON_ERROR_STOP=1", *options, "-c", statement])


def psql(database, statement, *options):
    """Returns the statement's unaligned output. Fails if psql fails."""
    command = [psql_path(), database.url, "-qX", "-v", "ON_ERROR_STOP=1", *(options or ["-At"]), "-c", statement]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def redis_cli(redis, *arguments):
    command = ["redis-cli", "-p", str(redis.port), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
