"""4.2: what leaves a training pod is the same for neighbouring data sets, but for the noised values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import training_worlds as worlds
from privacy_proofs import side_channels
from privacy_proofs.figures import SeededBug
from privacy_proofs.side_channels import Seen, check_nothing_tells, lines_of, objects_in
from recording_proxy import recording_proxy
from s3_servers import s3_server
from tenant_pods import tenant_namespace

from tributary_worker.data import _lines
from tributary_worker.train import train

PART = "s3://data/notes/part-0.jsonl"


@pytest.mark.parametrize(("processes", "neighbours"), [(1, ("emptied", "enormous")), (2, ("not JSON",))])
def test_side_channels(tmp_path_factory, processes, neighbours):
    """The pod as a process, against a real store through a proxy that writes down every request."""

    def observe(lines):
        log, pod = [], tmp_path_factory.mktemp("pod")
        with (
            s3_server(tmp_path_factory.mktemp("s3")) as s3,
            recording_proxy(s3.endpoint_for_host, log) as endpoint,
            tenant_namespace(s3, pod, lines, endpoint=endpoint, bucket="owner") as namespace,
        ):
            seen = side_channels.of_process(namespace, log, processes)
        assert seen.exit_code == 0, seen.stderr
        assert len(seen.requests) > 5, "the proxy was not on the way"
        assert len(seen.stdout.splitlines()) == worlds.STEPS
        return seen

    check_nothing_tells(observe, neighbours)


@pytest.fixture
def in_process(alone, tmp_path_factory, capfd):
    """Observe a training in this process, whose surroundings `change` may replace."""

    def observer(change=lambda surroundings: surroundings):
        def observe(lines):
            world = worlds.world(tmp_path_factory.mktemp("world"))
            world.store.objects[PART] = "\n".join(lines).encode(errors="surrogateescape")
            capfd.readouterr()
            train(world.task, change(world.surroundings))
            output = capfd.readouterr()
            objects = objects_in(world.store, "s3://", world.task.data.uri)
            return Seen(0, output.out, lines_of(output.err), "", (), objects)

        return observe

    return observer


def test_side_channels_of_any_bad_record(in_process):
    check_nothing_tells(in_process())


class Reporting:
    """Files whose bad lines are reported as they are read, as a helpful program would."""

    def __init__(self, surroundings):
        self.files, self.store = surroundings.files, surroundings.store

    def read(self):
        for name, content in self.files.read():
            self.report(sum(line.startswith(b'{"text": "') for line in _lines(content)))
            yield name, content


class PrintingBadRecords(Reporting):
    def report(self, readable):
        print(f"{readable} records read")


class NamingAnObjectByTheirNumber(Reporting):
    def report(self, readable):
        self.store.put_new(f"s3://exchange/progress/{readable}", b"")


BUGS = {
    "number of readable records on stdout": PrintingBadRecords,
    "number of readable records in an object's name": NamingAnObjectByTheirNumber,
}


@pytest.mark.parametrize("name", BUGS)
def test_a_side_channel_is_found(in_process, figures, name):
    leaking = in_process(lambda surroundings: replace(surroundings, files=BUGS[name](surroundings)))
    with pytest.raises(AssertionError, match="shows in"):
        check_nothing_tells(leaking, ("emptied",))
    figures.seeded_bugs.append(SeededBug(name, test_side_channels_of_any_bad_record.__name__))
