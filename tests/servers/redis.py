"""Redis: alone, as a cluster, and behind Sentinels."""

import shutil
import socket
import ssl
import tempfile
from pathlib import Path
from urllib.parse import quote

from server import Failure, START_TIMEOUT, Server, free_port, make_certificates, wait_until


class Redis(Server):
    def __init__(self, options, folder=None, own=()):
        """`own` has the settings of a node of a group."""
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
        """Returns the answer to a command: text, a number, None, a list of those, or a Failure."""
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
    """The fields of `INFO` or `CLUSTER INFO`."""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


class Group:
    """Several Redis servers that belong together. A subclass defines the nodes and how they are joined."""

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
                node.kill()  # its data are not needed
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
    """The settings of every master with replicas, and of every replica."""
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
                "cluster-port": free_port(),  # the default, 10000 above the other, is in the range of outgoing connections
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
            # It must know its master first.
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
