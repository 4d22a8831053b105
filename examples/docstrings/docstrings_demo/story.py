"""The demo from top to bottom: three owners improve one model, which goes live and is replaced under load."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from docstrings_demo import basemodel, manifests
from docstrings_demo.live import View
from docstrings_demo.observe import Load, Seen, is_true
from docstrings_demo.owners import (
    BUCKET,
    CHECKOUT,
    DATASET_URI,
    DOCUMENTS_MAX,
    HUB_NAMESPACE,
    OPERATOR_NAMESPACE,
    OWNERS,
    Owner,
)
from docstrings_demo.podjobs import ScriptJob
from docstrings_demo.podtasks import LoadTask, PretrainTask, PublishTask
from docstrings_demo.problems import DemoError
from docstrings_demo.stage import Identities, Stage, create_identities
from docstrings_demo.waiting import Watch
from tributary_api.base import sha256_of
from tributary_api.meta import Condition
from tributary_api.release import ModelRelease
from tributary_api.round import FederatedRound
from tributary_api.shared import DatasetRef, ModelRef
from tributary_store.keys import Layout

ROUND_SECONDS_MAX = 1500
RELEASE_SECONDS_MAX = 900
LOAD_SECONDS_MAX = 180
LOAD_AFTER_SWITCH_SECONDS = 25
"""Long enough for the old pods to be retired and drained under load, too."""
LOAD_CONNECTIONS = 4
COMPLETION_TOKENS = 4
COMPLETION_TIMEOUT_SECONDS = 60.0


@dataclass
class Demo:
    """One run."""

    stage: Stage
    view: View
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.stage.kube, self.view)

    def run(self) -> tuple[Seen, Load]:
        """Gives what there is to see at the end, and the last counters of the load generator."""
        identities = create_identities(self.stage.s3)
        self.install_operator(identities)
        self.invite_owners(identities)
        publishing = [self.start_publishing(owner) for owner in OWNERS]
        base_model = self.base_model()
        dataset = self.public_evaluation_set(publishing)
        self.run_round("round-1", dataset, base_model)
        self.release("release-1", dataset)
        self.start_load()
        self.run_round("round-2", dataset)
        self.release("release-2", dataset)
        load = self.end_load()
        return self.watch.look(), load

    def install_operator(self, identities: Identities) -> None:
        self.view.headline("The operator: charts/tributary")
        endpoint = self.stage.s3.endpoint_for_host
        values = manifests.operator_values(
            self.stage.images, self.stage.store_for_pods, endpoint, identities.hub
        )
        self.stage.kube.install("tributary", CHECKOUT / "charts" / "tributary", OPERATOR_NAMESPACE, values)

    def invite_owners(self, identities: Identities) -> None:
        chart, image = CHECKOUT / "charts" / "tributary-client", self.stage.images["worker"]
        for owner in OWNERS:
            self.view.headline(f"{owner.namespace} opts in: charts/tributary-client")
            keys = identities.owners[owner.namespace]
            values = manifests.client_values(owner, image, self.stage.store_for_pods, keys)
            self.stage.kube.install(f"{owner.namespace}-docstrings", chart, OPERATOR_NAMESPACE, values)

    def start_publishing(self, owner: Owner) -> ScriptJob:
        """The owner reads its docstrings in its own namespace, and publishes a tenth of them."""
        declared = manifests.declared_data(owner)
        task = PublishTask(
            packages=list(owner.packages),
            documents_max=DOCUMENTS_MAX,
            store=self.stage.store_for_pods,
            private_uri=owner.private_uri,
            published_uri=owner.published_uri,
            declared_examples=declared.num_examples,
            holdout_fraction=float(declared.holdout_fraction),
        )
        job = ScriptJob("publish", owner.namespace, "publish", task, s3_secret="tributary-store")
        return self.start(job)

    def base_model(self) -> ModelRef:
        store, models_uri = self.stage.admin_store(), Layout(BUCKET).models
        kept = basemodel.push_cached(store, models_uri)
        if kept:
            self.view.headline(f"The base model that an earlier run has trained: {kept.digest}")
            return kept
        self.view.headline("The base model, trained on the standard library's docstrings (3 minutes)")
        task = PretrainTask(store=self.stage.store_for_pods, models_uri=models_uri)
        job = ScriptJob(
            "pretrain",
            HUB_NAMESPACE,
            "pretrain",
            task,
            s3_secret="tributary-aggregator",
            threads=2,
            requests={"cpu": "1", "memory": "1Gi"},
        )
        ref = ModelRef.model_validate(self.watch.result(self.start(job))["model"])
        basemodel.keep(store, ref)
        return ref

    def public_evaluation_set(self, publishing: Sequence[ScriptJob]) -> DatasetRef:
        """All published samples in one public object."""
        self.view.headline("The public evaluation set: what the owners have published")
        for job in publishing:
            self.watch.result(job)
        store = self.stage.admin_store()
        data = b"".join(store.get(owner.published_uri) for owner in OWNERS)
        store.put_new(DATASET_URI, data)
        return DatasetRef(uri=DATASET_URI, digest=sha256_of(data))

    def run_round(self, name: str, dataset: DatasetRef, base_model: ModelRef | None = None) -> None:
        self.view.headline(f"{name}: every owner trains where its text is")
        self.stage.kube.apply([manifests.fedround(name, dataset, base_model)])
        self.watch.until(
            lambda seen: is_complete(seen.round(name)),
            ROUND_SECONDS_MAX,
            subject=name,
            conditions=lambda seen: conditions_of(seen.round(name)),
        )

    def release(self, name: str, dataset: DatasetRef) -> None:
        self.view.headline(f"{name}: compress, prove no worse, switch")
        manifest = manifests.release(name, dataset)
        self.stage.kube.apply([manifest])
        subject, fedround = manifest["metadata"]["name"], manifest["spec"]["model"]["roundRef"]["name"]
        self.watch.until(
            lambda seen: serves(seen.release(subject), seen.round(fedround)),
            RELEASE_SECONDS_MAX,
            subject=subject,
            conditions=lambda seen: conditions_of(seen.release(subject)),
        )

    def start_load(self) -> None:
        self.view.headline("Requests without pause, from here to the end")
        task = LoadTask(
            url=manifests.service_url("release-1"),
            model=manifests.release_name("release-1"),
            connections=LOAD_CONNECTIONS,
            max_tokens=COMPLETION_TOKENS,
            timeout_seconds=COMPLETION_TIMEOUT_SECONDS,
        )
        self.watch.load_job = self.start(ScriptJob("load", HUB_NAMESPACE, "load", task))
        self.watch.until(
            lambda seen: seen.load is not None and seen.load.sent > 0, LOAD_SECONDS_MAX, subject="load"
        )

    def end_load(self) -> Load:
        self.view.headline("Requests go on while the old revision drains")
        end = time.monotonic() + LOAD_AFTER_SWITCH_SECONDS
        self.watch.until(lambda _: time.monotonic() > end, LOAD_SECONDS_MAX, subject="load")
        if self.watch.load_job is None:
            raise DemoError("the load generator was not started")
        for pod in self.watch.pods(self.watch.load_job):
            # The script ends at SIGTERM and prints its last counters; its pod stays to be read.
            ended = "import os; os.kill(1, 15)"
            self.stage.kube.kubectl("exec", "-n", HUB_NAMESPACE, pod, "--", "python", "-c", ended)
        seen = self.watch.until(
            lambda seen: seen.load is not None and seen.load.final, LOAD_SECONDS_MAX, subject="load"
        )
        return seen.load or Load()

    def start(self, job: ScriptJob) -> ScriptJob:
        self.stage.kube.apply(job.objects(self.stage.images["worker"]))
        return job


def is_complete(fedround: FederatedRound | None) -> bool:
    return fedround is not None and is_true(fedround.status.conditions, "Complete")


def serves(release: ModelRelease | None, fedround: FederatedRound | None) -> bool:
    """Whether the release has switched to the model of this round and is ready."""
    if release is None or fedround is None or release.status.stable is None:
        return False
    current = release.status.observed_generation == release.metadata.generation
    right = release.status.stable.parent == fedround.status.model
    return current and right and is_true(release.status.conditions, "Ready")


def conditions_of(item: FederatedRound | ModelRelease | None) -> Sequence[Condition]:
    return item.status.conditions if item else ()
