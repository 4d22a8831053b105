"""Every object key. Nothing else spells one; the prefixes are what the S3 policies scope."""

from __future__ import annotations

from dataclasses import dataclass

from tributary_api.meta import NamespacedName


@dataclass(frozen=True, slots=True)
class Layout:
    """The objects of one exchange bucket."""

    bucket: str

    def _uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    @property
    def models(self) -> str:
        """Folder of uncompressed bundles, each as <sha256>/."""
        return self._uri("models/")

    @property
    def releases(self) -> str:
        """Folder of compressed bundles, each as <sha256>/."""
        return self._uri("releases/")

    def plan(self, run_key: str) -> str:
        return self._uri(f"rounds/{run_key}/plan.json")

    def outcome(self, run_key: str) -> str:
        return self._uri(f"rounds/{run_key}/outcome.json")

    def aggregate_manifest(self, run_key: str) -> str:
        return self._uri(f"rounds/{run_key}/aggregate/manifest.json")

    def evaluation(self, run_key: str) -> str:
        return self._uri(f"rounds/{run_key}/evaluation.json")

    def _client(self, client: NamespacedName, run_key: str) -> str:
        # The client comes first: a `*` in a bucket policy crosses `/`, so only a leading part can be scoped.
        # No attempt in it: two different deltas of one client and round must never both exist.
        return f"clients/{client.namespace}/{client.name}/rounds/{run_key}"

    def delta(self, client: NamespacedName, run_key: str) -> str:
        return self._uri(f"{self._client(client, run_key)}/delta.safetensors")

    def delta_manifest(self, client: NamespacedName, run_key: str) -> str:
        return self._uri(f"{self._client(client, run_key)}/manifest.json")

    def compression_manifest(self, key: str) -> str:
        return self._uri(f"releases/manifests/{key}.json")

    def gate_verdict(self, key: str) -> str:
        return self._uri(f"gates/{key}.json")


def ledger_entry(ledger_uri: str, n: int) -> str:
    """The n-th entry of a ledger; zero-padded, so that a listing is in order."""
    return f"{ledger_uri.rstrip('/')}/{n:08d}.json"
