"""The three data owners, and every name of the demo that is not written in its manifests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MANIFESTS = Path(__file__).resolve().parents[1] / "manifests"
CHECKOUT = Path(__file__).resolve().parents[3]

HUB_NAMESPACE = "hub"
OPERATOR_NAMESPACE = "tributary-system"
BUCKET = "tributary"
DATASET_URI = f"s3://{BUCKET}/datasets/docstrings.jsonl"


DOCUMENTS_MAX = 3000
"""Of each owner: more would make every training step less noisy, and every evaluation longer."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A data owner: a namespace, a bucket, an S3 identity, and the packages whose docstrings are its text."""

    namespace: str
    packages: tuple[str, ...]

    @property
    def bucket(self) -> str:
        return f"{self.namespace}-data"

    @property
    def private_uri(self) -> str:
        return f"s3://{self.bucket}/private/documents.jsonl"

    @property
    def published_uri(self) -> str:
        return f"s3://{self.bucket}/published/documents.jsonl"

    @property
    def values(self) -> Path:
        return MANIFESTS / f"client-{self.namespace}.yaml"


OWNERS = (
    Owner("algebra", ("sympy",)),
    Owner("arrays", ("networkx", "numpy", "scipy")),
    Owner("language", ("transformers",)),
)
"""All of these packages are in the worker image anyway."""
