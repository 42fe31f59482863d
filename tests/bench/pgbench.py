"""Producers: pgbench clients that insert one event a transaction, each client with keys of its own."""
import glob
import os
import re
import subprocess
import sys
import tempfile

# No two clients share a key: the order of a key's events in concurrent transactions would be undefined.
SCRIPT = """\\set n :n + 1
\\set k random(1, 1000)
insert into event_outbox (event_type, aggregate_type, aggregate_id, correlation_id, payload) values
('order.created', 'order', concat(:client_id::int, '-', :k::int), concat(:client_id::int, '-', :n::int), '{payload}');
"""
PAYLOAD = '{"pad": "%s"}' % (16 * "0123456789ab")[:188]


class Producers:
    def __init__(self, database, clients, *options, log=False):
        if log:
            options += ("-l",)
        self.home = tempfile.TemporaryDirectory()
        script = os.path.join(self.home.name, "insert.sql")
        with open(script, "w") as file:
            file.write(SCRIPT.replace("{payload}", PAYLOAD))
        self.process = subprocess.Popen(
            [os.path.join(database.bin, "pgbench"), "-n", "-M", "prepared", "-D", "n=0", "-f", script, "-c", str(clients),
             "-j", str(min(clients, 2)), *map(str, options), database.url],
            cwd=self.home.name, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait(self):
        """Returns transactions, and transactions a second without the time to connect."""
        output = self.process.communicate()[0]
        if self.process.returncode != 0 or "aborted" in output:
            sys.exit(f"pgbench failed:\n{output}")
        done = int(re.search(r"actually processed: (\d+)", output)[1])
        return done, float(re.search(r"tps = ([\d.]+) \((?:without|excluding)", output)[1])

    def commits(self):
        """Returns when the answer to each commit arrived, by correlation id. pgbench reads the system's clock in microseconds."""
        times, counts = {}, {}
        for path in glob.glob(os.path.join(self.home.name, "pgbench_log.*")):
            with open(path) as log:
                for line in log:
                    client, _, _, _, seconds, microseconds, *_ = line.split()
                    counts[client] = counts.get(client, 0) + 1
                    times[f"{client}-{counts[client]}"] = int(seconds) + int(microseconds) / 1e6
        return times
