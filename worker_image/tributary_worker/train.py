"""The `train` stage: one client's private update of the round's model.

DP-SGD (Abadi et al. 2016) with Poisson sampling, as this file says from top to bottom:

    adopt the delta if it is published already       check consent, grant and ledger
    load the base model and exactly N records        derive the keys for sampling and noise
    test the engine, then charge the ledger          T steps: sample, clip, sum, add noise, update
    publish the delta, then its manifest

The only things that leave are the noised delta and public numbers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from tributary_accounting import receipts
from tributary_accounting.ledger import Ledger
from tributary_accounting.signatures import SignatureRefused, SigningKey
from tributary_api.base import canonical_json, sha256_of
from tributary_api.client import FederatedClient
from tributary_api.failures import Reason
from tributary_api.meta import NamespacedName
from tributary_api.records import DeltaManifest, FileDigest, Receipt, SelfTestFigures
from tributary_api.tasks import DATA_CREDENTIALS_PREFIX, DATA_MOUNT_PATH, NOISE_KEY_PATH, TrainTask
from tributary_store.digests import digest_of_file
from tributary_store.errors import ObjectExists
from tributary_store.objects import Objects
from tributary_worker import consent, distributed
from tributary_worker.adoption import is_ours
from tributary_worker.aggregation.norms import l2_norm
from tributary_worker.aggregation.numbers import Array
from tributary_worker.base_model import BaseModel, delta_of, frozen_factors, load_base_model, mark_trained
from tributary_worker.batches import TokenizedRecords
from tributary_worker.consent import SERVICE_ACCOUNT_PATH, ApiServer
from tributary_worker.data import Files, files_of, read_private_data
from tributary_worker.delta_file import write_delta
from tributary_worker.distributed import on_first_rank
from tributary_worker.failures import StageFailure
from tributary_worker.objectives import OBJECTIVES, Batch, synthetic_batch
from tributary_worker.privacy.engine import EngineSettings, PrivateEngine
from tributary_worker.privacy.errors import PrivacyError, UnsupportedError
from tributary_worker.privacy.keystream import TENANT_KEY_BYTES_MIN, Keystream, derive_key
from tributary_worker.privacy.selftest import run_self_test
from tributary_worker.store_access import open_store, store_failures

DIGEST_PREFIX = "sha256:"
VERSIONED = ("tributary", "torch", "deepspeed", "dp-accounting")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a training reaches outside its process."""

    store: Objects
    files: Files
    client: Callable[[], FederatedClient]
    tenant_key: bytes
    now: Callable[[], datetime]

    @property
    def receipt_key(self) -> SigningKey:
        """Signs what this owner states about a delta."""
        return SigningKey.of_tenant(self.tenant_key)


def run(task: TrainTask, layout: distributed.RankLayout, root: Path) -> int:
    """One process of a training pod, whose mounts lie below `root`; gives the exit code."""
    with distributed.process_group(layout):
        train(task, surroundings_of(task, root))
    return 0


def train(task: TrainTask, world: Surroundings) -> None:
    """One rank's part of the training; all ranks of the process group call it."""
    if on_first_rank(lambda: find_published(task, world) is not None):
        return
    on_first_rank(lambda: check_permission(task, world))
    with tempfile.TemporaryDirectory() as directory:
        base = load_base_model(task, world.store, Path(directory))
        records, snapshot_hash = load_records(task, world.files, base)
        try:
            delta, figures = train_privately(task, world, base, records, snapshot_hash)
        except UnsupportedError as error:
            raise StageFailure(Reason.MODEL_UNSUPPORTED, str(error)) from error
        except PrivacyError as error:
            raise StageFailure(Reason.SELF_TEST_FAILED, str(error)) from error
        on_first_rank(lambda: publish(task, world, delta, frozen_factors(task, base), figures))


