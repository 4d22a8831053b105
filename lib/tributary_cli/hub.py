"""Models from the Hugging Face hub, where it can be reached."""

from __future__ import annotations

from pathlib import Path

from tributary_store.bundle_files import TAKEN

HUB_PREFIX = "hf:"


class HubError(Exception):
    """The hub gave no model; the text says what to do."""


def download_from_hub(source: str, directory: Path) -> str:
    """Write the files of hf:NAME[@REVISION] that make a bundle, no pickles among them; gives the commit."""
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise HubError(
            f"{source} needs the package huggingface_hub: install tributary[hub], or download the model "
            "yourself and push the directory"
        ) from error
    name, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
    try:
        commit = str(HfApi().model_info(name, revision=revision or None).sha)
        snapshot_download(name, revision=commit, local_dir=directory, allow_patterns=list(TAKEN))
    # The library, its HTTP client and its file locks have no error in common.
    except Exception as error:
        raise HubError(
            f"{source}: {type(error).__name__}: {error}; check the name and that the hub can be reached "
            "(HF_ENDPOINT names a mirror), or push a directory"
        ) from error
    return commit
