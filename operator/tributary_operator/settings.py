"""Every setting of the operator, read once from the environment. The chart sets exactly these."""

from __future__ import annotations

import base64
import socket
from collections.abc import Mapping
from typing import Annotated, Self
from uuid import uuid4

from pydantic import (
    AliasGenerator,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    ValidationError,
    model_validator,
)

from tributary_accounting.signatures import SigningKey
from tributary_api.base import ApiModel, ImageReference
from tributary_api.shared import Resources, StoreEndpoint
from tributary_operator.leases import LeaseTimes
from tributary_store.keys import Layout

PREFIX = "TRIBUTARY_"


class SettingsInvalid(ValueError):
    """The environment does not make sense; the text says which variable to change."""


def _environment_name(field: str) -> str:
    return PREFIX + field.upper()


def _signing_key(text: object) -> SigningKey:
    """Of a base64 text, as `head -c 32 /dev/urandom | base64` writes it."""
    return SigningKey(base64.b64decode(str(text).strip(), validate=True))


class Settings(ApiModel):
    model_config = ConfigDict(
        alias_generator=AliasGenerator(validation_alias=_environment_name),
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,  # one of them is a key
    )

    worker_image: ImageReference
    """Image of all stages, pinned by digest; tenants allow it by this very reference."""
    bucket: Annotated[str, Field(min_length=3, max_length=63)]
    """Exchange bucket: models, deltas, plans and outcomes."""
    signing_key: Annotated[SigningKey, BeforeValidator(_signing_key)]
    """Signs grants: base64 of 32 random bytes, made once. Owners may trust its public half alone."""
    namespace: str = "tributary-system"
    """The operator's own; its Lease lies there."""
    identity: Annotated[str, Field(default_factory=lambda: f"{socket.gethostname()}_{uuid4()}")]
    """Of this replica in the Lease; the same after a restart in the same pod, and nobody else's."""
    lease_duration_seconds: Annotated[int, Field(ge=3)] = 12
    """Another replica takes over when it has seen no renewal for this long."""
    lease_renew_seconds: Annotated[int, Field(ge=2)] = 8
    """The leader stops when it has not succeeded in renewing for this long."""
    lease_retry_seconds: Annotated[int, Field(ge=1)] = 3
    """Between two renewals, and between two looks of the others."""
    store_endpoint: str = ""
    """URL of the S3 endpoint as the operator reaches it; empty for AWS."""
    store_endpoint_for_pods: str = ""
    """URL of the same store as pods in hub namespaces reach it; empty for store_endpoint."""
    store_region: str = "us-east-1"
    aggregator_secret: str = "tributary-aggregator"
    """Secret of a hub namespace with the S3 identity of aggregation and evaluation."""
    serving_secret: str = "tributary-serving"
    """Secret of a hub namespace with the S3 identity of compression, gate and serving."""
    hub_service_account: str = "tributary-job"
    """Service account of the operator's pods in hub namespaces; it may do nothing."""
    hub_job_resources: Annotated[Json[Resources], Field(validate_default=True)] = "{}"  # type: ignore[assignment]
    """Requests and limits of aggregation, evaluation, compression and gate, as JSON."""
    hub_job_deadline_seconds: Annotated[int, Field(ge=1)] = 3600
    """A Job in a hub namespace is stopped after this time."""
    hub_job_backoff_limit: Annotated[int, Field(ge=0, le=10)] = 2
    """Further attempts for a Job in a hub namespace that failed."""
    accountant_processes: Annotated[int, Field(ge=1, le=16)] = 1
    """Processes that compute ε and σ; one takes about 150 MiB."""
    store_threads: Annotated[int, Field(ge=1, le=64)] = 16
    """Requests to the object store at the same time."""
    request_timeout_seconds: Annotated[int, Field(ge=1)] = 30
    """For one request to the API server."""
    watch_timeout_seconds: Annotated[int, Field(ge=10)] = 300
    """A watch is renewed after this time."""
    poll_seconds: Annotated[int, Field(ge=1)] = 15
    """How often a daemon looks at the object store while it waits for something there."""
    resync_seconds: Annotated[int, Field(ge=1)] = 600
    """How often a daemon looks at an object about which nothing happens."""
    cleanup_timeout_seconds: Annotated[int, Field(ge=1)] = 60
    """How long the deletion of an object may be held up by the removal of its children."""
    health_port: Annotated[int, Field(ge=1, le=65535)] = 8080
    """Port of /healthz, /readyz and /metrics."""
    stuck_after_seconds: Annotated[int, Field(ge=1)] = 600
    """/healthz fails when a single pass takes longer than this."""
    log_level: str = "INFO"

    @model_validator(mode="after")
    def _lease_times_are_in_order(self) -> Self:
        """A leader needs time to stop before its Lease ends, and a second attempt before it stops."""
        if not self.lease_retry_seconds < self.lease_renew_seconds < self.lease_duration_seconds:
            names = [f"lease_{part}_seconds" for part in ("retry", "renew", "duration")]
            raise ValueError(f"these must grow: {', '.join(_environment_name(name) for name in names)}")
        return self

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """The settings.

        Raises:
            SettingsInvalid: names each variable that is missing or wrong, and why.
        """
        try:
            return cls.model_validate({k: v for k, v in environment.items() if k.startswith(PREFIX)})
        except ValidationError as error:
            wrong = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
            raise SettingsInvalid("change the environment of the operator: " + "; ".join(wrong)) from error

    @classmethod
    def environment_names(cls) -> set[str]:
        return {_environment_name(field) for field in cls.model_fields}

    @property
    def lease_times(self) -> LeaseTimes:
        return LeaseTimes(self.lease_duration_seconds, self.lease_renew_seconds, self.lease_retry_seconds)

    @property
    def layout(self) -> Layout:
        return Layout(self.bucket)

    @property
    def store(self) -> StoreEndpoint:
        """The store as the operator reaches it."""
        return StoreEndpoint(endpoint=self.store_endpoint or None, region=self.store_region)

    @property
    def store_for_pods(self) -> StoreEndpoint:
        """The store as pods in hub namespaces reach it."""
        endpoint = self.store_endpoint_for_pods or self.store_endpoint
        return StoreEndpoint(endpoint=endpoint or None, region=self.store_region)
