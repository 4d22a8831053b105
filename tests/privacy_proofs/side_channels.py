"""Everything about a training that can be seen from outside its pod, made comparable.

What must be equal for neighbouring data sets is all of it but the noised values, the time, and what is drawn
from the operating system (ports, names of temporary directories).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import training_worlds as worlds
from recording_proxy import Request
from safetensors.torch import load
from tenant_pods import Namespace

from tributary_store.objects import Objects
from tributary_store.objectstore import ObjectStore

CHANGED = 7
"""Place of the record in which neighbouring data sets differ."""
NEIGHBOURS = {
    "emptied": "",
    "enormous": json.dumps({"text": "a very long record " * 20_000}),
    "not JSON": "{this is not json",
    "not text": json.dumps({"text": 7}),
    "not UTF-8": b"\xff\xfe".decode(errors="surrogateescape"),
    "half a surrogate pair": '{"text": "\\ud800"}',
}
"""What stands in its place."""

VARIABLE = [
    (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d([.,]\d+)?(\+00:00|Z)?"), "TIME"),
    (re.compile(r"127\.0\.0\.1:\d+"), "ADDRESS"),
    (re.compile(r"/tmp/[\w./-]+"), "PATH"),
    (re.compile(r"[\d.]+ ?(seconds|s)\b"), "DURATION"),
    # The bar of the base model, which is public; how often it is drawn depends on the time.
    (re.compile(r"(Loading weights:[^\n\r]*[\n\r]*)+"), "BAR "),
]
NOISED = "noised"
"""Stands for values that are noise or come after it: digests, norm and signature of the delta, and what the
self-test measured of noise that no step uses."""
NOISED_FIELDS = {"sha256", "chunks", "l2Norm", "signature", "noiseStdRatio", "plantedRecordRatio"}
TIME_FIELDS = {"recordedAt", "previous"}
"""`previous` is the digest of an entry with a time in it."""


@dataclass(frozen=True)
class Seen:
    exit_code: int
    stdout: str
    stderr: str
    termination_message: str
    requests: tuple[Request, ...]
    objects: dict[str, Any]
    """By name: length and shape of the delta, fields of records, length of anything else."""


Observe = Callable[[Sequence[str]], Seen]
"""Lines of a data set -> what is seen of a training on it."""


def check_nothing_tells(observe: Observe, neighbours: Sequence[str] = tuple(NEIGHBOURS)) -> None:
    """Trainings on neighbouring data sets look the same from outside."""
    due = observe(worlds.records(60))
    for name in neighbours:
        lines = worlds.records(60)
        lines[CHANGED] = NEIGHBOURS[name]
        found = observe(lines)
        for field in fields(Seen):
            a, b = getattr(due, field.name), getattr(found, field.name)
            assert a == b, f"a record that is {name} shows in {field.name}: {_difference(a, b)}"


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, dict):
        a, b = a.items(), b.items()
    if isinstance(a, str):
        a, b = a.splitlines(), b.splitlines()
    return f"{[x for x in a if x not in b]} became {[x for x in b if x not in a]}"


def comparable(text: str) -> str:
    for pattern, word in VARIABLE:
        text = pattern.sub(word, text)
    return text


def lines_of(text: str) -> str:
    """Without the order in which several processes happened to write."""
    return "\n".join(sorted(comparable(text).splitlines()))


def of_process(namespace: Namespace, log: Sequence[Request], processes: int) -> Seen:
    """Run the pod; `log` is what the store's proxy writes down."""
    ended = namespace.run(processes_per_node=processes)
    # Several processes fetch the base model at once, in any order.
    ordered: Callable[..., Any] = (
        tuple if processes == 1 else lambda requests: tuple(sorted(requests, key=str))
    )
    message, prefix = namespace.root / "termination-log", namespace.task.data.uri.removesuffix("notes/")
    return Seen(
        exit_code=ended.returncode,
        stdout=ended.stdout,
        stderr=lines_of(ended.stderr),
        termination_message=message.read_text() if message.exists() else "",
        requests=ordered(_request(request) for request in log),
        objects=objects_in(namespace.store, prefix, namespace.task.data.uri),
    )


def _request(request: Request) -> Request:
    # The digits of a noised number have no fixed length.
    size = 0 if request.path.endswith("manifest.json") else request.body_bytes
    return Request(request.method, request.path, size, request.status)


def objects_in(store: Objects | ObjectStore, prefix: str, private: str) -> dict[str, Any]:
    """Every object below a prefix but the private data itself."""
    return {
        item.uri: _content(store.get(item.uri), item.uri)
        for item in store.list(prefix)
        if not item.uri.startswith(private)
    }


def _content(data: bytes, uri: str) -> Any:
    if uri.endswith("delta.safetensors"):
        return len(data), {name: (tensor.shape, tensor.dtype) for name, tensor in load(data).items()}
    if uri.endswith("manifest.json") or "/ledger/" in uri:
        return json.dumps(_blanked(json.loads(data)), sort_keys=True)
    return len(data)


def _blanked(value: Any) -> Any:
    if isinstance(value, dict):
        hidden = NOISED_FIELDS | TIME_FIELDS
        return {name: NOISED if name in hidden else _blanked(inner) for name, inner in value.items()}
    return [_blanked(inner) for inner in value] if isinstance(value, list) else value
