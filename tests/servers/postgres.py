"""PostgreSQL, and PgBouncer before it."""

import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from server import Failure, Server, make_certificates


class Postgres(Server):
    stop_signal = signal.SIGINT  # "fast": connections are closed, nothing is lost
    orphan_signal = signal.SIGQUIT  # "immediate": its children end too

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
            # It is in the data directory, so that a killed server leaves nothing in /dev/shm.
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
        # In the file and not on the command line, so that `alter system set` still works.
        with open(self.data / "postgresql.conf", "a") as conf:
            for name, value in settings.items():
                quoted = value.replace("'", "''")
                conf.write(f"{name} = '{quoted}'\n")

    def make_cluster(self):
        password_file = self.dir / "password"
        password_file.write_text(self.password)
        self.give(self.dir, self.log, password_file)
        # Without --no-sync, two thirds of the time would go into syncing files that are deleted anyway.
        arguments = ["-D", self.data, "-U", "postgres", f"--pwfile={password_file}", "--auth-host=scram-sha-256"]
        arguments += ["--auth-local=trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        self.run_program("initdb", *arguments)
        password_file.unlink()

    def copy_primary(self):
        """Makes a hot standby of a running server. The password is the same."""
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
        # A killed server leaves one small System V segment, with which PostgreSQL prevents two servers on one data
        # directory. Only the next start would free it.
        try:
            segment = (self.data / "postmaster.pid").read_text().splitlines()[6].split()[1]
            subprocess.run(["ipcrm", "-m", segment], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except (AttributeError, OSError, IndexError):
            pass
        return super().remove_dir()

    def url(self):
        return f"postgres://postgres:{self.password}@127.0.0.1:{self.port}/postgres"


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
