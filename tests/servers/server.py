"""The base of all servers: a port, a folder, a process with its children, and certificates."""

import ctypes
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[2]
START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Failure(Exception):
    """An error whose message tells the user what is wrong and what to do."""


def free_port():
    # Below the range of outgoing connections: the system could give a port of that range away while the server is stopped,
    # even to a client that connects to the stopped server and then is connected to itself.
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
                # The name, in parentheses, may itself contain spaces and parentheses.
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
    """What all kinds share. A subclass defines how the server is prepared and started, and when it is ready."""

    stop_signal = signal.SIGTERM
    # The kernel sends it to the server when this supervisor is killed.
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
        # Messages must be in English, because they are matched below.
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
        """Starts the process. Returns whether it is ready; False if another program uses the port."""
        self.log_start = self.log.stat().st_size
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in self.command()],
                cwd=self.dir,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Only this supervisor gets a ctrl-C of the terminal. It then stops the server in an orderly way.
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
        # Repeats until no process is new, because one that was not stopped yet may have forked meanwhile.
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
        # The processes are frozen first, because the children of a postmaster that has ended cannot be found.
        pids = self.freeze()
        for pid in pids:
            send(pid, signal.SIGKILL)
        self.process.wait()
        # If they still ran, the next start would find their shared memory in use.
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
        # It may take several tries, because a child of an interrupted initdb may write for a moment longer.
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
