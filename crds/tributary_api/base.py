"""What every model of the contract shares: spelling, strictness and the scalar types of the API."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel

GROUP = "tributary.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
CATEGORY = "tributary"

DECIMAL_PATTERN = r"^[0-9]{1,6}(\.[0-9]{1,12})?(e-?[0-9]{1,2})?$"

Decimal = Annotated[str, Field(pattern=DECIMAL_PATTERN, max_length=24)]
"""A non-negative real number as text, since the API conventions forbid floats in a spec."""

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71)]
S3Uri = Annotated[str, Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?$", max_length=1024)]
DataUri = Annotated[
    str, Field(pattern=r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/.*|pvc://[a-z0-9.-]+/.*)$", max_length=1024)
]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", max_length=63)]
ImageReference = Annotated[str, Field(pattern=r"^[^\s@]+@sha256:[0-9a-f]{64}$", max_length=512)]
"""An image pinned by digest: a tag can be moved under a tenant's feet."""

PublicKey = Annotated[str, Field(pattern=r"^ed25519:[0-9a-f]{64}$", max_length=72)]
"""Public half of an Ed25519 key."""

Quantity = Annotated[str | int, WithJsonSchema({"x-kubernetes-int-or-string": True})]
IntOrPercent = Annotated[
    str | int,
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": r"^(100|[1-9]?[0-9])%$"}),
]
Labels = Annotated[dict[str, Annotated[str, Field(max_length=253)]], Field(max_length=32)]


def validations(*rules: tuple[str, str]) -> dict[str, Any]:
    """CEL rules of an object, as (expression, message) pairs, for `json_schema_extra`."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules]}


class ApiModel(BaseModel):
    """Reads leniently (unknown fields are ignored, so that a downgrade works); the API server is the strict one."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="ignore",
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def to_json_object(self) -> dict[str, Any]:
        """The object as the API server and the object store know it: camelCase, absent instead of null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def canonical_json(self) -> bytes:
        """One spelling of the value, for hashing and for create-only objects."""
        return canonical_json(self.to_json_object())


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_of(data: bytes) -> str:
    """A digest in the contract's spelling, `sha256:<hex>`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
