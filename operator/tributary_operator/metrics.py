"""Prometheus metrics: by verb, kind and outcome, never by object."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

API_REQUESTS = Counter("tributary_api_requests_total", "Requests to the API server", ["verb", "resource"])
STORE_REQUESTS = Counter("tributary_store_requests_total", "Requests to the object store", ["operation"])
PASSES = Counter("tributary_passes_total", "Passes over an object, by result", ["kind", "result"])
PASS_SECONDS = Histogram("tributary_pass_seconds", "Duration of a pass over an object", ["kind"])
OBJECTS = Gauge("tributary_objects", "Objects that have a daemon", ["kind"])
AGGREGATED_BYTES = Counter(
    "tributary_aggregated_bytes_total",
    "Bytes of aggregations that ended: sent by clients, read, written",
    ["what"],
)
AGGREGATION_RATE = Gauge(
    "tributary_aggregation_bytes_per_second", "Bytes per second that the aggregation looked at last reads"
)
EPSILON_REFUSALS = Counter("tributary_epsilon_refusals_total", "Reservations refused for lack of budget")


def api_request(verb: str, path: str) -> None:
    """Counts by the resource's plural, so that no object's name becomes a label."""
    parts = path.split("/")
    if "namespaces" in parts[:-2]:
        parts = parts[parts.index("namespaces") + 2 :]
        API_REQUESTS.labels(verb, parts[0]).inc()
    else:
        API_REQUESTS.labels(verb, "namespaces" if "namespaces" in parts else parts[-1]).inc()