def train_privately(
    task: TrainTask, world: Surroundings, base: BaseModel, records: TokenizedRecords, snapshot_hash: str
) -> tuple[dict[str, Array], SelfTestFigures]:
    """The algorithm itself; gives the noised delta, on the first rank, and what the self-test measured."""
    mark_trained(task, base)
    engine = build_engine(task, base.model, world.tenant_key, snapshot_hash)
    figures = run_self_test(engine, random_records(task, base.model, engine))
    on_first_rank(lambda: record_launch(task, world))
    for step in range(task.grant.mechanism.steps):
        engine.train_step(step, lambda indices: records.batch(indices, engine.device))
        report_progress(engine, step + 1)
    with engine.gathered() as weights:
        trained = dict(zip(engine.trained.names, weights, strict=True))
        return delta_of(task, base, trained) if engine.rank == 0 else {}, figures


def surroundings_of(task: TrainTask, root: Path) -> Surroundings:
    """The real ones, with the pod's mounts below `root`."""
    store = open_store(task.store)
    data_store = open_store(task.data.store, DATA_CREDENTIALS_PREFIX) if task.data.store else store
    return Surroundings(
        store=store,
        files=files_of(task.data, data_store, below(root, DATA_MOUNT_PATH)),
        client=lambda: ApiServer.of_cluster(below(root, SERVICE_ACCOUNT_PATH)).client(task.grant.client),
        tenant_key=read_tenant_key(below(root, NOISE_KEY_PATH)),
        now=lambda: datetime.now(UTC),
    )


def below(root: Path, path: str) -> Path:
    return root / path.removeprefix("/")


def read_tenant_key(path: Path) -> bytes:
    key = path.read_bytes() if path.exists() else b""
    if len(key) < TENANT_KEY_BYTES_MIN:
        raise StageFailure(
            Reason.TASK_INVALID,
            f"{path} must hold {TENANT_KEY_BYTES_MIN} random bytes: see the Secret of the tenant's chart",
        )
    return key


def find_published(task: TrainTask, world: Surroundings) -> DeltaManifest | None:
    """The manifest of an earlier attempt: there is at most one delta of a client and round, ever."""
    with store_failures():
        if world.store.head(task.manifest_uri) is None:
            return None
        manifest = DeltaManifest.model_validate_json(world.store.get(task.manifest_uri))
    try:
        receipts.check(manifest, task.grant, world.receipt_key.public)
    except (receipts.ReceiptRefused, SignatureRefused) as error:
        message = f"{task.manifest_uri} is in the way: {error}; create another round, this run is charged"
        raise StageFailure(Reason.GRANT_REFUSED, message) from error
    return manifest


def check_permission(task: TrainTask, world: Surroundings) -> None:
    """Refuse what the owner did not agree to, what the grant does not say, and what the budget does not
    hold."""
    client = world.client()
    consent.check_consent(task, client, world.receipt_key.public, world.now())
    consent.check_grant(task)
    consent.check_reservation(ledger_of(task, world), task.grant, client.spec.privacy.budget)


def record_launch(task: TrainTask, world: Surroundings) -> None:
    """From here on the privacy cost counts as spent, whatever happens to this process.

    Not earlier: data or a model that cannot be used cost the owner nothing.
    """
    consent.launch(ledger_of(task, world), task.grant, world.receipt_key.public)


def ledger_of(task: TrainTask, world: Surroundings) -> Ledger:
    data_set = NamespacedName(namespace=task.grant.client.namespace, name=task.grant.data_name)
    return Ledger(world.store, task.ledger_uri, data_set, world.now)


def load_records(task: TrainTask, files: Files, base: BaseModel) -> tuple[TokenizedRecords, str]:
    """Exactly the N records that the accountant counts on, as tokens; and the digest of the data they come
    from."""
    data = read_private_data(files, task.data, task.grant.mechanism.num_examples)
    length = task.training.max_sequence_length
    records = TokenizedRecords(data.records, base.tokenizer, task.task, length, base.model.config)
    return records, data.snapshot_hash


def build_engine(task: TrainTask, model: Any, tenant_key: bytes, snapshot_hash: str) -> PrivateEngine:
    """The private engine around a model whose trained weights are marked, with keys that belong to this grant
    and this data."""
    computation = computation_hash(task)
    objective = OBJECTIVES[task.task]
    return PrivateEngine(
        model,
        lambda batch: objective(model, batch),
        mechanism=task.grant.mechanism,
        sampling_key=derive_key(tenant_key, computation, snapshot_hash, "sampling"),
        noise_key=derive_key(tenant_key, computation, snapshot_hash, "noise"),
        settings=EngineSettings(
            zero_stage=task.training.deepspeed.zero_stage,
            micro_batch_size=task.training.micro_batch_size,
            learning_rate=float(task.training.learning_rate),
            optimizer=task.training.optimizer,
            proximal_mu=float(task.training.proximal_mu),
            gradient_checkpointing=task.training.gradient_checkpointing,
        ),
    )


