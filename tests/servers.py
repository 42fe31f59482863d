#!/usr/bin/env python3
"""One throwaway server, supervised through standard input.

    python3 tests/servers.py postgres|redis|moto [--set NAME=VALUE]... [--fast] [--bin DIRECTORY]

starts the server on a free port of 127.0.0.1 in a new temporary folder and prints one line of JSON when it is ready:
{"kind", "pid", "host", "port", "url", "dir", "log", "bin"} ("bin" is the folder of its programs).
Then every line of standard input is a command, answered by one line, {"ok": true, "pid": 1} or {"ok": false, "error": "..."}:

    stop      ends it in good order; its data and its port are kept
    kill      SIGKILL for all its processes
    start     starts it again, on the same port and data
    restart   stop, start
    pause     SIGSTOP for all its processes: connections stay open, nothing answers
    resume    SIGCONT
    quit      ends the server and this program

At the end of standard input, on SIGINT, SIGTERM and SIGHUP: as `quit`. So the server goes when its user goes, however
that one ends. Only the standard library, Python 3.9 or newer.
"""

import argparse
import ctypes
import json
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

REPOSITORY = Path(__file__).resolve().parent.parent
START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Failure(Exception):
    """What is wrong and what to do about it, for people."""


def free_port():
    # Below the range of outgoing connections: a port of that range could be handed out while the server is stopped,
    # even to a client that dials the stopped server and then finds itself connected to itself.
    for _ in range(200):
        port = random.randrange(20000, 32768)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise Failure("no free port between 20000 and 32767 on 127.0.0.1")


def descendants(pid):
    """Process ids below `pid`, parents first."""
    children = {}
    if os.path.isdir("/proc/self"):
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    stat = Path("/proc", entry, "stat").read_text(errors="replace")
                except OSError:
                    continue  # it has just ended
                # The name, in parentheses, may itself hold spaces and parentheses.
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    else:
        for line in subprocess.check_output(["ps", "-axo", "pid=,ppid="], text=True).splitlines():
            child, parent = map(int, line.split())
            children.setdefault(parent, []).append(child)
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def prctl(*arguments):
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(*map(int, arguments), *[0] * (5 - len(arguments)))


