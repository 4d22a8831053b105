"""Releases and a small world for them: a store, Jobs, Deployments and a Service that do what they are told.

The world checks the promise about the Service itself, at the moment when it is switched.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from kubernetes.aio.client import V1Deployment, V1Job, V1PodDisruptionBudget, V1Service
from signers import HUB_ENVIRONMENT

from tributary_api.records import CompressionManifest, GateVerdict, ModelScore
from tributary_api.release import ModelRelease, ModelReleaseStatus, Revision
from tributary_api.shared import ModelRef
from tributary_operator import conditions, names
from tributary_operator.decision import Decision, Delete, JsonPatch
from tributary_operator.jobs import JobState, ObservedJob
from tributary_operator.kinds import DEPLOYMENT, SERVICE
from tributary_operator.releases import identity
from tributary_operator.releases.children import SELECTED
from tributary_operator.releases.decide import decide
from tributary_operator.releases.observed import ObservedRelease, ObservedRevision, ObservedService, Source
from tributary_operator.releases.situation import Situation
from tributary_operator.rounds.observed import Attempts, WorkerFailure
from tributary_operator.settings import Settings

T0 = datetime(2026, 1, 1, tzinfo=UTC)
IMAGE = "localhost/tributary-worker@sha256:" + "a" * 64
SETTINGS = Settings.from_environment(
    {"TRIBUTARY_WORKER_IMAGE": IMAGE, "TRIBUTARY_BUCKET": "tributary", **HUB_ENVIRONMENT}
)
INT8 = {"quantize": {"scheme": "Int8"}}
CRASH = WorkerFailure("InternalError", "it crashed", True)
ANALYSIS_SECONDS = 10
DELAY_SECONDS = 30


def a_model(name: str) -> ModelRef:
    digest = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    return ModelRef(uri=f"s3://tributary/models/{name}", digest=digest)


def a_release(
    model: str = "m1",
    *,
    status: ModelReleaseStatus | None = None,
    generation: int = 1,
    strategy: Any = None,
    serving: Any = None,
    **spec: Any,
) -> ModelRelease:
    """A valid ModelRelease; a test spells out only what it is about."""
    blue_green = {
        "scaleDownDelaySeconds": DELAY_SECONDS,
        "postPromotion": {"analysisSeconds": ANALYSIS_SECONDS},
        **(strategy or {}),
    }
    digest = "sha256:" + "d" * 64
    found = ModelRelease.model_validate(
        {
            "metadata": {"name": "assistant", "namespace": "hub", "uid": "u1", "generation": generation},
            "spec": {
                "model": a_model(model).to_json_object(),
                "compression": [INT8],
                "gate": {
                    "dataset": {"uri": "s3://tributary/datasets/public.jsonl", "digest": digest},
                    "metrics": [{"margin": "0.02"}],
                },
                "serving": {"serviceName": "assistant", "replicas": 2, **(serving or {})},
                "strategy": {"blueGreen": blue_green},
                **spec,
            },
        }
    )
    return found.model_copy(update={"status": status or ModelReleaseStatus()})


def score(role: Any, model: ModelRef, loss: float) -> ModelScore:
    return ModelScore(
        role=role, model=model, loss=loss, perplexity=2.0, accuracy=0.5, documents=10, tokens=100
    )


def a_verdict(candidate: ModelRef, parent: ModelRef, verdict: Any = "PASS") -> GateVerdict:
    return GateVerdict(
        verdict=verdict,
        reason="NoWorse" if verdict == "PASS" else "Worse",
        message="" if verdict == "PASS" else "loss is worse by 0.1, more than the margin 0.02",
        scores=[score("candidate", candidate, 3.25), score("parent", parent, 3.24)],
        comparisons=[],
    )


class Conflict(Exception):
    """A JSON patch whose test does not hold."""


class BrokenPromise(AssertionError):
    """The Service was switched to pods that cannot answer, or lost those that do."""


@dataclass
class Deployment:
    record: Revision
    replicas: int
    ready: int = 0
    problem: str = ""


@dataclass
class World:
    release: ModelRelease
    now: datetime = T0
    deployments: dict[str, Deployment] = field(default_factory=dict)
    """By revision."""
    service: ObservedService | None = None
    jobs: list[ObservedJob] = field(default_factory=list)
    compressed: dict[str, CompressionManifest] = field(default_factory=dict)
    verdicts: dict[str, GateVerdict] = field(default_factory=dict)
    has_budget: bool = False
    started_pods: int = 0
    jobs_created: int = 0
    tasks: dict[str, Any] = field(default_factory=dict)
    """Of Jobs, by name."""
    is_model_known: bool = True
    losses: dict[str, float] = field(default_factory=dict)
    """By digest of the model, as the gate measures them."""
    candidate_loss: float = 3.25
    """Of models that no gate has measured yet."""

    # What the operator sees.

    def situation(self) -> Situation:
        model = self.release.spec.model
        ref = ModelRef(uri=model.uri or "", digest=model.digest or "")
        source = Source(ref, 400) if self.is_model_known else Source(None, 0, "BaseRoundPending", "not yet")
        revisions = {name: self._observed(name, d) for name, d in self.deployments.items()}
        seen = ObservedRelease(
            source, revisions=revisions, service=self.service, has_disruption_budget=self.has_budget
        )
        s = Situation(self.release, seen, SETTINGS, self.now)
        if not self.is_model_known or s.target == s.stable:
            return s
        if self.release.spec.compression:
            key = identity.compression_key(self.release, ref, SETTINGS)
            s = s.with_seen(
                compression=self.compressed.get(key), compressing=self._attempts(names.COMPRESS, key)
            )
        if s.candidate_model is None:
            return s
        key = identity.gate_key(self.release, s.candidate_model, ref, s.rivals, SETTINGS)
        return s.with_seen(verdict=self.verdicts.get(key), gating=self._attempts(names.GATE, key))

    def _observed(self, name: str, found: Deployment) -> ObservedRevision:
        return ObservedRevision(
            record=found.record,
            namespace="hub",
            name=f"assistant-{name}",
            uid=f"uid-{name}",
            replicas=found.replicas,
            ready=min(found.ready, found.replicas),
            is_settled=found.ready == found.replicas,
            problem=found.problem,
        )

    def _attempts(self, stage: str, key: str) -> Attempts:
        jobs = tuple(j for j in self.jobs if j.stage == stage and j.labels[names.RECORD] == key)
        ended = any(not job.is_active for job in jobs)
        return Attempts(jobs, CRASH if ended else None)

    # What the operator does.

    def run_pass(self, actions_max: int | None = None) -> Decision[ModelReleaseStatus]:
        """Decide and carry out; the operator is killed after `actions_max` actions."""
        decision = decide(self.situation())
        actions = [*decision.apply, *decision.delete, decision.status]
        for action in actions[:actions_max]:
            try:
                self._carry_out(action)
            except Conflict:
                break
        return decision

    def settle(self, passes_max: int = 60, seconds: float = 1.0) -> Decision[ModelReleaseStatus]:
        """Passes in a world where everything succeeds, until nothing happens any more."""
        for _ in range(passes_max):
            before = self._picture()
            decision = self.run_pass()
            self.succeed()
            self.now += timedelta(seconds=seconds)
            waits = decision.poll_after is not None and decision.poll_after < timedelta(seconds=15)
            if self._picture() == before and not waits:
                return decision
        return decision

    def _picture(self) -> Any:
        deployments = {k: replace(v) for k, v in self.deployments.items()}
        return deployments, self.service, list(self.jobs), self.release.status

    def _carry_out(self, action: Any) -> None:
        match action:
            case ModelReleaseStatus():
                self.release = self.release.model_copy(update={"status": action})
            case V1Job():
                self._create_job(action)
            case V1Deployment():
                record = Revision.model_validate_json(action.metadata.annotations[names.REVISION_RECORD])
                self.deployments.setdefault(record.revision, Deployment(record, action.spec.replicas))
                self.started_pods += action.spec.replicas
            case V1Service():
                self._select(action.spec.selector[names.REVISION], action.spec.ports[0].port)
            case V1PodDisruptionBudget():
                self.has_budget = True
            case JsonPatch():
                self._patch(action)
            case Delete():
                self._delete(action)
            case _:
                raise TypeError(action)

    def _create_job(self, job: V1Job) -> None:
        labels, name = job.metadata.labels, job.metadata.name
        assert name not in {known.name for known in self.jobs}, f"{name} is created twice"
        self.jobs_created += 1
        attempt = int(labels[names.ATTEMPT])
        stage = labels[names.STAGE]
        self.jobs.append(ObservedJob("hub", name, f"uid-{name}", stage, attempt, JobState.PENDING, labels))
        (env,) = [e for e in job.spec.template.spec.containers[0].env if e.name == "TRIBUTARY_TASK"]
        self.tasks[name] = env.value

    def _patch(self, patch: JsonPatch) -> None:
        test, change = patch.operations
        if patch.kind == SERVICE:
            assert self.service is not None
            if self.service.revision != test["value"]:
                raise Conflict(patch)
            if change["path"] == SELECTED:
                self._select(change["value"], self.service.port)
            else:
                self.service = replace(self.service, port=change["value"])
        elif patch.kind == DEPLOYMENT:
            (found,) = [d for name, d in self.deployments.items() if f"assistant-{name}" == patch.name]
            if found.replicas != test["value"]:
                raise Conflict(patch)
            self.started_pods += max(0, change["value"] - found.replicas)
            found.replicas = change["value"]
            found.ready = min(found.ready, found.replicas)

    def _select(self, revision: str, port: int) -> None:
        found = self.deployments.get(revision)
        if found is None or found.replicas < 1 or found.ready != found.replicas:
            raise BrokenPromise(f"the Service would select {revision}: {found}")
        self.service = ObservedService("hub", "assistant", "uid-service", revision, port)

    def _delete(self, deletion: Delete) -> None:
        for name in list(self.deployments):
            if deletion.uid == f"uid-{name}":
                if self.service is not None and self.service.revision == name:
                    raise BrokenPromise(f"the pods of {name} are removed while the Service selects them")
                del self.deployments[name]

    # What happens in the world.

    def succeed(self) -> None:
        """Jobs write their records and end, pods become ready."""
        for job in list(self.jobs):
            if job.is_active:
                self.end_job(job, succeeds=True)
        for found in self.deployments.values():
            if not found.problem:
                found.ready = found.replicas

    def end_job(self, job: ObservedJob, *, succeeds: bool, verdict: str = "PASS") -> None:
        key = job.labels[names.RECORD]
        if succeeds and job.stage == names.COMPRESS:
            parent = ModelRef.model_validate_json(_field(self.tasks[job.name], "model"))
            compressed = a_model(f"int8 {parent.digest}")
            self.compressed[key] = CompressionManifest(
                parent=parent, model=compressed, bytes=100, parent_bytes=400
            )
        elif succeeds:
            task = self.tasks[job.name]
            candidate, parent = (
                ModelRef.model_validate_json(_field(task, f)) for f in ("candidate", "parent")
            )
            self.verdicts[key] = self._verdict(json.loads(task), candidate, parent, verdict)
        state = JobState.SUCCEEDED if succeeds else JobState.FAILED
        self.jobs[self.jobs.index(job)] = replace(job, state=state)

    def _verdict(self, task: Any, candidate: ModelRef, parent: ModelRef, verdict: str) -> GateVerdict:
        self.losses.setdefault(candidate.digest, self.candidate_loss)
        found = a_verdict(candidate, parent, verdict)
        rivals = {role: ModelRef.model_validate(task[role]) for role in ("stable", "best") if role in task}
        scores = [
            score("candidate", candidate, self.losses[candidate.digest]),
            score("parent", parent, 3.24),
            *(score(role, ref, self.losses.get(ref.digest, 3.25)) for role, ref in rivals.items()),
        ]
        return found.model_copy(update={"scores": scores})

    def lose_pod(self, revision: str) -> None:
        found = self.deployments[revision]
        found.ready = max(0, found.ready - 1)

    def ask_for(self, **changes: Any) -> None:
        """The user changes the spec."""
        base = {"model": self.release.spec.model.uri.rsplit("/", 1)[-1]} | changes
        generation = self.release.metadata.generation + 1
        self.release = a_release(status=self.release.status, generation=generation, **base)


def _field(task: str, name: str) -> str:
    return json.dumps(json.loads(task)[name])


def serving(model: str = "m1", **changes: Any) -> World:
    """A world in which a first model serves, watched and settled."""
    world = World(a_release(model, **changes))
    for _ in range(3):
        world.settle()
        world.now += timedelta(hours=1)
    assert reason(world) == "Serving"
    return world


def condition(world: World, type_: str) -> Any:
    found = conditions.find(world.release.status.conditions, type_)
    assert found is not None
    return found


def reason(world: World) -> str:
    """Of what is under way or has stalled; Serving when all is done."""
    found: str = condition(world, conditions.RECONCILING).reason
    return found
