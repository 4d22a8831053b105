"""One plan: a round with three clients and one fault. The oracle is the same round without a fault.

Operator, API server, Job controller, S3, ledger and accountant are real; pods are worker_double.py's, which
publish through the real code. Every plan has namespaces of its own, so that none spends another's budget.
"""

from __future__ import annotations

import base64
import json
import re
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from fault_proxy import Fault, FaultyProxy, Script
from installation import BUCKET, HUB, client_values, rendered
from kube import Kubectl, Object
from operator_process import OperatorProcess, operator_kubeconfig
from worker_double import WorkerDouble, tiny_bundle

from tributary_accounting.ledger import read
from tributary_api.base import API_VERSION
from tributary_api.meta import NamespacedName
from tributary_api.shared import StoreEndpoint
from tributary_dev import cluster as dev
from tributary_operator import names
from tributary_store.keys import Layout
from tributary_store.objectstore import ObjectStore

CLIENTS = "abc"
PLAN_SECONDS_MAX = 240
LOOK_SECONDS = 0.5
TEMPLATE = "plan-template"
PREFIX = "plan-"
"""Of the names of rounds and namespaces."""
LEASES = {
    "TRIBUTARY_LEASE_DURATION_SECONDS": "6",
    "TRIBUTARY_LEASE_RENEW_SECONDS": "4",
    "TRIBUTARY_LEASE_RETRY_SECONDS": "1",
}
COUNTED = {"POST": "create", "PUT": "create", "DELETE": "delete"}
"""Updates are left out: how often a status is written depends on which news come together."""


class Stuck(AssertionError):
    """The plan did not come to its end in time."""


@dataclass
class Ending:
    """What a plan leaves behind, free of names, times and UIDs: equal for all plans of one kind."""

    conditions: dict[str, list[str]]
    summary: str
    model_is_expected: bool
    workers: dict[str, int]
    ledgers: list[list[str]]
    accounts: list[list[str]]
    orphans: int
    writes: dict[str, int]


@dataclass
class Plan:
    fault: str
    at: int
    struck: bool
    write: str
    """Verb and path of the write that was struck."""
    seconds: float
    ending: Ending | None = None
    violation: str = ""


