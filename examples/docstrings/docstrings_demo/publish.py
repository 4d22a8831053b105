"""An owner prepares its data in its own namespace, as itself: `python -m docstrings_demo.publish`.

The driver of the demo never sees a private document, only the published sample.
"""

from __future__ import annotations

from collections.abc import Iterable

from docstrings_demo import corpus
from docstrings_demo.podtasks import PublishTask, read_task, say
from tributary_api.base import canonical_json
from tributary_store.objectstore import ObjectStore

PADDING_MAX = 0.1
"""More missing records than this are no rounding: the declaration was made for other packages."""


def main() -> None:
    task = read_task(PublishTask)
    documents = corpus.split(corpus.sample(corpus.packages(task.packages), task.documents_max))
    check_declaration(task, len(documents.private))
    store = ObjectStore.open(task.store)
    store.put_new(task.private_uri, json_lines(documents.private))
    store.put_new(task.published_uri, json_lines(documents.published))
    say(private=len(documents.private), published=len(documents.published))


def json_lines(texts: Iterable[str]) -> bytes:
    return b"".join(canonical_json({"text": text}) + b"\n" for text in texts)


def check_declaration(task: PublishTask, found: int) -> None:
    """Fewer records than declared would be padded with empty ones: private, but training on nothing.

    Raises:
        SystemExit: far fewer records were found than the owner's FederatedClient declares.
    """
    usable = found * (1 - task.holdout_fraction)
    if usable < task.declared_examples * (1 - PADDING_MAX):
        raise SystemExit(
            f"{usable:.0f} training documents in {', '.join(task.packages)}, but numExamples declares "
            f"{task.declared_examples}: lower it in this owner's values"
        )


if __name__ == "__main__":
    main()
