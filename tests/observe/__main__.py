"""Whether the dashboard, the alerts and the page show a real relay: `make test-observe`, which installs what it needs.

A relay works on throwaway servers, with one destination that is down and one key that is blocked. A real Prometheus scrapes
it, and every query of the dashboard and of the alerts must answer. Ends with 1 and names what is wrong.
"""

import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from throwaway import Server, redis_cli  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
RELAY = Path(os.environ.get("OBSERVE_RELAY") or ROOT / "target" / "debug" / "relay")
OBSERVABILITY = ROOT / "deploy" / "observability"
# The machine may be busy. Nothing here measures time.
PATIENCE = 90
# Autovacuum does not run on a table that is so small and so young.
MAY_BE_EMPTY = {"panel 'Time since the last autovacuum'"}

findings = []


def expect(true, complaint):
    if not true:
        findings.append(complaint)
        print(f"FAILED {complaint}", flush=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def until(ask, what):
    """What `ask` returns once it is true; errors count as not yet."""
    end = time.monotonic() + PATIENCE
    last = None
    while time.monotonic() < end:
        try:
            found = ask()
            if found:
                return found
        except OSError as error:
            last = error
        time.sleep(0.5)
    sys.exit(f"tests/observe: {what} did not come within {PATIENCE} s ({last})")


class Process:
    """A program with its output in a file, ended by its process id."""

    def __init__(self, log, *command, **environment):
        self.log = log
        self.process = subprocess.Popen(
            [str(part) for part in command], env={**os.environ, **environment},
            stdin=subprocess.DEVNULL, stdout=open(log, "w"), stderr=subprocess.STDOUT,
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if kind is not None:
            print(Path(self.log).read_text()[-3000:], file=sys.stderr)


def promtool():
    """The rules are valid, and each alert fires when it should."""
    for command in (["promtool", "check", "rules", "alerts.yml"], ["promtool", "check", "config", "prometheus.yml"],
                    ["promtool", "test", "rules", "alerts_test.yml"]):
        done = subprocess.run(command, cwd=OBSERVABILITY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        expect(done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}")
    rules = (OBSERVABILITY / "alerts.yml").read_text()
    alerts = re.findall(r"alert: (\w+)", rules)
    tested = (OBSERVABILITY / "alerts_test.yml").read_text()
    runbook = (ROOT / "src/guide/alerts.md").read_text()
    for alert in alerts:
        fires = re.search(rf"alertname: {alert}\s+exp_alerts:\s+- exp_labels", tested)
        expect(fires, f"no test lets {alert} fire")
        expect(f"\n## {alert}\n" in runbook, f"src/guide/alerts.md has no entry for {alert}")
        expect(f"alerts.md#{alert.lower()}\n" in rules, f"{alert} does not name its entry in src/guide/alerts.md")
    print(f"{len(alerts)} alerts: valid, tested, each with its entry in the guide", flush=True)
    return rules


def queries(rules):
    """The queries of the dashboard and of the alerts, each with its name."""
    dashboard = json.loads((OBSERVABILITY / "dashboard.json").read_text())
    found = [(f"panel {panel['title']!r}", target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]
    for alert, text in re.findall(r"- alert: (\w+)\n(.*?)(?=\n      - alert|\n      #|\Z)", rules, re.S):
        expression = re.search(r"expr: (?:\|\n)?(.*?)\n        (?:for|labels):", text, re.S)
        found.append((f"alert {alert}", expression.group(1).strip()))
    return [(name, query.replace("$__rate_interval", "1m")) for name, query in found]


def ask(prometheus, query):
    """The result of a query. An error of Prometheus is a finding."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        return json.loads(get(url))["data"]["result"]
    except urllib.error.HTTPError as error:
        sys.exit(f"tests/observe: Prometheus refuses {query!r}: {error.read().decode()}")


def check_queries(prometheus, relay, rules):
    metrics = get(f"{relay}/metrics")
    exported = set(re.findall(r"^(outbox_relay_\w+)", metrics, re.M))
    for name, query in queries(rules):
        for metric in re.findall(r"outbox_relay_\w+", query):
            expect(metric in exported, f"{name}: no relay exports {metric}")
        if name.startswith("alert ") or name in MAY_BE_EMPTY:
            ask(prometheus, query)
            continue
        until(lambda query=query: ask(prometheus, query), f"an answer to {name}: {query}")
    print(f"{len(queries(rules))} queries of dashboard and alerts: Prometheus answers each", flush=True)
    by_destination = "max by (destination) (outbox_relay_breaker_state)"
    states = {row["metric"]["destination"]: row["value"][1] for row in ask(prometheus, by_destination)}
    expect(states.get("away") in ("1", "2") and states.get("orders") == "0", f"the breakers are shown as {states}")
    until(lambda: ask(prometheus, 'max by (destination) (outbox_relay_blocked_keys{destination="orders"}) > 0'), "the blocked key")
    until(lambda: ask(prometheus, 'ALERTS{alertname="DestinationDown", destination="away"}'), "the alert DestinationDown")


def chromium(folder, url, *options):
    """What Chromium prints for a page once its scripts have run for some seconds."""
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
               "--virtual-time-budget=5000", f"--user-data-dir={folder}/chromium", *options, url]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)


def check_page(folder, relay):
    """A browser shows what `relay status` shows, and its policy lets the page's script run."""
    done = chromium(folder, relay, "--dump-dom")
    text = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", done.stdout, flags=re.S)
    text = re.sub(r"\s+", " ", html.unescape(text))
    for part in ["degraded", "away", "down", "orders", "up", "order 2", "order.stuck", "WRONGTYPE", "payload_too_large", "routes"]:
        expect(part in text, f"the page does not show {part!r}: {text[:2000]}")
    expect("loading" not in text, "the page shows nothing but its beginning")
    wrong = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    expect(not wrong, f"the browser complains about the page: {wrong}")
    pictures = ROOT / "target" / "observe"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, options in {
        "narrow": ["--window-size=400,1800"],
        "wide": ["--window-size=1400,1100"],
        "dark": ["--window-size=1400,1100", "--blink-settings=preferredColorScheme=0"],
    }.items():
        picture = pictures / f"{name}.png"
        picture.unlink(missing_ok=True)
        chromium(folder, relay, f"--screenshot={picture}", *options)
        expect(picture.is_file() and picture.stat().st_size > 10_000, f"Chromium made no picture {picture}")
    print(f"the page shows the relay; pictures of it are in {pictures.relative_to(ROOT)}", flush=True)


def start_prometheus(folder, port, relay_port):
    shutil.copy(OBSERVABILITY / "alerts.yml", folder)
    configuration = (OBSERVABILITY / "prometheus.yml").read_text()
    configuration = configuration.replace("scrape_interval: 15s", "scrape_interval: 1s\n  evaluation_interval: 1s")
    configuration = re.sub(r"targets: \[.*\]", f"targets: [127.0.0.1:{relay_port}]", configuration)
    (folder / "prometheus.yml").write_text(configuration)
    return Process(
        folder / "prometheus.log", "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    )


def emit(environment, event_type, key, count, payload='{"total": 1}'):
    for _ in range(count):
        subprocess.run(
            [RELAY, "emit", event_type, payload, "--aggregate-type", "order", "--aggregate-id", key],
            env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL,
        )


def main():
    rules = promtool()
    with Server("postgres") as database, Server("redis") as redis, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        relay_port, prometheus_port = free_port(), free_port()
        environment = {
            "DATABASE_URL": database.url, "RELAY_LOG_FORMAT": "text",
            # The name of the stream is the event's type, so that one type can be blocked.
            "RELAY_DESTINATION_ORDERS": f"{redis.url.replace('redis://', 'redis+stream://')}?stream=%7Bevent_type%7D",
            "RELAY_DESTINATION_AWAY": "redis+stream://127.0.0.1:1?stream=away",
            "EVENT_CIRCUIT_BREAKER_RECOVERY_TIMEOUT": "1000", "EVENT_MAX_PAYLOAD_SIZE": "1000",
        }
        subprocess.run([RELAY, "migrate"], env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL)
        redis_cli(redis, "set", "order.stuck", "a key of another type than a stream")
        relay, prometheus = f"http://127.0.0.1:{relay_port}", f"http://127.0.0.1:{prometheus_port}"
        with Process(folder / "relay.log", RELAY, "run", **environment, RELAY_HTTP_ADDR=f"127.0.0.1:{relay_port}"), \
                start_prometheus(folder, prometheus_port, relay_port):
            until(lambda: get(f"{relay}/livez"), "the relay's server")
            emit(environment, "order.created", "1", 20)
            emit(environment, "order.stuck", "2", 2)
            emit(environment, "order.large", "4", 1, json.dumps("x" * 2000))
            until(lambda: get(f"{prometheus}/-/ready"), "Prometheus")
            # Rates need events between two scrapes.
            for _ in range(5):
                emit(environment, "order.created", "3", 3)
                time.sleep(1)
            check_page(folder, relay)
            check_queries(prometheus, relay, rules)
    if findings:
        sys.exit(f"tests/observe: {len(findings)} findings, above")
    print("observability: all that is shown is there")


main()
