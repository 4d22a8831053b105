"""Documents from the docstrings of installed packages: read as source, nothing is imported or run.

Runs inside a pod of the worker image and needs the standard library alone. The same packages give the same
documents in the same order.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CHARACTERS_MIN = 80
CHARACTERS_MAX = 240
"""About 70 tokens: training and evaluation look at the first 64, so more would only cost the gate time."""
PUBLISHED_ONE_IN = 10
SHINGLE_WORDS = 4
NEAR_DUPLICATE_OVERLAP = 0.5
"""Two documents that share half of the shorter one's shingles are near-duplicates."""
POSTINGS_MAX = 64
"""A shingle of more documents than this is boilerplate, and says nothing about two of them being alike."""
SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"})
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True)
class Split:
    """What an owner keeps and what it has published. No document of one has a near-duplicate in the other."""

    private: list[str]
    published: list[str]


def standard_library() -> list[str]:
    """The public corpus: every docstring of the running Python's standard library, uncut and once."""
    return list(dict.fromkeys(documents_below(Path(sysconfig.get_path("stdlib")))))


def packages(names: Iterable[str]) -> list[str]:
    """Every distinct docstring of some installed packages, cut, in the order of the packages and their files.

    Raises:
        SystemExit: a package is not installed here.
    """
    return distinct(cut(text) for name in names for text in documents_below(source_folder(name)))


def source_folder(package: str) -> Path:
    """Where a top-level package lies; finding it does not import it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"package {package!r} is not installed in this image: choose others in the demo's owners"
        )
    return Path(spec.origin).parent


def documents_below(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts[:-1]):
            yield from docstrings(path.read_text(encoding="utf-8", errors="replace"))


def docstrings(source: str) -> Iterator[str]:
    """The usable docstrings of one file, in the order of its lines; none if it does not parse."""
    if '"""' not in source and "'''" not in source:  # most files of some packages; parsing is the slow part
        return
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED):
            text = cleaned(ast.get_docstring(node) or "")
            if len(text) >= CHARACTERS_MIN:
                yield text


def cleaned(text: str) -> str:
    """Printable, single-spaced within lines, without empty lines."""
    printable = "".join(c for c in text if c.isprintable() or c == "\n")
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in printable.splitlines())
    return "\n".join(line for line in lines if line)


def cut(text: str) -> str:
    """The text's beginning, at most CHARACTERS_MAX long, without a broken last word."""
    return text if len(text) <= CHARACTERS_MAX else text[:CHARACTERS_MAX].rsplit(None, 1)[0]


def distinct(texts: Iterable[str]) -> list[str]:
    """The texts that are no near-duplicate of an earlier one.

    Compared by the share of common shingles (runs of SHINGLE_WORDS words; Broder 1997, containment), through
    an index from shingle to the texts kept so far.
    """
    kept: list[str] = []
    sizes: list[int] = []
    index: dict[tuple[str, ...], list[int]] = {}
    for text in texts:
        own = shingles(text)
        shared = Counter(i for shingle in own for i in index.get(shingle, ()))
        if not own or any(n >= NEAR_DUPLICATE_OVERLAP * min(len(own), sizes[i]) for i, n in shared.items()):
            continue
        for shingle in own:
            postings = index.setdefault(shingle, [])
            if len(postings) < POSTINGS_MAX:
                postings.append(len(kept))
        kept.append(text)
        sizes.append(len(own))
    return kept


def shingles(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def sample(texts: Iterable[str], count: int) -> list[str]:
    """At most `count` texts, chosen by hash and left in their order."""
    found = list(texts)
    chosen = set(sorted(found, key=hash_of)[:count])
    return [text for text in found if text in chosen]


def hash_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def split(texts: Iterable[str]) -> Split:
    """A tenth is published, chosen by hash: a document's side does not depend on the others'."""
    private: list[str] = []
    published: list[str] = []
    for text in texts:
        # Not the leading bytes: a sample is chosen by these.
        chosen = int.from_bytes(hash_of(text)[-8:], "big") % PUBLISHED_ONE_IN == 0
        side = published if chosen else private
        side.append(text)
    return Split(private, published)