def computation_hash(task: TrainTask) -> str:
    """Hex digest of what the gradients depend on besides the data: the hub chooses the settings, and must not
    get the same noise on two gradients by choosing twice."""
    parts = [part.to_json_object() for part in (task.grant, task.method, task.training)]
    return sha256_of(canonical_json([*parts, task.task])).removeprefix(DIGEST_PREFIX)


def random_records(task: TrainTask, model: Any, engine: PrivateEngine) -> Batch:
    """What the self-test trains on instead of data."""
    size, length = task.training.micro_batch_size, task.training.max_sequence_length
    return synthetic_batch(task.task, model.config, size, length, engine.device)


def report_progress(engine: PrivateEngine, done: int) -> None:
    """One line on stdout for each step. Public numbers only: no loss, no norm, no count."""
    if engine.rank == 0:
        print(json.dumps({"step": done, "steps": engine.mechanism.steps}), flush=True)


def publish(
    task: TrainTask,
    world: Surroundings,
    delta: Mapping[str, Array],
    constant: Mapping[str, Array],
    figures: SelfTestFigures,
) -> None:
    """Write the delta, then the signed manifest that makes it exist. Both are create-only."""
    with tempfile.TemporaryDirectory() as directory, store_failures():
        path = Path(directory) / "delta.safetensors"
        check_finite(delta)
        write_delta(path, delta, constant, task.delta_encoding, rounding_stream(task, world))
        file = upload_once(world.store, task.delta_uri, path)
        manifest = DeltaManifest(
            run_key=task.grant.run_key,
            client=task.grant.client,
            base_model_digest=task.base_model.digest,
            file=file,
            l2_norm=l2_norm(path, task.method),
            receipt=receipt(task, figures),
        )
        try:
            signed = world.receipt_key.signed(manifest)
            world.store.put_new(task.manifest_uri, signed.canonical_json(), retain=True)
        except ObjectExists:
            # Another attempt was faster; it is the same delta, computed with the same noise.
            find_published(task, world)


def rounding_stream(task: TrainTask, world: Surroundings) -> Keystream:
    """Random bits for an encoding that rounds. Privacy does not rest on them, so they know no data."""
    return Keystream(derive_key(world.tenant_key, computation_hash(task), "", "rounding"))


def check_finite(delta: Mapping[str, Array]) -> None:
    """Raises: StageFailure: noise and learning rate together ran out of bounds. This says nothing about the
    data that the noised delta would not say."""
    if not all(bool(np.isfinite(values).all()) for values in delta.values()):
        raise StageFailure(Reason.NON_FINITE_DELTA, "the delta is not finite: lower training.learningRate")


def upload_once(store: Objects, uri: str, path: Path) -> FileDigest:
    """Upload the delta; gives the digest of what is there, which an earlier attempt may have written, and
    leaves that at `path`.

    That one died before its manifest. Its delta has the same noise, so only rounding can differ from this
    one, and the first to be written is the one that counts: two deltas must never both be published.
    """
    try:
        return store.upload_new(uri, path)
    except ObjectExists:
        found = path.with_name("found")
        found.write_bytes(store.get(uri))
        if not is_ours(path, found):
            message = f"{uri} is in the way and not what this owner's data and key give: create another round"
            raise StageFailure(Reason.GRANT_REFUSED, message) from None
        return digest_of_file(found.replace(path))


def receipt(task: TrainTask, figures: SelfTestFigures) -> Receipt:
    return Receipt(
        grant_digest=task.grant.digest,
        mechanism=task.grant.mechanism,
        epsilon=task.grant.epsilon,
        delta=task.grant.delta,
        self_test=figures,
        versions={name: installed_version(name) for name in VERSIONED},
        image=task.image,
    )


def installed_version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        # Run from its sources, as in the image: `Receipt.image` says which.
        return "source"
