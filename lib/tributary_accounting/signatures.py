"""Who said it: Ed25519 signatures (RFC 8032) of grants, by the hub, and of receipts, by the tenant.

A signature is over the record's canonical JSON with the record's kind before it, so that one kind never
passes for another. Signing is deterministic: the same plan is the same bytes each time.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tributary_api.records import DeltaManifest, Grant, Signature

SEED_BYTES = 32
KEY_PREFIX = "ed25519:"
RECEIPT_INFO = b"tributary/receipt-signing"
"""Tells this key from those of sampling and noise, which are derived from the same Secret."""


class SignatureRefused(Exception):
    """Nobody signed this, somebody else did, or it was altered since."""


class SigningKey:
    """The private half of an Ed25519 key, made of 32 random bytes. It never shows them."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a signing key has {SEED_BYTES} random bytes, not {len(seed)}")
        self._private = Ed25519PrivateKey.from_private_bytes(seed)

    @classmethod
    def of_tenant(cls, secret: bytes) -> SigningKey:
        """The key of a tenant's receipts: HKDF-SHA256 (RFC 5869) of the Secret that also keys the noise."""
        return cls(HKDF(hashes.SHA256(), length=SEED_BYTES, salt=None, info=RECEIPT_INFO).derive(secret))

    def __repr__(self) -> str:
        return f"SigningKey({self.public})"

    @property
    def public(self) -> str:
        return KEY_PREFIX + self._private.public_key().public_bytes_raw().hex()

    def sign(self, statement: Grant | DeltaManifest) -> Signature:
        return Signature(key=self.public, value=self._private.sign(_message(statement)).hex())

    def signed(self, manifest: DeltaManifest) -> DeltaManifest:
        return manifest.model_copy(update={"signature": self.sign(manifest)})


def verify(statement: Grant | DeltaManifest, signature: Signature | None, trusted: str | None = None) -> str:
    """The public key that signed the statement as it is.

    Raises:
        SignatureRefused: it is unsigned, altered, or signed with another key than a given `trusted`.
    """
    kind = type(statement).__name__
    if signature is None:
        raise SignatureRefused(f"the {kind} is not signed")
    if trusted is not None and signature.key != trusted:
        raise SignatureRefused(f"the {kind} is signed with {signature.key}, and only {trusted} is trusted")
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key.removeprefix(KEY_PREFIX)))
    try:
        public.verify(bytes.fromhex(signature.value), _message(statement))
    except InvalidSignature as error:
        raise SignatureRefused(f"the {kind} is not what {signature.key} signed: it was altered") from error
    return signature.key


def _message(statement: Grant | DeltaManifest) -> bytes:
    if isinstance(statement, DeltaManifest):
        statement = statement.model_copy(update={"signature": None})
    return f"tributary/{type(statement).__name__}\n".encode() + statement.canonical_json()
