"""Requests of an aggregator to a partial aggregator, which sums updates for it, and the answers. Pure data.

A request names all updates that belong in the sum of its `key`. Updates that are in the sum already are not
added again, so a request may be repeated after any failure.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.strict import Message, Strict
from fedtide.fabric.tensors.blobs import BlobRef


class FoldPlan(Strict):
    """What was agreed on before the round: fixed points are (exponent, term bits), None for sums in float64."""

    key: str = Field(description="Names the sum: run, round and trial")
    run: str
    specs: list[tuple[str, str, list[int]]] = Field(description="Name, dtype and shape of each tensor")
    points: list[tuple[int, int] | None]
    max_terms: int = Field(ge=1)
    shard: tuple[int, int] = Field(default=(0, 1), description="(k, n): part k of n of the model's blocks")


class FoldEntry(Strict):
    """One update: `term` is what its tensors are multiplied by."""

    task: str
    region: str
    node: str
    stays: bool
    blob: BlobRef
    term: float = Field(ge=0)


class FoldRequest(Message):
    """Without a plan: a liveness check. `finish`: answer with the sum of exactly these entries, or with their mean."""

    plan: FoldPlan | None = None
    entries: list[FoldEntry] = []
    finish: Literal["", "sum", "mean"] = ""


class FoldFault(Strict):
    category: Literal["wrong_shape", "not_finite", "out_of_range", "bad_weight", "too_far", "malformed"]
    reason: str


class FoldAnswer(Message):
    """`faults` by task; `error`: ask again. `result` is a frame of blocks, `weight` the exact total of terms."""

    instance: str = Field(default="", description="Id of the answering process; a new one has no sums")
    faults: dict[str, FoldFault] = {}
    error: str = ""
    result: BlobRef | None = None
    weight: str = "0"
    terms: int = 0
    usage: Usage = Field(default=Usage(), description="Of this process for the request, if it is a region's")
