"""The `tributary` command: `tributary model push|pull` and `tributary privacy verify|ledger|key`."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import yaml

from tributary_api.shared import ModelRef, StoreEndpoint
from tributary_cli.hub import HUB_PREFIX, HubError, download_from_hub
from tributary_store import bundle
from tributary_store.errors import AccessDenied, BundleRefused, ObjectMissing, StoreError, StoreUnreachable
from tributary_store.objects import bucket_and_key
from tributary_store.objectstore import ObjectStore

EXIT_CODES: dict[type[Exception], int] = {
    BundleRefused: 3,
    ObjectMissing: 4,
    AccessDenied: 5,
    StoreUnreachable: 6,
    HubError: 7,
}
FAILURE = 1
EPILOG = """\
credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or any other way that the AWS SDK knows
exit codes: 0 done, 1 other failure, or a check that failed, 2 wrong usage, 3 not a safe model,
            4 nothing there, 5 not allowed, 6 no answer from the store, 7 no model from the Hugging Face hub
"""
BUNDLE_NAME = re.compile(r"[0-9a-f]{64}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (StoreError, HubError, OSError) as error:
        print(f"tributary: {error}", file=sys.stderr)
        return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), FAILURE)
    return code


def _printing(verb: Callable[[argparse.Namespace], ModelRef]) -> Callable[[argparse.Namespace], int]:
    """The verb as a command: it prints what goes into a spec."""

    def run(arguments: argparse.Namespace) -> int:
        print(yaml.safe_dump(verb(arguments).to_json_object(), sort_keys=False), end="")
        return 0

    return run


def _private(
    verb: Literal["verify_receipt", "show_ledger", "print_key"],
) -> Callable[[argparse.Namespace], int]:
    """A verb of `tributary privacy`. The accountant takes seconds to load: the other commands do without."""

    def run(arguments: argparse.Namespace) -> int:
        from tributary_cli import privacy

        code: int = getattr(privacy, verb)(arguments, lambda: _store(arguments))
        return code

    return run


def push(arguments: argparse.Namespace) -> ModelRef:
    """Publish a directory, or a model of the hub, and give what goes into `spec.baseModel`."""
    bucket_and_key(arguments.models)
    store = _store(arguments)
    if not arguments.source.startswith(HUB_PREFIX):
        return bundle.push(store, Path(arguments.source), arguments.models, description=arguments.description)
    with tempfile.TemporaryDirectory() as directory:
        commit = download_from_hub(arguments.source, Path(directory))
        return bundle.push(
            store,
            Path(directory),
            arguments.models,
            description=arguments.description or f"{arguments.source} at {commit}",
        )


def pull(arguments: argparse.Namespace) -> ModelRef:
    """Write a bundle into a directory, every byte checked."""
    name = arguments.model.rstrip("/").rpartition("/")[2]
    digest = arguments.digest or (f"sha256:{name}" if BUNDLE_NAME.fullmatch(name) else None)
    if digest is None:
        raise StoreError(f"{arguments.model} does not end in the model's digest: give --digest sha256:...")
    if not re.fullmatch(rf"sha256:{BUNDLE_NAME.pattern}", digest):
        raise StoreError(f"{digest!r} is not a digest: write sha256: and 64 hex digits")
    bucket_and_key(arguments.model)
    ref = ModelRef(uri=arguments.model.rstrip("/"), digest=digest)
    bundle.pull(_store(arguments), ref, Path(arguments.directory))
    return ref


def _store(arguments: argparse.Namespace) -> ObjectStore:
    return ObjectStore.open(StoreEndpoint(endpoint=arguments.endpoint, region=arguments.region))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tributary", description="Private, federated models on Kubernetes.")
    topics = parser.add_subparsers(required=True, metavar="model|privacy")
    _add_model_verbs(topics.add_parser("model", help="bring models into the object store, and back"))
    _add_privacy_verbs(
        topics.add_parser("privacy", help="check receipts and ledgers without trusting the hub")
    )
    return parser


def _add_model_verbs(models: argparse.ArgumentParser) -> None:
    verbs = models.add_subparsers(required=True, metavar="push|pull")
    pushing = _verb(
        verbs, "push", "publish a Hugging Face directory; prints uri and digest for spec.baseModel"
    )
    pushing.add_argument("source", help="directory that save_pretrained wrote, or hf:NAME[@REVISION]")
    pushing.add_argument("models", help="folder of models, for example s3://tributary/models/")
    pushing.add_argument("--description", default="", help="kept with the model")
    pushing.set_defaults(run=_printing(push))
    pulling = _verb(verbs, "pull", "write a model into a directory that transformers loads")
    pulling.add_argument("model", help="uri of the model, s3://.../models/<sha256>")
    pulling.add_argument("directory", help="where to write its files")
    pulling.add_argument("--digest", help="what the model's digest must be; by default the uri's last part")
    pulling.set_defaults(run=_printing(pull))


def _add_privacy_verbs(privacy: argparse.ArgumentParser) -> None:
    verbs = privacy.add_subparsers(required=True, metavar="verify|ledger|key")
    verifying = _verb(
        verbs, "verify", "recompute the epsilon of a receipt, check its signature and its delta"
    )
    verifying.add_argument("manifest", help="manifest.json of a delta: a file, or s3://.../manifest.json")
    verifying.add_argument("--receipt-key", help="the owner's public key, spec.privacy.receiptKey")
    verifying.add_argument(
        "--delta", help="the delta, a file or an s3:// URI; by default beside the manifest"
    )
    verifying.add_argument(
        "--plan", help="plan.json of the round, a file or an s3:// URI, to check the grant"
    )
    verifying.add_argument("--hub-key", help="the hub's public key, which must have signed the grant")
    verifying.set_defaults(run=_private("verify_receipt"))
    showing = _verb(verbs, "ledger", "show a ledger, every entry verified, and what it adds up to")
    showing.add_argument("ledger", help="spec.privacy.ledgerUri of the FederatedClient")
    showing.add_argument("--epsilon", type=float, help="the budget, to say what remains of it")
    showing.add_argument(
        "--delta", type=float, help="state epsilon at this delta; by default that of the first entry"
    )
    showing.set_defaults(run=_private("show_ledger"))
    naming = _verb(
        verbs, "key", "print the public key that follows from a noise key, for spec.privacy.receiptKey"
    )
    naming.add_argument("noise_key", help="file with the entry `key` of the Secret, or - for standard input")
    naming.set_defaults(run=_private("print_key"))


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    environment = os.environ
    verb.add_argument(
        "--endpoint",
        default=environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL"),
        help="URL of the S3 endpoint (default: AWS_ENDPOINT_URL, or AWS itself)",
    )
    verb.add_argument(
        "--region",
        default=environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1",
        help="region name that requests are signed with (default: AWS_REGION, or us-east-1)",
    )
    return verb


if __name__ == "__main__":
    sys.exit(main())
