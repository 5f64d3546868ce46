"""Codes an update with the codec of its task; the residual of a lossy codec is kept for the next one. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedtide.fabric.tensors.codecs import Codec, decode, encode
from fedtide.fabric.tensors.frame import Tensor

RESIDUAL = "fedtide.residual"
"""Under this name the residual stands in the run's state on the node."""


def code(
    codec: Codec, update: Sequence[Tensor], base: Mapping[str, Tensor], residual: Mapping[str, Any], seed: int
) -> tuple[list[Tensor], list[Tensor] | None]:
    """The coded update, and its residual (None: this codec has no error feedback).

    Args:
        base: the model that the node received; both sides have it.
        residual: the residual of the last update, by tensor name.
    """
    if codec.kind != "topk":
        return encode(update, base, codec, seed), None
    wanted = [
        Tensor.of(t.name, (t.numpy() + residual[t.name]).astype(t.numpy().dtype)) if t.name in residual else t
        for t in update
    ]
    coded = encode(wanted, base, codec, seed)
    left = [
        Tensor.of(was.name, was.numpy() - decode(is_, base).numpy())
        for was, is_ in zip(wanted, coded, strict=True)
        if is_.name != was.name
    ]
    return coded, left
