"""One throwaway server, or a group of them, supervised through standard input.

    python3 tests/servers postgres|redis|redis-cluster|redis-sentinel|pgbouncer|moto
        [--set NAME=VALUE]... [--fast] [--tls] [--bin DIRECTORY] [--server URL]

(without --bin, POSTGRES_BIN and REDIS_BIN name the folder of the programs)
starts the server on a free port of 127.0.0.1 in a new temporary folder and prints one line of JSON when it is ready:
{"kind", "pid", "host", "port", "ports", "url", "dir", "log", "bin"} ("bin" is the folder of its programs; "ports" has
one port for each node of a group). With --tls also "ca", who signed its certificate, and "other_ca", who did not.

- redis-cluster: nodes 0 to 2 are masters, each with a third of the slots, and 3 to 5 their replicas
- redis-sentinel: node 0 is the master that the Sentinels call "main", 1 and 2 are its replicas, 3 to 5 the Sentinels
- pgbouncer: in transaction mode before the PostgreSQL of --server, with two connections to it

Then every line of standard input is a command, answered by one line, {"ok": true, "pid": 1} or {"ok": false, "error": "..."}:

    stop      ends it in good order; its data and its port are kept
    kill      SIGKILL for all its processes
    start     starts it again, on the same port and data
    restart   stop, start
    pause     SIGSTOP for all its processes: connections stay open, nothing answers
    resume    SIGCONT
    quit      ends the server and this program

In a group each of them but `quit` is for all nodes, or with a number behind it (`kill 0`) for that one.

At the end of standard input, on SIGINT, SIGTERM and SIGHUP: as `quit`. So the server goes when its user goes, however
that one ends. Only the standard library, Python 3.9 or newer.
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
    """Returns at `quit` or at the end of standard input; whether it was `quit`."""
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
    # So that the children of a killed server come to this process, which waits for them; else they would depend on
    # process 1, which in many a container lets zombies lie.
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = KINDS[options.kind](options)
    try:
        server.start_first()
        say(server.info())
        asked = obey(server)
    finally:
        # A second signal must not end the ending.
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
        # Nobody is left to talk to; without this, Python would complain once more while it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
