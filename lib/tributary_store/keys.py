"""Every object key. Nothing else spells one; the prefixes are what the S3 policies scope."""

from __future__ import annotations

from dataclasses import dataclass

from tributary_api.meta import NamespacedName

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Layout:
    """The objects of one exchange bucket."""

    bucket: str

    def _uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    @property
    def models(self) -> str:
        """Folder of uncompressed bundles: those that were pushed as <sha256>/, see `aggregated_model`."""
        return self._uri("models/")

    @property
    def releases(self) -> str:
        """Folder of compressed bundles, each as <sha256>/."""
        return self._uri("releases/")

    @property
    def datasets(self) -> str:
        """Folder of public data sets."""
        return self._uri("datasets/")

    @property
    def clients(self) -> str:
        """Folder of all clients' deltas."""
        return self._uri("clients/")

    def client(self, client: NamespacedName) -> str:
        """Folder of one client's deltas."""
        # The client comes first: a `*` in a bucket policy crosses `/`, so only a leading part can be scoped.
        return f"{self.clients}{client.namespace}/{client.name}/"

    def plan(self, run_key: str) -> str:
        return self._uri(f"rounds/{run_key}/plan.json")

    def outcome(self, run_key: str) -> str:
        return self._uri(f"rounds/{run_key}/outcome.json")

    def aggregate_manifest(self, run_key: str) -> str:
        return self._uri(f"rounds/{run_key}/aggregate/{MANIFEST}")

    def aggregate_records(self, run_key: str) -> AggregateRecords:
        return AggregateRecords.beside(self.aggregate_manifest(run_key))

    def evaluation(self, run_key: str) -> str:
        return self._uri(f"rounds/{run_key}/evaluation.json")

    def _round_of_client(self, client: NamespacedName, run_key: str) -> str:
        # No attempt in it: two different deltas of one client and round must never both exist.
        return f"{self.client(client)}rounds/{run_key}"

    def delta(self, client: NamespacedName, run_key: str) -> str:
        return f"{self._round_of_client(client, run_key)}/delta.safetensors"

    def delta_manifest(self, client: NamespacedName, run_key: str) -> str:
        return f"{self._round_of_client(client, run_key)}/{MANIFEST}"

    def compression_manifest(self, key: str) -> str:
        return self._uri(f"releases/manifests/{key}.json")

    def gate_verdict(self, key: str) -> str:
        return self._uri(f"gates/{key}.json")


@dataclass(frozen=True, slots=True)
class AggregateRecords:
    """What the pods of an aggregation write down for one another, below `folder`.

    All but the exclusions lie under a key of the accepted deltas: with another set of them nothing is reused.
    """

    folder: str

    @classmethod
    def beside(cls, manifest_uri: str) -> AggregateRecords:
        """Those of the aggregation that ends with this manifest."""
        return cls(manifest_uri.removesuffix(MANIFEST))

    @property
    def exclusions(self) -> str:
        return f"{self.folder}excluded/"

    def exclusion(self, client: NamespacedName) -> str:
        return f"{self.exclusions}{client.namespace}.{client.name}.json"

    def shard(self, cohort_key: str, n: int) -> str:
        return f"{self.folder}{cohort_key}/shards/{n:05d}.json"

    def gram(self, cohort_key: str, n: int) -> str:
        return f"{self.folder}{cohort_key}/gram/{n:05d}.json"

    @property
    def progress(self) -> str:
        return f"{self.folder}progress/"

    def progress_mark(self, pod: int, percent: int) -> str:
        """Zero-padded, so that the last of a listing is the newest."""
        return f"{self.progress}{pod:03d}/{percent:03d}.json"


def aggregated_model(models_uri: str, cohort_key: str) -> str:
    """Where a model is written while it is being made: its digest is not known yet, what it is made of is."""
    return f"{models_uri.rstrip('/')}/{cohort_key}"


def optimizer_state(model_uri: str) -> str:
    """Folder, beside a model, of what the server optimizer remembers."""
    return f"{model_uri.rstrip('/')}-optimizer/"


def ledger_entry(ledger_uri: str, n: int) -> str:
    """The n-th entry of a ledger; zero-padded, so that a listing is in order."""
    return f"{ledger_uri.rstrip('/')}/{n:08d}.json"
