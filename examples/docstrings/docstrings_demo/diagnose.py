"""What to read when the demo fails: conditions, events, and the last words of pods that failed."""

from __future__ import annotations

from collections.abc import Iterator

from docstrings_demo.kube import Kube, Object
from docstrings_demo.podjobs import JOB_LABEL, ScriptJob
from tributary_api.client import FederatedClient
from tributary_api.release import ModelRelease
from tributary_api.round import FederatedRound
from tributary_operator import names

EVENTS_SHOWN = 12
LOG_LINES_SHOWN = 15
UNHEALTHY_PHASES = ("Failed", "Pending", "Unknown")


def about_object(kube: Kube, name: str) -> str:
    """Everything that may explain why the object `name` does not get on."""
    return "\n".join([*conditions(kube, name), *events(kube), *pods(kube), *next_steps()])


def about_job(kube: Kube, job: ScriptJob) -> str:
    found = kube.items("pods", job.namespace, labels=f"{JOB_LABEL}={job.name}")
    return "\n".join(line for pod in found for line in last_words(kube, pod))


def conditions(kube: Kube, name: str) -> Iterator[str]:
    for plural in (FederatedRound.PLURAL, ModelRelease.PLURAL, FederatedClient.PLURAL):
        for item in kube.items(plural):
            if plural == FederatedClient.PLURAL or item["metadata"]["name"] == name:
                yield f"conditions of {item['metadata']['namespace']}/{item['metadata']['name']}:"
                for c in item.get("status", {}).get("conditions", []):
                    yield f"  {c['type']}={c['status']} {c['reason']}: {c.get('message', '')}"
                for client in item.get("status", {}).get("failedClients", []):
                    yield f"  {client['client']}: {client['reason']}: {client.get('message', '')}"


def events(kube: Kube) -> Iterator[str]:
    found = sorted(kube.items("events"), key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime")))
    telling = [event for event in found if event.get("type") == "Warning"]
    if telling:
        yield "warnings:"
    for event in telling[-EVENTS_SHOWN:]:
        about = event.get("involvedObject", {})
        yield (
            f"  {about.get('namespace', '')}/{about.get('name', '')}: "
            f"{event.get('reason', '')}: {event.get('message', '')}"
        )


def pods(kube: Kube) -> Iterator[str]:
    for pod in kube.items("pods", labels=f"{names.MANAGED_BY}={names.MANAGED_BY_VALUE}"):
        if pod.get("status", {}).get("phase") in UNHEALTHY_PHASES:
            yield from last_words(kube, pod)


def last_words(kube: Kube, pod: Object) -> Iterator[str]:
    namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
    yield f"pod {namespace}/{name} is {pod.get('status', {}).get('phase')}:"
    for status in pod.get("status", {}).get("containerStatuses", []):
        for state in status.get("state", {}).values():
            if state.get("reason"):
                yield f"  {state['reason']}: {state.get('message', '')}"
    yield from (f"  | {line}" for line in kube.log(namespace, name, tail_lines=LOG_LINES_SHOWN))


def next_steps() -> Iterator[str]:
    yield "what to do:"
    yield "  kubectl get tributary -A; kubectl describe the object above; kubectl logs -n tributary-system"
    yield "  deployment/tributary-operator. The cluster is still up: `python -m tributary_dev env` gives its"
    yield "  kubeconfig. `make demo` starts over."
