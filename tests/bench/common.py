"""What the sections share: the options, tables of runs, and the check that ends the benchmark on a wrong result."""
import contextlib
import dataclasses
import fnmatch
import os
import statistics
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from throwaway import RELAY, Server, psql, psql_path, redis_cli  # noqa: E402, F401

# Variables that a shell has set would replace the defaults.
OURS = ("RELAY_", "EVENT_", "REDIS_", "DATABASE_", "AWS_", "PG")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}


@dataclasses.dataclass
class Options:
    runs: int
    events: int | None
    short: bool
    only: str

    def size(self, usual, short, share=1.0):
        """The number of events: the option's, or the section's own."""
        if self.events:
            return max(int(self.events * share), 1000)
        return short if self.short else usual

    def wants(self, label):
        return fnmatch.fnmatch(label.lower(), f"*{self.only.lower()}*")

    def rounds(self):
        """The numbers of the runs. Run 0 is a warm-up, which no table shows."""
        return range(0 if not self.short else 1, self.runs + 1)


def fail(message):
    sys.exit(f"wrong result: {message}")


def expect(what, **pairs):
    """Each pair has the found value and the required one."""
    wrong = [f"{name} {found:,} instead of {due:,}" for name, (found, due) in pairs.items() if found != due]
    if wrong:
        fail(f"{what}: {', '.join(wrong)}")


def percentile(values, share):
    values = sorted(values)
    return values[min(int(len(values) * share), len(values) - 1)]


class Table:
    """A row for each variant; each run adds a value to each column. Shows medians, and on request the smallest and largest."""

    def __init__(self, title, columns, spread=(), notes=()):
        self.title, self.columns, self.spread, self.notes = title, columns, spread, list(notes)
        self.rows = {}

    def add(self, label, **values):
        row = self.rows.setdefault(label, {})
        for name, value in values.items():
            row.setdefault(name, []).append(value)
        shown = "  ".join(f"{self.columns[name][0]} {value:{self.columns[name][1]}}" for name, value in values.items())
        print(f"  {label}: {shown}", flush=True)

    def median(self, label, name):
        return statistics.median(self.rows[label][name])

    def cell(self, row, name):
        values = row.get(name)
        if not values:
            return "-"
        form = self.columns[name][1]
        text = f"{statistics.median(values):{form}}"
        if name in self.spread and len(values) > 1:
            text += f" ({min(values):{form}} to {max(values):{form}})"
        return text

    def show(self):
        if not self.rows:
            return
        runs = max(len(values) for row in self.rows.values() for values in row.values())
        lines = [[f"{self.title}, median of {runs}", *(head for head, _ in self.columns.values())]]
        lines += [[label, *(self.cell(row, name) for name in self.columns)] for label, row in self.rows.items()]
        widths = [max(map(len, column)) for column in zip(*lines)]
        print()
        for line in lines:
            cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
            print("  ".join(cells))
        for note in self.notes:
            print(f"  {note}")
        print(flush=True)

    def data(self):
        def summary(values):
            return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": values}

        rows = {label: {name: summary(values) for name, values in row.items()} for label, row in self.rows.items()}
        units = {name: head for name, (head, _) in self.columns.items()}
        return {"title": self.title, "columns": units, "notes": self.notes, "rows": rows}


@contextlib.contextmanager
def servers(*options):
    """A throwaway PostgreSQL with the relay's tables and default settings except for `options`, and a Redis."""
    arguments = [argument for option in options for argument in ("--set", option)]
    with Server("postgres", *arguments) as database, Server("redis") as redis:
        environment = {**ENVIRONMENT, "DATABASE_URL": database.url}
        subprocess.run([RELAY, "migrate"], env=environment, check=True, stdout=subprocess.DEVNULL)
        yield database, redis
