#!/usr/bin/env python3
"""One throwaway server, or a group of them, supervised through standard input.

    python3 tests/servers.py postgres|redis|redis-cluster|redis-sentinel|pgbouncer|moto
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
import ctypes
import json
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

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


def openssl(folder, *arguments):
    try:
        made = subprocess.run(["openssl", *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        raise Failure("openssl is not installed: run tests/setup") from None
    if made.returncode != 0:
        raise Failure(f"openssl {arguments[0]} failed:\n{made.stdout[-3000:]}")


def make_certificates(folder):
    """ca.pem, other-ca.pem, and server.pem with server.key, signed by the first."""
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    for name in ["ca", "other-ca"]:
        openssl(folder, *new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    signed = ["-subj", "/CN=localhost", "-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", "server.key", "-out", "server.pem"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
    openssl(folder, *new, *signed, *names)


class Server:
    """What the kinds have in common. A kind says how it is prepared, started, and known to be ready."""

    stop_signal = signal.SIGTERM
    # To the server when this supervisor itself is killed and can no longer do it.
    orphan_signal = signal.SIGKILL
    account = None

    def __init__(self, options, folder=None):
        self.options = options
        self.dir = folder or Path(tempfile.mkdtemp(prefix=f"outbox-relay-{options.kind}-"))
        self.dir.mkdir(exist_ok=True)
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

    def drop_root(self, name_of_program):
        """Chooses an account for a program that refuses to run as root."""
        for name in ["postgres", "nobody"]:
            try:
                self.account = pwd.getpwnam(name)
                break
            except KeyError:
                continue
        else:
            raise Failure(f"{name_of_program} cannot run as root, and there is no user `postgres` or `nobody` to run it as")
        for folder in [*self.dir.parents, *self.bin.parents]:
            if not folder.stat().st_mode & 0o001:
                raise Failure(
                    f"user `{self.account.pw_name}`, as whom {name_of_program} runs, cannot pass through {folder}: "
                    f"run chmod o+x {folder}, or let TMPDIR name a folder that is open to all"
                )

    def give(self, *paths):
        if self.account is not None:
            for path in paths:
                os.chown(path, self.account.pw_uid, self.account.pw_gid)

    def choose(self, node):
        if node is not None:
            raise Failure(f"{self.options.kind} has no nodes to choose from")
        return [self]

    def certificates(self):
        if not self.options.tls:
            return {}
        return {"ca": str(self.dir / "ca.pem"), "other_ca": str(self.dir / "other-ca.pem")}

    def info(self):
        return {
            "kind": self.options.kind,
            "pid": self.process.pid,
            "host": "127.0.0.1",
            "port": self.port,
            "ports": [self.port],
            **self.certificates(),
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
            self.drop_root("PostgreSQL")

        if self.options.standby_of:
            self.copy_primary()
        else:
            self.make_cluster()

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
        if self.options.tls:
            make_certificates(self.dir)
            self.give(self.dir / "server.key")
            settings.update(ssl="on", ssl_cert_file=str(self.dir / "server.pem"), ssl_key_file=str(self.dir / "server.key"))
        settings.update(dict(self.options.set))
        # Into the file, not onto the command line, so that a test can still `alter system set`.
        with open(self.data / "postgresql.conf", "a") as conf:
            for name, value in settings.items():
                quoted = value.replace("'", "''")
                conf.write(f"{name} = '{quoted}'\n")

    def make_cluster(self):
        password_file = self.dir / "password"
        password_file.write_text(self.password)
        self.give(self.dir, self.log, password_file)
        # Without --no-sync, two thirds of the time would go into syncing files that are thrown away anyway.
        arguments = ["-D", self.data, "-U", "postgres", f"--pwfile={password_file}", "--auth-host=scram-sha-256"]
        arguments += ["--auth-local=trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        self.run_program("initdb", *arguments)
        password_file.unlink()

    def copy_primary(self):
        """A hot standby that streams from a server that runs; its password is that one's."""
        self.password = urlsplit(self.options.standby_of).password
        self.give(self.dir, self.log)
        self.run_program(
            "pg_basebackup", "-D", self.data, "-d", self.options.standby_of, "-R", "-X", "stream", "-c", "fast", "--no-sync"
        )

    def run_program(self, name, *arguments):
        made = subprocess.run(
            [str(part) for part in [self.bin / name, *arguments]],
            cwd=self.dir,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **self.run_as(),
        )
        if made.returncode != 0:
            raise Failure(f"{self.bin / name} failed:\n{made.stdout[-3000:]}")

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

    def environment(self):
        return {name: value for name, value in super().environment().items() if not name.startswith("PG")}

    def command(self):
        return [self.bin / "postgres", "-D", self.data, "-p", self.port]

    def is_ready(self):
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.process.pid) and lines[7].strip() in ["ready", "standby"]

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
    def __init__(self, options, folder=None, own=()):
        """`own` are the settings of a node of a group."""
        super().__init__(options, folder)
        self.own = dict(own)
        self.given = dict(options.set)
        self.arguments = []

    def prepare(self):
        folder = self.options.bin
        self.program = shutil.which("redis-server", path=folder) or shutil.which("valkey-server", path=folder)
        if self.program is None and folder:
            raise Failure(f"--bin {folder}: there is no redis-server or valkey-server in it")
        if self.program is None:
            raise Failure("Redis is not installed (no redis-server on the PATH): run tests/setup")
        self.bin = Path(self.program).parent
        settings = {"bind": "127.0.0.1", "daemonize": "no", "appendonly": "no", "save": '""', **self.own, **self.given}
        if self.options.tls:
            if not (self.dir / "ca.pem").exists():
                make_certificates(self.dir)
            files = {"cert": "server.pem", "key": "server.key", "ca-cert": "ca.pem"}
            settings.update({f"tls-{setting}-file": self.dir / name for setting, name in files.items()})
            settings["tls-auth-clients"] = "no"
        self.config = self.dir / "redis.conf"
        self.config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))

    def command(self):
        port = ["--port", 0, "--tls-port", self.port] if self.options.tls else ["--port", self.port]
        return [self.program, self.config, *port, *self.arguments]

    def is_ready(self):
        return "Ready to accept connections" in self.new_log()

    def user(self):
        password = self.given.get("requirepass")
        return f":{quote(password)}@" if password else ""

    def url(self):
        scheme, host = ("rediss", "localhost") if self.options.tls else ("redis", "127.0.0.1")
        return f"{scheme}://{self.user()}{host}:{self.port}/0"

    def ask(self, *words):
        """Its answer to a command: text, a number, None, a list of those, or a Failure."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        if self.options.tls:
            context = ssl.create_default_context(cafile=self.dir / "ca.pem")
            connection = context.wrap_socket(connection, server_hostname="localhost")
        with connection, connection.makefile("rwb") as stream:
            password = self.given.get("requirepass")
            if password and "--sentinel" not in self.arguments:
                exchange(stream, "AUTH", password)
            return exchange(stream, *words)


def exchange(stream, *words):
    words = [str(word).encode() for word in words]
    stream.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words))
    stream.flush()
    return answer(stream)


def answer(stream):
    line = stream.readline().decode().rstrip("\r\n")
    kind, rest = line[:1], line[1:]
    if kind == "-":
        return Failure(rest)
    if kind == "+":
        return rest
    if kind == ":":
        return int(rest)
    if kind == "$":
        return None if rest == "-1" else stream.read(int(rest) + 2)[:-2].decode()
    if kind == "*":
        return [answer(stream) for _ in range(int(rest))]
    raise Failure(f"no answer of a Redis: {line!r}")


def fields(text):
    """Of `INFO` and `CLUSTER INFO`."""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


class Group:
    """Several Redis servers that belong together. A kind says which, and how they are joined."""

    def __init__(self, options):
        self.options = options
        self.dir = Path(tempfile.mkdtemp(prefix=f"outbox-relay-{options.kind}-"))
        if options.tls:
            make_certificates(self.dir)
        self.nodes = []

    def add(self, own=None, given=()):
        node = Redis(self.options, self.dir / f"node-{len(self.nodes)}", own or {})
        node.given.update(given)
        if self.options.tls:
            for name in ["ca.pem", "server.pem", "server.key"]:
                shutil.copy(self.dir / name, node.dir)
        self.nodes.append(node)
        return node

    def start_first(self):
        self.create()
        if not wait_until(self.is_joined, START_TIMEOUT):
            logs = "".join(f"\nnode {number}:\n{node.new_log()[-1000:]}" for number, node in enumerate(self.nodes))
            raise Failure(f"{self.options.kind} was not ready after {START_TIMEOUT:.0f} s; the logs of its nodes end:{logs}")

    def choose(self, node):
        if node is None:
            return self.nodes
        if not node.isdigit() or int(node) >= len(self.nodes):
            raise Failure(f"{self.options.kind} has nodes 0 to {len(self.nodes) - 1}, none is called {node!r}")
        return [self.nodes[int(node)]]

    @property
    def process(self):
        return self.nodes[0].process

    def close(self):
        for node in self.nodes:
            if node.is_running():
                node.kill()  # nobody needs its data
        shutil.rmtree(self.dir, ignore_errors=True)

    def authority(self, nodes):
        return self.nodes[0].user() + ",".join(f"127.0.0.1:{node.port}" for node in nodes)

    def info(self):
        first = self.nodes[0]
        return {
            **first.info(),
            "ports": [node.port for node in self.nodes],
            "url": self.url(),
            "dir": str(self.dir),
            **({"ca": str(self.dir / "ca.pem"), "other_ca": str(self.dir / "other-ca.pem")} if self.options.tls else {}),
        }


def replication(password, tls):
    """Settings of every server that has, or is, a replica."""
    settings = {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1", "repl-timeout": "10"}
    if password:
        settings["masterauth"] = password
    if tls:
        settings["tls-replication"] = "yes"
    return settings


def has_replicas(node, count):
    state = fields(node.ask("INFO", "replication"))
    online = sum("state=online" in state.get(f"slave{number}", "") for number in range(count))
    return state["role"] == "master" and online == count


class RedisCluster(Group):
    MASTERS = 3
    SLOTS = 16384

    def create(self):
        for _ in range(2 * self.MASTERS):
            own = {
                "cluster-enabled": "yes",
                "cluster-node-timeout": "1000",
                "cluster-port": free_port(),  # else 10000 above the other, where outgoing connections are
                **replication(dict(self.options.set).get("requirepass"), self.options.tls),
            }
            if self.options.tls:
                own["tls-cluster"] = "yes"
            self.add(own).start_first()
        masters, replicas = self.nodes[: self.MASTERS], self.nodes[self.MASTERS :]
        share = -(-self.SLOTS // self.MASTERS)
        for number, node in enumerate(masters):
            last = min((number + 1) * share, self.SLOTS) - 1
            self.tell(node, "CLUSTER", "ADDSLOTSRANGE", number * share, last)
        for number, node in enumerate(self.nodes):
            self.tell(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            first = self.nodes[0]
            if node is not first:
                self.tell(node, "CLUSTER", "MEET", "127.0.0.1", first.port, first.own["cluster-port"])
        for master, replica in zip(masters, replicas):
            name = master.ask("CLUSTER", "MYID")
            # It must have heard of its master first.
            wait_until(lambda: replica.ask("CLUSTER", "REPLICATE", name) == "OK", START_TIMEOUT)

    def tell(self, node, *words):
        told = node.ask(*words)
        if isinstance(told, Failure):
            raise Failure(f"{' '.join(map(str, words))}: {told}")

    def is_joined(self):
        for node in self.nodes:
            state = fields(node.ask("CLUSTER", "INFO"))
            if state["cluster_state"] != "ok" or state["cluster_known_nodes"] != str(len(self.nodes)):
                return False
        return all(has_replicas(node, 1) for node in self.nodes[: self.MASTERS])

    def url(self):
        scheme = "rediss-cluster" if self.options.tls else "redis-cluster"
        return f"{scheme}://{self.authority(self.nodes)}"


class RedisSentinel(Group):
    REPLICAS = 2
    SENTINELS = 3

    def create(self):
        password = dict(self.options.set).get("requirepass")
        settings = replication(password, self.options.tls)
        master = self.add(settings)
        master.start_first()
        for _ in range(self.REPLICAS):
            self.add({**settings, "replicaof": f"127.0.0.1 {master.port}"}).start_first()
        for _ in range(self.SENTINELS):
            sentinel = self.add()
            sentinel.given = {
                "sentinel monitor main": f"127.0.0.1 {master.port} {self.SENTINELS // 2 + 1}",
                "sentinel down-after-milliseconds main": "1000",
                "sentinel failover-timeout main": "5000",
                "sentinel parallel-syncs main": "2",
                **({"sentinel auth-pass main": password} if password else {}),
                **({"tls-replication": "yes"} if self.options.tls else {}),
            }
            sentinel.arguments = ["--sentinel"]
            sentinel.is_ready = lambda sentinel=sentinel: "+monitor master" in sentinel.new_log()
            sentinel.start_first()

    def is_joined(self):
        if not has_replicas(self.nodes[0], self.REPLICAS):
            return False
        for sentinel in self.nodes[1 + self.REPLICAS :]:
            told = sentinel.ask("SENTINEL", "MASTER", "main")
            state = dict(zip(told[::2], told[1::2]))
            known = (int(state["num-slaves"]), int(state["num-other-sentinels"]))
            if known != (self.REPLICAS, self.SENTINELS - 1) or state["flags"] != "master":
                return False
        return True

    def url(self):
        scheme = "rediss-sentinel" if self.options.tls else "redis-sentinel"
        return f"{scheme}://{self.authority(self.nodes[1 + self.REPLICAS :])}/0?master=main"


class PgBouncer(Server):
    stop_signal = signal.SIGINT  # lets transactions end first

    def prepare(self):
        self.program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
        if self.program is None:
            raise Failure("PgBouncer is not installed (no pgbouncer on the PATH or in /usr/sbin): run tests/setup")
        self.bin = Path(self.program).parent
        if os.getuid() == 0:
            self.drop_root("PgBouncer")
        self.server = urlsplit(self.options.server)
        self.config = self.dir / "pgbouncer.ini"

    def command(self):
        server = self.server
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": "2",
            "max_client_conn": "100",
            "ignore_startup_parameters": "extra_float_digits",
            **dict(self.options.set),
        }
        target = f"* = host={server.hostname} port={server.port} user={server.username} password={server.password}"
        lines = [f"{name} = {value}" for name, value in settings.items()]
        self.config.write_text("\n".join(["[databases]", target, "[pgbouncer]", *lines, ""]))
        self.give(self.dir, self.log, self.config)
        return [self.program, self.config]

    def is_ready(self):
        return "process up" in self.new_log()

    def url(self):
        return f"postgres://{self.server.username}@127.0.0.1:{self.port}{self.server.path}"


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
    parser = argparse.ArgumentParser(prog="servers.py", description="One throwaway server, supervised through standard input.")
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
        sys.exit(f"servers.py: {failure}")
    except BrokenPipeError:
        # Nobody is left to talk to; without this, Python would complain once more while it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
