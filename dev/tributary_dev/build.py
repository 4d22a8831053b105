"""Build the cluster's programs from their Go modules, once per machine.

Cache layout: `built/<name>-<version>-<key>/` holds the programs of one component, `bin/<key>/` all of them
as hard links. Both appear by one rename, so a build that is cut off leaves nothing that looks finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tributary_dev import places
from tributary_dev.components import COMPONENTS, Component, go_mod, key, staged_modules
from tributary_dev.locks import file_lock
from tributary_dev.progress import note, step
from tributary_dev.shell import run

PAUSE = "pause"
DISK_BYTES = 11 * 10**9

# Without cgo no C compiler is needed and the programs run on any libc, in images too.
GO_SETTINGS = {"CGO_ENABLED": "0", "GOFLAGS": "-mod=mod -buildvcs=false -trimpath", "GOWORK": "off"}


def binaries() -> Path:
    """The directory with every program of the cluster; builds what is missing.

    Raises CommandError with the end of Go's output when a component does not build.
    """
    target = _target()
    if target.is_dir():
        return target
    with file_lock(places.cache_root() / "build.lock"):
        if not target.is_dir():
            _build_all(target)
    return target


def disk_bytes_to_build() -> int:
    """What building the programs takes, nearly all of it Go's own caches; 0 when they are built."""
    return 0 if _target().is_dir() else DISK_BYTES


def _target() -> Path:
    return places.cache_root() / "bin" / f"{key(*COMPONENTS)}-{_pause_key()}"


def _build_all(target: Path) -> None:
    note("Building the cluster's programs from their Go modules: once per machine, 15 min on 2 cores")
    built = [component_directory(component) for component in COMPONENTS]
    built.append(_pause_directory())

    def link(staging: Path) -> None:
        for directory in built:
            for program in directory.iterdir():
                os.link(program, staging / program.name)

    create_directory(target, link)


def component_directory(component: Component) -> Path:
    """The directory with the programs of one component; builds it when it is not in the cache."""
    name = f"{component.name}-{component.version}-{key(component)}"
    target = places.cache_root() / "built" / name
    if not target.is_dir():
        with step(f"building {component.name} {component.version}"):
            create_directory(target, lambda staging: _build(component, staging))
    return target


def _build(component: Component, output: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tributary-build-") as directory:
        module = Path(directory)
        staged = staged_modules(_published_go_mod(component)) if component.staging_version else ()
        (module / "go.mod").write_text(go_mod(component, staged))
        # A lone program is named here: Go would call it after its module's last word (`v3`).
        where = str(output / component.programs[0]) if len(component.programs) == 1 else f"{output}/"
        _go_build(module, where, component.import_paths, component.tags, component.linker_flags)


def _go_build(
    module: Path, output: str, packages: Sequence[str], tags: Sequence[str] = (), linker_flags: str = "-s -w"
) -> None:
    flags = ["-tags", ",".join(tags), "-ldflags", linker_flags, "-o", output]
    run(["go", "build", *flags, *packages], cwd=module, env=GO_SETTINGS)


def _published_go_mod(component: Component) -> str:
    """The go.mod that the module was published with."""
    coordinates = f"{component.module}@{component.version}"
    answer = run(["go", "mod", "download", "-json", coordinates], cwd=Path("/"), env=GO_SETTINGS)
    return Path(json.loads(answer)["GoMod"]).read_text()


def _pause_source() -> Path:
    return places.checkout() / "dev" / "pause"


def _pause_key() -> str:
    texts = [(_pause_source() / name).read_bytes() for name in ("go.mod", "main.go")]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


def _pause_directory() -> Path:
    target = places.cache_root() / "built" / f"{PAUSE}-{_pause_key()}"
    if not target.is_dir():
        with step(f"building {PAUSE}"):
            create_directory(target, lambda out: _go_build(_pause_source(), str(out / PAUSE), ["."]))
    return target


def create_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Make `target` appear at once, with what `fill` puts into it, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fill(staging)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
