"""The root of a Merkle tree: one digest that names a list, and shows if one entry of it is another (RFC 6962, 2.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

_LEAF, _NODE = b"\x00", b"\x01"


def leaf(content: bytes) -> str:
    return hashlib.sha256(_LEAF + content).hexdigest()


def root(leaves: Sequence[str]) -> str:
    """Of leaves or roots, all hexadecimal; of none it is the digest of nothing."""
    if not leaves:
        return hashlib.sha256(b"").hexdigest()
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(_NODE + bytes.fromhex(root(leaves[:half])) + bytes.fromhex(root(leaves[half:]))).hexdigest()
