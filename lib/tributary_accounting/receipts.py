"""Whether a delta is the one that was granted: asked by a worker that would adopt it, and by the hub."""

from __future__ import annotations

from tributary_accounting.signatures import verify
from tributary_api.records import DeltaManifest, Grant


class ReceiptRefused(Exception):
    """The delta's receipt is for something else than the grant."""


def check(manifest: DeltaManifest, grant: Grant, receipt_key: str) -> None:
    """Raise unless the owner of `receipt_key` states that exactly this grant was used for this delta.

    Raises:
        ReceiptRefused: it repeats the grant in other words.
        SignatureRefused: the owner did not sign it so.
    """
    receipt = manifest.receipt
    said = (receipt.grant_digest, receipt.mechanism, receipt.epsilon, receipt.delta)
    about = (manifest.run_key, manifest.client, manifest.base_model_digest)
    if said != (grant.digest, grant.mechanism, grant.epsilon, grant.delta):
        raise ReceiptRefused("the receipt is not for the grant of this round")
    if about != (grant.run_key, grant.client, grant.base_model_digest):
        raise ReceiptRefused("the manifest is about another run, client or base model than its grant")
    verify(manifest, manifest.signature, receipt_key)