def has_ended(pid):
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def send(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class Server:
    """What the three kinds have in common. A kind says how it is prepared, started, and known to be ready."""

    stop_signal = signal.SIGTERM
    # To the server when this supervisor itself is killed and can no longer do it.
    orphan_signal = signal.SIGKILL
    account = None

    def __init__(self, options):
        self.options = options
        self.dir = Path(tempfile.mkdtemp(prefix=f"outbox-relay-{options.kind}-"))
        self.log = self.dir / "log"
        self.log.touch()
        self.port = None
        self.process = None
        self.paused = False
        self.log_start = 0

    def prepare(self):
        pass

    def command(self):
        raise NotImplementedError

    def is_ready(self):
        raise NotImplementedError

    def url(self):
        raise NotImplementedError

    def environment(self):
        # Messages are matched below, so they must be English.
        return {**os.environ, "LC_ALL": "C"}

    def run_as(self):
        if self.account is None:
            return {}
        return {"user": self.account.pw_uid, "group": self.account.pw_gid, "extra_groups": []}

    def new_log(self):
        with open(self.log, "rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace")

    def is_running(self):
        return self.process is not None and self.process.poll() is None

    def launch(self):
        """Whether it came up; False where another program has the port."""
        self.log_start = self.log.stat().st_size
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in self.command()],
                cwd=self.dir,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A ctrl-C at the terminal is for this supervisor, which then ends the server in good order.
                start_new_session=True,
                preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, self.orphan_signal),
                **self.run_as(),
            )
        up = wait_until(lambda: not self.is_running() or self.is_ready(), START_TIMEOUT)
        if self.is_running() and up:
            return True
        log = self.new_log()
        if self.is_running():
            self.kill()
            raise Failure(f"{self.options.kind} was not ready after {START_TIMEOUT:.0f} s; its log ends:\n{log[-3000:]}")
        if "already in use" in log.lower():
            return False
        raise Failure(
            f"{self.options.kind} ended at once with code {self.process.returncode}; its log ends:\n{log[-3000:]}"
        )

    def start_first(self):
        self.prepare()
        for _ in range(20):
            self.port = free_port()
            if self.launch():
                return
        raise Failure(f"{self.options.kind} found its port taken 20 times in a row, each time another one")

    def start(self):
        if self.is_running():
            raise Failure(f"{self.options.kind} is running already")
        self.paused = False
        if not wait_until(self.launch, 5):
            raise Failure(f"port {self.port} was taken by another program while {self.options.kind} was stopped")

    def stop(self):
        if not self.is_running():
            raise Failure(f"{self.options.kind} is not running")
        if self.paused:
            self.resume()
        send(self.process.pid, self.stop_signal)
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failure(
                f"{self.options.kind} did not stop within {STOP_TIMEOUT:.0f} s and was killed; "
                f"its log ends:\n{self.new_log()[-3000:]}"
            ) from None

    def freeze(self):
        """Stops every process of the server, and returns their ids, parents first."""
        frozen = []
        # Until none is new: one that was not stopped yet may have forked meanwhile.
        while True:
            new = [pid for pid in [self.process.pid, *descendants(self.process.pid)] if pid not in frozen]
            if not new:
                return frozen
            for pid in new:
                send(pid, signal.SIGSTOP)
            frozen += new

    def kill(self):
        if not self.is_running():
            raise Failure(f"{self.options.kind} is not running")
        # Frozen first: the children of a dead postmaster would be looked for in vain.
        pids = self.freeze()
        for pid in pids:
            send(pid, signal.SIGKILL)
        self.process.wait()
        # The next start would find their shared memory in use.
        for pid in pids[1:]:
            wait_until(lambda: has_ended(pid), 10)

    def pause(self):
        if not self.is_running():
            raise Failure(f"{self.options.kind} is not running")
        self.freeze()
        self.paused = True

    def resume(self):
        if not self.is_running():
            raise Failure(f"{self.options.kind} is not running")
        for pid in [*descendants(self.process.pid), self.process.pid]:
            send(pid, signal.SIGCONT)
        self.paused = False

    def restart(self):
        self.stop()
        self.start()

    def close(self):
        try:
            if self.is_running():
                self.stop()
        finally:
            wait_until(self.remove_dir, 5)

    def remove_dir(self):
        # More than once: a child of an interrupted initdb may write for a moment longer.
        shutil.rmtree(self.dir, ignore_errors=True)
        return not self.dir.exists()

    def info(self):
        return {
            "kind": self.options.kind,
            "pid": self.process.pid,
            "host": "127.0.0.1",
            "port": self.port,
            "url": self.url(),
            "dir": str(self.dir),
            "log": str(self.log),
            "bin": str(self.bin),
        }