class FleetDouble(WorkerDouble):
    """The pods of all namespaces by one request: a plan makes three namespaces of its own."""

    def _live(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            for pod in self.kubectl.get("pods", "-A", f"-l{names.STAGE}")["items"]:
                if self._is_new(pod):
                    self._take(pod)


class Harness:
    def __init__(self, running: dev.Cluster, kubectl: Kubectl, helm: Path, place: Path) -> None:
        s3 = running.s3
        self.kubectl, self.script = kubectl, Script()
        endpoint = StoreEndpoint(endpoint=s3.endpoint_for_host, region=s3.region)
        self.store = ObjectStore.open(endpoint, s3.access_key, s3.secret_key)
        self.base_model = tiny_bundle(self.store, f"s3://{BUCKET}/models/", seed="faults")
        self._tenant = json.dumps(rendered(helm, "tributary-client", TEMPLATE, _values()))
        config = operator_kubeconfig(kubectl, place / "kubeconfig")
        upstream, trust = _direct_road(config)
        self._proxies = [
            FaultyProxy("api", upstream, self.script, trust),
            FaultyProxy("s3", s3.endpoint_for_host or "", self.script),
        ]
        _lead_through(config, self._proxies[0].endpoint)
        self.operator = OperatorProcess(
            config, place / "log", self._proxies[1].endpoint, s3.access_key, s3.secret_key, settings=LEASES
        )
        self.workers = FleetDouble(kubectl, self.store, [])
        self.workers.__enter__()
        self.operator.start()
        self.plans: list[Plan] = []
        self.writes_expected = 0
        self._remove_leftovers()
        self._serial = f"{time.time_ns() % 10**9:x}"
        self.oracle = self.run(None)
        assert self.oracle.ending is not None, f"the round without a fault: {self.oracle.violation}"

    def run(self, fault: Fault | None, at: int = 0) -> Plan:
        """Carry out one plan and judge it."""
        run = _Run(self, f"{PREFIX}{self._serial}-{len(self.plans)}")
        self.script.begin(fault, at, self._strike)
        start = time.monotonic()
        plan = Plan(fault.name if fault else "NONE", at, False, "", 0)
        try:
            plan.ending = run.to_its_end()
            plan.violation = self._difference(plan.ending)
        except Stuck as error:
            plan.violation = str(error)
        plan.struck, plan.seconds = self.script.struck, round(time.monotonic() - start, 1)
        if 0 < at <= len(self.script.writes):
            hit = self.script.writes[at - 1]
            plan.write = f"{hit.server} {hit.verb} {run.generic(hit.path)}"
        if fault is None:
            self.writes_expected = len(self.script.writes)
        self.script.begin(None, 0, self._strike)
        run.remove()
        self.plans.append(plan)
        return plan

    def _difference(self, ending: Ending) -> str:
        if not self.plans or self.plans[0].ending is None:
            return ""
        expected, found = asdict(self.plans[0].ending), asdict(ending)
        return "; ".join(
            f"{k}: {found[k]} instead of {expected[k]}" for k in expected if expected[k] != found[k]
        )

    def _remove_leftovers(self) -> None:
        """Of a run that was broken off: its rounds would go on, and their writes be counted."""
        for kind in ("federatedrounds", "namespaces"):
            found = self.kubectl("get", kind, "-n", HUB, "-oname").split()
            if old := [name for name in found if f"/{PREFIX}" in name]:
                self.kubectl("delete", "-n", HUB, *old, f"--wait={str(kind != 'namespaces').lower()}")

    def _strike(self) -> None:
        assert self.operator.process is not None
        self.operator.process.kill()

    def keep_running(self) -> None:
        """What the kubelet does: starts the container anew."""
        if not self.operator.is_running:
            self.operator.start()

    def close(self) -> None:
        self.workers.__exit__()
        if self.operator.is_running:
            self.operator.stop()
        for proxy in self._proxies:
            proxy.close()

    def report(self, path: Path) -> None:
        """`plans` that a fault has struck; `violations` of those that ended otherwise than without it."""
        struck = [plan for plan in self.plans if plan.struck]
        violations = [
            {"fault": p.fault, "at": p.at, "write": p.write, "violation": p.violation}
            for p in struck
            if p.violation
        ]
        figures = {
            "plans": len(struck),
            "converged": len(struck) - len(violations),
            "violations": violations,
            "writes_of_a_round": self.writes_expected,
            "by_fault": dict(Counter(plan.fault for plan in struck)),
            "seconds": round(sum(plan.seconds for plan in self.plans)),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")


def _values() -> Object:
    values = client_values("notes")
    spec = values["client"]["spec"]
    spec["data"] = {"name": "notes", "uri": f"s3://{TEMPLATE}/notes/", "numExamples": 1000}
    spec["privacy"]["ledgerUri"] = f"s3://{BUCKET}/ledger/{TEMPLATE}/notes/"
    spec["worker"]["nodes"] = 1
    values["client"]["labels"] = {"suite": TEMPLATE}
    return values


def _direct_road(kubeconfig: Path) -> tuple[str, ssl.SSLContext]:
    (entry,) = yaml.safe_load(kubeconfig.read_text())["clusters"]
    cluster: dict[str, Any] = entry["cluster"]
    if "certificate-authority-data" in cluster:
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
    else:
        authority = Path(cluster["certificate-authority"]).read_text()
    return cluster["server"], ssl.create_default_context(cadata=authority)


def _lead_through(kubeconfig: Path, endpoint: str) -> None:
    config = yaml.safe_load(kubeconfig.read_text())
    config["clusters"] = [{"name": c["name"], "cluster": {"server": endpoint}} for c in config["clusters"]]
    kubeconfig.write_text(json.dumps(config))


@dataclass
class _Run:
    """The objects of one plan."""

    harness: Harness
    name: str
    before: Counter[str] = field(default_factory=Counter)
    run_key: str = ""

    @property
    def namespaces(self) -> list[str]:
        return [f"{self.name}-{letter}" for letter in CLIENTS]

    @property
    def kubectl(self) -> Kubectl:
        return self.harness.kubectl

    def to_its_end(self) -> Ending:
        self.before = Counter(self.harness.workers.started)
        for namespace in self.namespaces:
            self.kubectl.namespace(namespace)
            tenant = self.harness._tenant.replace(f'"suite": "{TEMPLATE}"', f'"suite": "{self.name}"')
            self.kubectl.apply(*json.loads(tenant.replace(TEMPLATE, namespace)))
        self.kubectl.apply(self._round())
        self._until("the round is complete", self._is_complete)
        self._until("the ledgers are settled and told", self._is_settled)
        status, ledgers, accounts = self._status(), self._ledgers(), self._accounts()
        self.run_key = status["runKey"]
        self.kubectl("delete", "fround", self.name, "-n", HUB, "--wait=false")
        self._until("the round is gone", self._is_gone)
        return Ending(
            conditions={c["type"]: [c["status"], c["reason"]] for c in status["conditions"]},
            summary=status["clientsSummary"],
            model_is_expected=status["model"]["digest"] == self._expected_digest(),
            workers=self._workers(),
            ledgers=ledgers,
            accounts=accounts,
            orphans=self._orphans(),
            writes=self._writes(),
        )

    def remove(self) -> None:
        self.kubectl("delete", "fround", self.name, "-n", HUB, "--ignore-not-found", "--wait=false")
        self.kubectl("delete", "namespace", *self.namespaces, "--ignore-not-found", "--wait=false")

    def generic(self, path: str) -> str:
        """The path without what differs from plan to plan."""
        for known in (self.run_key, self.name):
            path = path.replace(known, "*") if known else path
        return re.sub(r"[0-9a-f]{8,}", "*", path)

    def _round(self) -> Object:
        model = self.harness.base_model
        spec = {
            "baseModel": {"uri": model.uri, "digest": model.digest},
            "clients": {"selector": {"matchLabels": {"suite": self.name}}, "minAvailable": len(CLIENTS)},
            "method": {"lora": {}},
            "training": {"maxSteps": 2, "expectedBatchSize": 64, "learningRate": "1e-3"},
            "privacy": {"epsilon": "1", "delta": "1e-6"},
        }
        metadata = {"name": self.name, "namespace": HUB}
        return {"apiVersion": API_VERSION, "kind": "FederatedRound", "metadata": metadata, "spec": spec}

    def _until(self, what: str, check: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PLAN_SECONDS_MAX
        while not check():
            if time.monotonic() > deadline:
                raise Stuck(f"not within {PLAN_SECONDS_MAX} s: {what}; {self._status().get('conditions')}")
            time.sleep(LOOK_SECONDS)
            self.harness.keep_running()

    def _status(self) -> Object:
        found = self.kubectl.get("federatedrounds", "-n", HUB, f"--field-selector=metadata.name={self.name}")[
            "items"
        ]
        status: Object = found[0].get("status", {}) if found else {}
        return status

    def _is_complete(self) -> bool:
        conditions = self._status().get("conditions", [])
        return any((c["type"], c["reason"]) == ("Ready", "RoundComplete") for c in conditions)

    def _ledgers(self) -> list[list[str]]:
        found = []
        for namespace in self.namespaces:
            uri = f"s3://{BUCKET}/ledger/{namespace}/notes/"
            chain = read(self.harness.store, uri, NamespacedName(namespace=namespace, name="notes"))
            found.append([entry.kind.value for entry in chain.entries])
        return found

    def _accounts(self) -> list[list[str]]:
        clients = [self.kubectl.get("fclient", "notes", "-n", namespace) for namespace in self.namespaces]
        privacy = [client.get("status", {}).get("privacy", {}) for client in clients]
        return [
            [str(p.get(key)) for key in ("spentEpsilon", "reservedEpsilon", "ledgerEntries")] for p in privacy
        ]

    def _is_settled(self) -> bool:
        return all(len(ledger) == 3 for ledger in self._ledgers()) and all(
            account[2] == "3" for account in self._accounts()
        )

    def _is_gone(self) -> bool:
        return not self._status() and not self._orphans()

    def _orphans(self) -> int:
        found = self.kubectl.get("jobs,services", "-A", f"-l{names.RUN_KEY}={self.run_key}")["items"]
        return len(found)

    def _expected_digest(self) -> str:
        layout = Layout(BUCKET)
        included = [NamespacedName(namespace=ns, name="notes") for ns in self.namespaces]
        seed = repr((self.run_key, included))
        return tiny_bundle(self.harness.store, layout.models, seed=seed).digest

    def _workers(self) -> dict[str, int]:
        started = self.harness.workers.started - self.before
        return {key.replace(self.name, "*"): count for key, count in sorted(started.items()) if count}

    def _writes(self) -> dict[str, int]:
        """Creations and deletions that the servers have carried out, by kind of object."""
        done: Counter[str] = Counter()
        for write in self.harness.script.writes:
            kind = _kind(write.server, write.path)
            if write.is_done and write.verb in COUNTED and kind != "events":
                done[f"{COUNTED[write.verb]} {kind}"] += 1
        return dict(sorted(done.items()))


def _kind(server: str, path: str) -> str:
    """The resource's plural, or what kind of record a key holds."""
    parts = path.strip("/").split("/")
    if server == "api":
        return parts[parts.index("namespaces") + 2] if "namespaces" in parts else parts[-1]
    return "ledger entry" if parts[1] == "ledger" else parts[-1]
