"""One throwaway server, or a group of them, supervised through standard input.

    python3 tests/servers postgres|redis|redis-cluster|redis-sentinel|pgbouncer|moto
        [--set NAME=VALUE]... [--fast] [--tls] [--bin DIRECTORY] [--server URL]

(without --bin, POSTGRES_BIN and REDIS_BIN name the folder of the programs)
starts the server on a free port of 127.0.0.1 in a new temporary folder and prints one line of JSON when it is ready:
{"kind", "pid", "host", "port", "ports", "url", "dir", "log", "bin"} ("bin" is the folder of its programs; "ports" has
one port for each node of a group). With --tls also "ca", the authority that signed its certificate, and "other_ca", another
authority.

- redis-cluster: nodes 0 to 2 are masters, each with a third of the slots, and 3 to 5 their replicas
- redis-sentinel: node 0 is the master that the Sentinels call "main", 1 and 2 are its replicas, 3 to 5 the Sentinels
- pgbouncer: in transaction mode before the PostgreSQL of --server, with two connections to it

Then every line of standard input is a command, answered by one line, {"ok": true, "pid": 1} or {"ok": false, "error": "..."}:

    stop      stops it in an orderly way; its data and its port are kept
    kill      SIGKILL for all its processes
    start     starts it again, on the same port and data
    restart   stop, start
    pause     SIGSTOP for all its processes: connections stay open, and nothing answers
    resume    SIGCONT
    quit      ends the server and this program

In a group each command except `quit` is for all nodes, or with a number (`kill 0`) for one node.

The end of standard input, SIGINT, SIGTERM and SIGHUP do the same as `quit`. So the server ends when the program that started it
ends in any way. It needs only the standard library of Python 3.9 or newer.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from moto_server import Moto
from postgres import PgBouncer, Postgres
from redis import Redis, RedisCluster, RedisSentinel
from server import Failure, PR_SET_CHILD_SUBREAPER, prctl

KINDS = {
    "postgres": Postgres,
    "redis": Redis,
    "redis-cluster": RedisCluster,
    "redis-sentinel": RedisSentinel,
    "pgbouncer": PgBouncer,
    "moto": Moto,
}
COMMANDS = ["stop", "kill", "start", "restart", "pause", "resume"]


def setting(text):
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    return name, value


def parse(arguments):
    parser = argparse.ArgumentParser(prog="tests/servers", description="One throwaway server, supervised through standard input.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the server's own")
    parser.add_argument("--fast", action="store_true", help="postgres: no fsync; survives `kill`, not a power cut")
    parser.add_argument("--tls", action="store_true", help="postgres, redis...: with certificates made for it")
    parser.add_argument("--bin", type=Path, help="postgres, redis...: the folder with another version's programs")
    parser.add_argument("--server", metavar="URL", help="pgbouncer: the PostgreSQL behind it")
    parser.add_argument("--standby-of", metavar="URL", help="postgres: a hot standby that streams from the server at this URL")
    options = parser.parse_args(arguments)
    if (options.server is not None) != (options.kind == "pgbouncer"):
        parser.error("--server goes with pgbouncer, and pgbouncer with --server")
    if options.tls and options.kind in ["pgbouncer", "moto"]:
        parser.error(f"--tls is not for {options.kind}")
    named = os.environ.get("POSTGRES_BIN" if options.kind == "postgres" else "REDIS_BIN")
    if options.bin is None and named and options.kind not in ["pgbouncer", "moto"]:
        options.bin = Path(named).resolve()
    if options.fast and options.kind != "postgres":
        parser.error(f"--fast is for postgres only, not for {options.kind}")
    if options.standby_of and options.kind != "postgres":
        parser.error(f"--standby-of is for postgres only, not for {options.kind}")
    if (options.set or options.bin) and options.kind == "moto":
        parser.error("moto takes neither --set nor --bin")
    return options


def say(answer):
    print(json.dumps(answer), flush=True)


def end_on_signal(number, _frame):
    raise SystemExit(128 + number)


def obey(server):
    """Runs commands until `quit` or the end of standard input. Returns whether it was `quit`."""
    for line in sys.stdin:
        command, _, node = line.strip().partition(" ")
        if command == "quit":
            return True
        try:
            if command not in COMMANDS:
                raise Failure(f"unknown command '{command}': there are {', '.join(COMMANDS)} and quit")
            for chosen in server.choose(node or None):
                getattr(chosen, command)()
            say({"ok": True, "pid": server.process.pid})
        except Failure as failure:
            say({"ok": False, "error": str(failure)})
    return False


def main():
    options = parse(sys.argv[1:])
    ending = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    for number in ending:
        signal.signal(number, end_on_signal)
    # The children of a killed server become children of this process, which waits for them. Otherwise they would belong to
    # process 1, which in many containers does not reap zombies.
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = KINDS[options.kind](options)
    try:
        server.start_first()
        say(server.info())
        asked = obey(server)
    finally:
        # A second signal must not interrupt the stop.
        for number in ending:
            signal.signal(number, signal.SIG_IGN)
        server.close()
    if asked:
        say({"ok": True})


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"tests/servers: {failure}")
    except BrokenPipeError:
        # Nobody reads standard output any more. Without this, Python would print an error when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
