"""Keys and seekable cryptographic random words: the only source of randomness that privacy depends on."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Purpose = Literal["sampling", "noise", "rounding"]
KEY_BYTES = 32
TENANT_KEY_BYTES_MIN = 32
WORDS_PER_BLOCK = 2
BLOCK_BYTES = 16


def derive_key(tenant_key: bytes, computation_hash: str, snapshot_hash: str, purpose: Purpose) -> bytes:
    """HKDF-SHA256 (RFC 5869) of the tenant's secret, bound to one computation, one data snapshot and one
    purpose.

    The computation is the grant and everything else that the gradients depend on. A retry derives the same
    keys and so computes the same delta. Anything else gets randomness of its own: were the noise of two
    different computations the same, their difference would be free of it. The hashes are hex digests.
    """
    if len(tenant_key) < TENANT_KEY_BYTES_MIN:
        raise ValueError(f"the tenant's key has {len(tenant_key)} bytes; make one of {TENANT_KEY_BYTES_MIN}")
    salt = bytes.fromhex(computation_hash)
    info = b"tributary/" + purpose.encode() + b"/" + bytes.fromhex(snapshot_hash)
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(tenant_key)


class Keystream:
    """AES-256 in counter mode, read as 64-bit words: word `i` of stream `s` depends on (key, s, i) and
    nothing else.

    The upper half of the counter block is the stream and the lower half the block's index, so streams cannot
    run into one another before 2**64 blocks, and any position is reached without computing what comes before
    it.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a keystream's key has {KEY_BYTES} bytes, not {len(key)}")
        self._key = key

    def words(self, stream: int, start: int, count: int) -> npt.NDArray[np.uint64]:
        """Words [start, start + count) of a stream, uniform over 64 bits; shape (count,)."""
        first_block, skipped = divmod(start, WORDS_PER_BLOCK)
        blocks = -(-(skipped + count) // WORDS_PER_BLOCK)
        counter = stream.to_bytes(8, "big") + first_block.to_bytes(8, "big")
        encryptor = Cipher(algorithms.AES(self._key), modes.CTR(counter)).encryptor()
        stream_bytes = encryptor.update(bytes(blocks * BLOCK_BYTES))
        return np.frombuffer(stream_bytes, dtype="<u8")[skipped : skipped + count]
