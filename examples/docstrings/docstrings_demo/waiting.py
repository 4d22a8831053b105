"""Waiting for what the demo has asked for, with something to see meanwhile, and an end if it goes wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from docstrings_demo.diagnose import about_job, about_object
from docstrings_demo.kube import Kube, Object
from docstrings_demo.live import View
from docstrings_demo.observe import Seen, condition, is_true, json_lines, observe
from docstrings_demo.podjobs import JOB_LABEL, ScriptJob
from docstrings_demo.problems import DemoError
from tributary_api.meta import Condition

FAILED, STALLED = "Failed", "Stalled"

Conditions = Callable[[Seen], Sequence[Condition]]


@dataclass
class Watch:
    """Looks at the cluster again and again and shows what it sees."""

    kube: Kube
    view: View
    load_job: ScriptJob | None = None
    """The load generator, once it runs."""
    poll_seconds: float = 1.5
    stalled_seconds_max: float = 45.0
    """A stall that lasts this long does not mend itself here: nobody but the demo changes anything."""

    def look(self) -> Seen:
        seen = observe(self.kube, (self.load_job.namespace, self.load_job.name) if self.load_job else None)
        self.view.show(seen)
        return seen

    def until(
        self,
        done: Callable[[Seen], bool],
        seconds_max: float,
        *,
        subject: str,
        conditions: Conditions = lambda _: (),
    ) -> Seen:
        """Look until `done`.

        Raises:
            DemoError: it took too long, or by its `conditions` the subject failed or stays stalled.
        """
        deadline = time.monotonic() + seconds_max
        healthy_at = time.monotonic()
        while True:
            seen, now = self.look(), time.monotonic()
            if done(seen):
                return seen
            why = trouble(conditions(seen))
            if why is None:
                healthy_at = now
            elif is_true(conditions(seen), FAILED) or now - healthy_at > self.stalled_seconds_max:
                raise DemoError(f"{subject}: {why}\n{about_object(self.kube, subject)}")
            if now > deadline:
                late = f"{subject} took longer than {seconds_max:.0f} s"
                raise DemoError(f"{late}\n{about_object(self.kube, subject)}")
            time.sleep(self.poll_seconds)

    def result(self, job: ScriptJob) -> dict[str, Any]:
        """What a script's last line says, once its Job is complete.

        Raises:
            DemoError: the Job failed.
        """
        while not job_is(self.kube.get("jobs", job.namespace, job.name), "Complete"):
            if job_is(self.kube.get("jobs", job.namespace, job.name), "Failed"):
                raise DemoError(f"{job.namespace}/{job.name} failed\n{about_job(self.kube, job)}")
            self.look()
            for line in self._lines(job):
                self.view.detail(
                    f"{job.namespace} {job.name}", ", ".join(f"{k} {v}" for k, v in line.items())
                )
            time.sleep(self.poll_seconds)
        return self._lines(job)[-1]

    def pods(self, job: ScriptJob) -> list[str]:
        found = self.kube.items("pods", job.namespace, labels=f"{JOB_LABEL}={job.name}")
        return [pod["metadata"]["name"] for pod in found]

    def _lines(self, job: ScriptJob) -> list[dict[str, Any]]:
        return [
            line
            for pod in self.pods(job)
            for line in json_lines(self.kube.log(job.namespace, pod, tail_lines=1))
        ]


def job_is(job: Object | None, kind: str) -> bool:
    found = (job or {}).get("status", {}).get("conditions", [])
    return any(c["type"] == kind and c["status"] == "True" for c in found)


def trouble(conditions: Sequence[Condition]) -> str | None:
    """Why an object fails or stalls, as it says itself; None if it does neither."""
    for kind in (FAILED, STALLED):
        found = condition(conditions, kind)
        if found and found.status == "True":
            return f"{kind}: {found.reason}: {found.message}"
    return None
