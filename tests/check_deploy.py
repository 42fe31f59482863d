#!/usr/bin/env python3
"""Checks the files of deploy/, as far as that is possible without a cluster, a cloud or a running systemd.

Run by `make check-deploy` with the Python of target/venv, which has PyYAML. Prints every finding; exits with 1 if any.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
DEPLOY = REPOSITORY / "deploy"
# The time until SIGKILL must be longer than the relay's own timeout, with some seconds more for its start and its end.
SHUTDOWN = re.search(r'env = "RELAY_SHUTDOWN_TIMEOUT"[^\]]*?default_value = "(\d+)s"', (REPOSITORY / "src/config/settings.rs").read_text())
SHORTEST_GRACE = int(SHUTDOWN.group(1)) + 5

findings = []


def expect(true, file, complaint):
    if not true:
        findings.append(f"{file.relative_to(REPOSITORY)}: {complaint}")


def read(file):
    try:
        return file.read_text()
    except FileNotFoundError:
        findings.append(f"{file.relative_to(REPOSITORY)}: is missing")
        return None


def check_kubernetes():
    kinds = {"deployment.yaml": "Deployment", "cronjob.yaml": "CronJob", "migrate-job.yaml": "Job"}
    commands = {"deployment.yaml": ["run"], "cronjob.yaml": ["--once"], "migrate-job.yaml": ["migrate"]}
    images = set()
    for name, kind in kinds.items():
        file = DEPLOY / "kubernetes" / name
        text = read(file)
        if text is None:
            continue
        try:
            documents = [document for document in yaml.safe_load_all(text) if document]
        except yaml.YAMLError as error:
            expect(False, file, f"is no YAML: {error}")
            continue
        found = [document.get("kind") for document in documents]
        expect(found == [kind], file, f"holds {found}, expected one {kind}")
        if found != [kind]:
            continue

        owner = documents[0]
        spec = owner["spec"]
        if kind == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if kind == "Deployment":
            labels = spec["template"]["metadata"]["labels"]
            selector = spec["selector"]["matchLabels"]
            expect(selector.items() <= labels.items(), file, "its selector does not match its own pods")
        pod = spec["template"]["spec"]
        if kind != "Job":
            grace = pod.get("terminationGracePeriodSeconds", 30)
            expect(grace >= SHORTEST_GRACE, file, f"terminationGracePeriodSeconds is {grace}, less than {SHORTEST_GRACE}")
        expect(pod.get("enableServiceLinks") is False, file, "enableServiceLinks must be false: a Service `redis` would set REDIS_PORT")
        # The requirements of the `restricted` Pod Security Standard.
        security = pod.get("securityContext", {})
        expect(security.get("runAsNonRoot") is True, file, "runAsNonRoot must be true")
        expect(security.get("seccompProfile") == {"type": "RuntimeDefault"}, file, "seccompProfile must be RuntimeDefault")
        for container in pod["containers"]:
            security = container.get("securityContext", {})
            expect(security.get("allowPrivilegeEscalation") is False, file, "allowPrivilegeEscalation must be false")
            expect(security.get("capabilities") == {"drop": ["ALL"]}, file, "capabilities must drop ALL")
            expect("memory" in container.get("resources", {}).get("limits", {}), file, "a memory limit is missing")
            expect(container.get("args") == commands[name], file, f"args are {container.get('args')}, expected {commands[name]}")
            images.add(container["image"])
    expect(len(images) == 1, DEPLOY / "kubernetes", f"the files name different images: {sorted(images)}")


def check_probes():
    """The probes ask paths and a port that the relay serves, from outside of the pod, and the policy lets Prometheus in."""
    file, policy_file = DEPLOY / "kubernetes/deployment.yaml", DEPLOY / "kubernetes/networkpolicy.yaml"
    text, policy_text = read(file), read(policy_file)
    pages = (REPOSITORY / "src/http/page.rs").read_text()
    if text is None or policy_text is None:
        return
    deployment, policy = yaml.safe_load(text), yaml.safe_load(policy_text)
    template = deployment["spec"]["template"]
    container = template["spec"]["containers"][0]
    address = {variable["name"]: variable["value"] for variable in container["env"]}.get("RELAY_HTTP_ADDR", "")
    host, _, port = address.rpartition(":")
    expect(host == "0.0.0.0", file, f"probes do not reach RELAY_HTTP_ADDR={address}")
    ports = {there["name"]: there["containerPort"] for there in container.get("ports", [])}
    for probe, path in [("livenessProbe", "/livez"), ("readinessProbe", "/readyz")]:
        asked = container.get(probe, {}).get("httpGet", {})
        expect(asked.get("path") == path and f'"{path}" =>' in pages, file, f"{probe} asks {asked}, expected {path}")
        expect(str(ports.get(asked.get("port"))) == port, file, f"{probe} asks port {asked.get('port')}, the relay has {port}")
    expect(container.get("livenessProbe", {}).get("timeoutSeconds", 1) >= 3, file, "a busy machine would fail the livenessProbe")
    expect(policy["kind"] == "NetworkPolicy" and policy["spec"]["policyTypes"] == ["Ingress"], policy_file, "limits no ingress")
    selected = policy["spec"]["podSelector"]["matchLabels"]
    expect(selected.items() <= template["metadata"]["labels"].items(), policy_file, "its selector does not match the pods")
    allowed = [there["port"] for rule in policy["spec"]["ingress"] for there in rule["ports"]]
    expect(allowed == [int(port or 0)], policy_file, f"allows ports {allowed}, expected {port}")


def check_iam():
    file = DEPLOY / "aws" / "iam-policy.json"
    text = read(file)
    if text is None:
        return
    try:
        statements = json.loads(text)["Statement"]
    except (ValueError, KeyError, TypeError) as error:
        expect(False, file, f"is no policy: {error!r}")
        return
    allowed = set()
    for statement in statements:
        allowed.update(statement["Action"])
        expect("*" not in json.dumps([statement["Action"], statement["Resource"]]), file, "grants more than it needs: no wildcards")
    expect(allowed == {"events:PutEvents", "events:DescribeEventBus"}, file, f"allows {sorted(allowed)}")


def check_dockerfile():
    file = DEPLOY / "Dockerfile"
    text, manifest = read(file), read(REPOSITORY / "Cargo.toml")
    if text is None or manifest is None:
        return
    builder = re.search(r"^FROM rust:(\d+)\.(\d+)", text, re.M)
    needed = re.search(r'^rust-version = "(\d+)\.(\d+)', manifest, re.M)
    expect(
        builder and tuple(map(int, builder.groups())) >= tuple(map(int, needed.groups())),
        file,
        f"its Rust is pinned to no minor version, or one older than Cargo.toml's rust-version {'.'.join(needed.groups())}",
    )
    expect("\nSTOPSIGNAL SIGTERM\n" in text, file, "STOPSIGNAL must be SIGTERM: the relay settles on it")
    graces = [int(grace) for grace in re.findall(r"(?:docker stop -t |stop_grace_period: )(\d+)", text)]
    expect(graces and min(graces) >= SHORTEST_GRACE, file, f"says how to stop it within {graces} s, less than {SHORTEST_GRACE}")
    user = re.findall(r"^USER (\S+)", text, re.M)
    expect(user and re.fullmatch(r"[1-9]\d*(:\d+)?", user[-1]), file, "the image must end with a numeric USER other than 0")


def check_systemd():
    folder = DEPLOY / "systemd"
    names = ["relay.service", "relay-once.service", "relay-once.timer"]
    units = {name: read(folder / name) for name in names}
    if None in units.values():
        return

    def hardening(name):
        return re.search(r"^DynamicUser=.*?(?=\n\n|\Z)", units[name].strip(), re.M | re.S).group()

    expect(hardening("relay.service") == hardening("relay-once.service"), folder, "the two services are not hardened alike")
    watchdog = re.search(r"^WatchdogSec=(\d+)$", units["relay.service"], re.M)
    expect(watchdog and int(watchdog.group(1)) >= 30, folder / "relay.service", "WatchdogSec must be at least 30: a busy machine is no hang")
    for name in names[:2]:
        grace = re.search(r"^TimeoutStopSec=(\d+)$", units[name], re.M)
        expect(grace and int(grace.group(1)) >= SHORTEST_GRACE, folder / name, f"TimeoutStopSec must be at least {SHORTEST_GRACE}")

    for name, text in units.items():
        waits = "\nTimeoutStartSec=infinity\n" in text
        expect("\nType=notify\n" not in text or waits, folder / name, "a database that is away at boot would be a restart loop: TimeoutStartSec=infinity")
    folders = [DEPLOY / "systemd", DEPLOY / "kubernetes", DEPLOY / "Dockerfile"]
    files = [file for folder in folders for file in ([folder] if folder.is_file() else sorted(folder.iterdir()))]
    for file in files:
        told = re.findall(r"RELAY_SHUTDOWN_TIMEOUT \((\w+)\)", file.read_text())
        expect(set(told) <= {f"{SHUTDOWN.group(1)}s"}, file, f"says that RELAY_SHUTDOWN_TIMEOUT is {told}")

    if shutil.which("systemd-analyze") is None:
        findings.append("systemd-analyze is missing: run `tests/setup deploy`")
        return
    with tempfile.TemporaryDirectory(prefix="outbox-relay-units-") as directory:
        for name, text in units.items():
            # `verify` requires the program, and the relay is not installed here.
            Path(directory, name).write_text(text.replace("ExecStart=/usr/bin/relay", "ExecStart=/bin/true"))
        verified = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", *(str(Path(directory, name)) for name in names)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    # It also warns about the machine's own units that these units depend on. Those warnings are left out.
    ours = [line for line in verified.stdout.splitlines() if any(name in line for name in names)]
    expect(not ours, folder, "systemd-analyze verify:\n  " + "\n  ".join(ours))
    expect(verified.returncode == 0 or ours, folder, f"systemd-analyze verify failed:\n{verified.stdout}")


def main():
    for check in [check_kubernetes, check_probes, check_iam, check_dockerfile, check_systemd]:
        check()
    for finding in findings:
        print(finding, file=sys.stderr)
    print(f"deploy: {len(findings)} finding(s)" if findings else "deploy: sound")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
