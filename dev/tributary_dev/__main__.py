"""`python -m tributary_dev <verb>`: the embedded cluster of this checkout, from programs to pods."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from tributary_dev import build, cluster, doctor, health, images, network
from tributary_dev.places import ClusterPlaces
from tributary_dev.progress import note
from tributary_dev.shell import CommandError

EXPECTED_ERRORS = (
    CommandError,
    doctor.MachineError,
    health.UnhealthyError,
    images.ImageError,
    network.NoSubnetError,
    TimeoutError,
)


def _doctor(_: argparse.Namespace) -> int:
    machine = doctor.examine(build.disk_bytes_to_build() + images.disk_bytes_to_build())
    lacks = doctor.diagnose(machine)
    for lack in lacks:
        print(f"- {lack}")
    if not lacks and machine.missing_programs:
        print(f"`build` will install: {' '.join(doctor.packages_of(machine.missing_programs))}")
    if not lacks:
        print("This machine can run the cluster.")
    return 1 if lacks else 0


def _build(_: argparse.Namespace) -> int:
    doctor.require_machine(build.disk_bytes_to_build())
    print(build.binaries())
    return 0


def _images(_: argparse.Namespace) -> int:
    doctor.require_machine(images.disk_bytes_to_build())
    for name, reference in images.image_references().items():
        print(f"{name} {reference}")
    return 0


def _prepare(_: argparse.Namespace) -> int:
    cluster.prepare()
    return 0


def _up(arguments: argparse.Namespace) -> int:
    if arguments.images:
        cluster.prepare()
    running = cluster.up(fresh=arguments.fresh, nodes=arguments.nodes)
    if arguments.images:
        cluster.ensure_images(running, images.IMAGE_NAMES)
    note(f'The cluster is up: eval "$({sys.executable} -m tributary_dev env)"')
    return 0


def _status(_: argparse.Namespace) -> int:
    print(cluster.status())
    return 0 if cluster.is_healthy() else 1


def _down(arguments: argparse.Namespace) -> int:
    cluster.down_all(keep_images=arguments.keep_images)
    return 0


def _kubeconfig(_: argparse.Namespace) -> int:
    print(ClusterPlaces.of().admin_kubeconfig)
    return 0


def _env(_: argparse.Namespace) -> int:
    running = cluster.find()
    if running is None:
        note("No cluster of this checkout runs: `python -m tributary_dev up`")
        return 1
    for name, value in cluster.environment(running).items():
        print(f'export {name}="{value}"')
    return 0


def parser() -> argparse.ArgumentParser:
    """Every verb and its options."""
    root = argparse.ArgumentParser(prog="python -m tributary_dev", description=__doc__)
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, action: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(action=action)
        return sub

    verb("doctor", _doctor, "say what this machine lacks")
    verb("build", _build, "build the programs of the cluster into the cache")
    verb("images", _images, "build the container images into the cache")
    verb("prepare", _prepare, "build programs and images, as `up --images` needs them")
    up = verb("up", _up, "start, complete or mend the cluster of this checkout")
    up.add_argument("--fresh", action="store_true", help="forget all Kubernetes and S3 objects first")
    up.add_argument("--nodes", type=int, choices=(0, 1), default=1, help="0: API server and S3 only")
    up.add_argument("--images", action="store_true", help="also build and load the images")
    verb("status", _status, "say what runs")
    down = verb("down", _down, "remove all clusters of this checkout without residue")
    down.add_argument("--keep-images", action="store_true", help="keep the images that were loaded")
    verb("kubeconfig", _kubeconfig, "print the path of the kubeconfig")
    verb("env", _env, "print shell lines that set KUBECONFIG, PATH and the S3 endpoint")
    return root


def main() -> int:
    arguments = parser().parse_args()
    try:
        result: int = arguments.action(arguments)
    except EXPECTED_ERRORS as error:
        note(str(error))
        return 1
    return result


if __name__ == "__main__":
    sys.exit(main())