class Postgres(Server):
    stop_signal = signal.SIGINT  # "fast": connections are closed, nothing is lost
    orphan_signal = signal.SIGQUIT  # "immediate": it takes its children with it

    def prepare(self):
        self.bin = self.find_bin()
        self.data = self.dir / "data"
        self.password = secrets.token_hex(12)
        if os.getuid() == 0:
            self.drop_root()

        password_file = self.dir / "password"
        password_file.write_text(self.password)
        if self.account is not None:
            for path in [self.dir, self.log, password_file]:
                os.chown(path, self.account.pw_uid, self.account.pw_gid)
        made = subprocess.run(
            # Without --no-sync, two thirds of the time would go into syncing files that are thrown away anyway.
            [str(self.bin / "initdb"), "-D", str(self.data), "-U", "postgres", f"--pwfile={password_file}"]
            + ["--auth-host=scram-sha-256", "--auth-local=trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"],
            cwd=self.dir,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **self.run_as(),
        )
        password_file.unlink()
        if made.returncode != 0:
            raise Failure(f"{self.bin / 'initdb'} failed:\n{made.stdout[-3000:]}")

        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.dir),
            "max_connections": "200",
            # In the data directory, so that a killed server leaves nothing in /dev/shm.
            "dynamic_shared_memory_type": "mmap",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        if self.options.fast:
            settings.update(fsync="off", full_page_writes="off")
        settings.update(dict(self.options.set))
        # Into the file, not onto the command line, so that a test can still `alter system set`.
        with open(self.data / "postgresql.conf", "a") as conf:
            for name, value in settings.items():
                quoted = value.replace("'", "''")
                conf.write(f"{name} = '{quoted}'\n")

    def find_bin(self):
        if self.options.bin:
            if not (self.options.bin / "initdb").exists():
                raise Failure(f"--bin {self.options.bin}: there is no initdb in it")
            return self.options.bin.resolve()
        on_path = shutil.which("initdb")
        if on_path:
            return Path(on_path).resolve().parent
        by_version = {}
        for initdb in Path("/usr/lib/postgresql").glob("*/bin/initdb"):
            version = initdb.parent.parent.name
            by_version[float(version) if version.replace(".", "").isdigit() else 0.0] = initdb.parent
        if not by_version:
            raise Failure("PostgreSQL is not installed (no initdb on the PATH or in /usr/lib/postgresql): run tests/setup")
        return by_version[max(by_version)]

    def drop_root(self):
        # PostgreSQL refuses to run as root.
        for name in ["postgres", "nobody"]:
            try:
                self.account = pwd.getpwnam(name)
                break
            except KeyError:
                continue
        else:
            raise Failure("PostgreSQL cannot run as root, and there is no user `postgres` or `nobody` to run it as")
        for folder in [*self.dir.parents, *self.bin.parents]:
            if not folder.stat().st_mode & 0o001:
                raise Failure(
                    f"user `{self.account.pw_name}`, as whom PostgreSQL runs, cannot pass through {folder}: "
                    f"run chmod o+x {folder}, or let TMPDIR name a folder that is open to all"
                )

    def environment(self):
        return {name: value for name, value in super().environment().items() if not name.startswith("PG")}

    def command(self):
        return [self.bin / "postgres", "-D", self.data, "-p", self.port]

    def is_ready(self):
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.process.pid) and lines[7].strip() == "ready"

    def remove_dir(self):
        # A killed server leaves one small System V segment, by which PostgreSQL keeps two servers off one data
        # directory; only its next start would free it.
        try:
            segment = (self.data / "postmaster.pid").read_text().splitlines()[6].split()[1]
            subprocess.run(["ipcrm", "-m", segment], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except (AttributeError, OSError, IndexError):
            pass
        return super().remove_dir()

    def url(self):
        return f"postgres://postgres:{self.password}@127.0.0.1:{self.port}/postgres"


class Redis(Server):
    def prepare(self):
        folder = self.options.bin
        self.program = shutil.which("redis-server", path=folder) or shutil.which("valkey-server", path=folder)
        if self.program is None and folder:
            raise Failure(f"--bin {folder}: there is no redis-server or valkey-server in it")
        if self.program is None:
            raise Failure("Redis is not installed (no redis-server on the PATH): run tests/setup")
        self.bin = Path(self.program).parent
        defaults = {"bind": "127.0.0.1", "daemonize": "no", "appendonly": "no", "save": '""'}
        given = {name for name, _ in self.options.set}
        settings = [pair for pair in defaults.items() if pair[0] not in given] + self.options.set
        self.config = self.dir / "redis.conf"
        self.config.write_text("".join(f"{name} {value}\n" for name, value in settings))

    def command(self):
        return [self.program, self.config, "--port", self.port]

    def is_ready(self):
        return "Ready to accept connections" in self.new_log()

    def url(self):
        password = dict(self.options.set).get("requirepass")
        return f"redis://{f':{quote(password)}@' if password else ''}127.0.0.1:{self.port}/0"


class Moto(Server):
    def prepare(self):
        self.python = REPOSITORY / "target" / "venv" / "bin" / "python"
        if not self.python.exists():
            raise Failure(f"moto is not installed (no {self.python}): run tests/setup")
        self.bin = self.python.parent

    def command(self):
        return [self.python, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", self.port]

    def is_ready(self):
        return "Running on http" in self.new_log()

    def url(self):
        return f"http://127.0.0.1:{self.port}"


KINDS = {"postgres": Postgres, "redis": Redis, "moto": Moto}
COMMANDS = ["stop", "kill", "start", "restart", "pause", "resume"]


def setting(text):
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    return name, value


def parse(arguments):
    parser = argparse.ArgumentParser(prog="servers.py", description="One throwaway server, supervised through standard input.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the server's own")
    parser.add_argument("--fast", action="store_true", help="postgres: no fsync; survives `kill`, not a power cut")
    parser.add_argument("--bin", type=Path, help="postgres, redis: the folder with another version's programs")
    options = parser.parse_args(arguments)
    if options.fast and options.kind != "postgres":
        parser.error(f"--fast is for postgres only, not for {options.kind}")
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
        command = line.strip()
        if command == "quit":
            return True
        try:
            if command not in COMMANDS:
                raise Failure(f"unknown command '{command}': there are {', '.join(COMMANDS)} and quit")
            getattr(server, command)()
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
        sys.exit(f"servers.py: {failure}")
    except BrokenPipeError:
        # Nobody is left to talk to; without this, Python would complain once more while it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
