"""How a run chooses its nodes, when its rounds close, and when it has learned enough. Pure.

Three modes: `sync` waits for its cohort; `semi_sync` closes at the deadline and counts late updates in
the next round; `async` closes after every `buffer` updates (FedBuff, Nguyen et al. 2022,
https://arxiv.org/abs/2106.06639). An update that was trained from an older model counts with the weight
(1 + staleness) ** -staleness_exponent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fedtide.fabric.errors import ConfigError
from fedtide.fabric.strict import Message, Strict
from fedtide.fabric.tensors.codecs import Codec

Cause = Literal["all answered", "quorum", "grace over", "deadline", "buffer full"]


class Selection(Strict):
    """Which of the online nodes that match a run's labels take part in a round; default: all."""

    nodes: int | None = Field(default=None, ge=1, description="Updates wanted per round; None: from every node")
    fraction: float | None = Field(default=None, gt=0, le=1, description="Instead of `nodes`: share of the eligible")
    over_provision: float = Field(default=1.0, ge=1, le=10, description="1.3 asks 130 % and takes the first 100 %")
    prefer: Literal["least_recent", "most_samples", "random"] = Field(
        default="least_recent",
        description="Which eligible nodes first: those whose last turn is longest ago, those with most samples, or any",
    )
    min_samples: int = Field(default=0, ge=0, description="Training samples a node must count")
    min_memory_bytes: int = Field(default=0, ge=0, description="Memory that a node must have")
    needs: list[str] = Field(default=[], description="Training runtimes a node must have: flwr, torch, ...")
    idle: bool = Field(default=False, description="Only nodes that work for no other run")
    seed: int = Field(default=0, description="Same seed and same log: same nodes, also after a replay")

    @model_validator(mode="after")
    def _one_size(self) -> Selection:
        if self.nodes is not None and self.fraction is not None:
            raise ValueError("takes either `nodes` or `fraction`")
        return self


class RoundPolicy(Strict):
    """When a round closes, and what becomes of it when too few answer."""

    mode: Literal["sync", "semi_sync", "async"] = Field(
        default="sync",
        description="Whether late updates are dropped (`sync`), or count in a later round (`semi_sync`, `async`)",
    )
    deadline_s: float = Field(default=3600.0, gt=0, description="Then a round closes with what it has")
    quorum: int | None = Field(default=None, ge=1, description="Updates that suffice; None: all, or `nodes`")
    grace_s: float = Field(default=0.0, ge=0, description="How long a round with its quorum waits for more")
    admission: Literal["lenient", "off"] = Field(
        default="lenient",
        description="`lenient` refuses an answer that would spoil the model or end the run; `off`: as Flower does",
    )
    min_updates: int = Field(default=1, ge=0, description="With fewer the round is abandoned and tried again")
    retries: int = Field(default=2, ge=0, description="How often an abandoned round is tried again")
    node_grace_s: float = Field(default=15.0, ge=0, description="How long a node that went offline is waited for")
    max_update_bytes: int | None = Field(default=None, gt=0, description="Larger updates are refused unread")
    max_update_norm: float | None = Field(
        default=None, gt=0, description="Updates that move the model further do not count"
    )
    up: str = Field(default="", description="Codec of updates, e.g. int8 or topk:0.01 (docs/compression.md)")
    down: str = Field(default="", description="Codec of models on their way to nodes, e.g. int8+hadamard")
    regional: bool = Field(default=False, description="Regions that have an aggregator sum their own updates")
    shards: int = Field(default=1, ge=1, le=64, description="Processes that each sum a share of a large model")
    evaluate_every: int = Field(default=1, ge=1, description="Nodes evaluate every n-th round, and after the last")
    buffer: int | None = Field(default=None, ge=1, description="async: updates that close a round")
    max_staleness: int = Field(default=10, ge=0, description="Older updates are refused")
    staleness_exponent: float = Field(
        default=0.5, ge=0, description="An update that is s rounds old has weight (1 + s)^-exponent"
    )

    @field_validator("up", "down")
    @classmethod
    def _codec(cls, value: str, info: ValidationInfo) -> str:
        try:
            codec = Codec.parse(value) if value else None
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc
        if codec is not None and codec.kind == "topk" and info.field_name == "down":
            raise ValueError("topk leaves most of a model out: it is for `up`, where nodes send the rest later")
        return str(codec) if codec is not None else ""

    @model_validator(mode="after")
    def _buffer_is_for_async(self) -> RoundPolicy:
        if (self.mode == "async") != (self.buffer is not None):
            raise ValueError("`buffer` belongs to mode `async`, and async needs it")
        if self.mode == "async" and (self.quorum is not None or self.grace_s):
            raise ValueError("mode `async` closes by its `buffer`; it takes no `quorum` and no `grace_s`")
        return self

    @model_validator(mode="after")
    def _one_way_to_sum(self) -> RoundPolicy:
        if self.shards > 1 and (self.regional or self.up or self.max_update_norm):
            raise ValueError("takes either `shards` or `regional`, `up` and `max_update_norm`")
        if self.regional and self.max_update_norm:
            raise ValueError("takes either `regional` or `max_update_norm`: regions do not have the model")
        return self

    @property
    def carries(self) -> bool:
        """Whether an answer that misses its round counts in a later one."""
        return self.mode != "sync"


class TimeIsUp(Message):
    """The coordinator tells an aggregator that a phase waits no longer; with `ends_run` no phase does any more, and the
    run is completed with what it has."""

    round: int
    trial: int
    phase: str
    cause: Cause
    ends_run: bool = False


class StopRule(Strict):
    """When a run ends before its last round."""

    metric: str = Field(default="", description="A metric of the run, as `fedtide run show` names it")
    mode: Literal["max", "min"] = Field(default="max", description="Whether more or less of the metric is better")
    target: float | None = Field(default=None, description="The run ends when the metric reaches it")
    patience: int | None = Field(default=None, ge=1, description="Rounds without improvement")
    min_delta: float = Field(default=0.0, ge=0, description="Smaller changes are no improvement")
    max_bytes: int | None = Field(default=None, gt=0, description="Bytes moved between cloud and nodes, both ways")

    @model_validator(mode="after")
    def _says_something(self) -> StopRule:
        judged = self.target is not None or self.patience is not None
        if judged != bool(self.metric):
            raise ValueError("`metric` goes together with `target` or `patience`")
        return self


def quorum_of(policy: RoundPolicy, selection: Selection, asked: int) -> int:
    """Updates with which a round that asked `asked` nodes may close."""
    if policy.mode == "async":
        return policy.buffer or asked
    if policy.quorum is not None:
        return policy.quorum
    if selection.over_provision > 1:
        return min(asked, selection.nodes or round(asked / selection.over_provision))
    return asked


def staleness_weight(policy: RoundPolicy, staleness: int) -> float:
    """FedBuff's polynomial discount; 1 for an update to the present model."""
    return float((1 + staleness) ** -policy.staleness_exponent)


Series = Sequence[tuple[int, Mapping[str, float]]]
"""(round, its metrics) of every closed round, oldest first."""


def resolved(rule: StopRule, series: Series) -> StopRule:
    """The rule with its metric as the run names it: `acc` of a ClientApp's evaluation is `eval_acc`."""
    names = {name for _, metrics in series for name in metrics}
    found = [prefix + rule.metric for prefix in ("eval_", "train_") if prefix + rule.metric in names]
    if rule.metric in names or len(found) != 1:
        return rule
    return rule.model_copy(update={"metric": found[0]})


def best_round(rule: StopRule, series: Series) -> int | None:
    """The first of the best rounds by the rule's metric; NaN is never best."""
    sign = 1.0 if rule.mode == "max" else -1.0
    seen = [(sign * metrics[rule.metric], -number) for number, metrics in series if _is_known(rule, metrics)]
    return -max(seen)[1] if seen else None


def _is_known(rule: StopRule, metrics: Mapping[str, float]) -> bool:
    return not math.isnan(metrics.get(rule.metric, math.nan))


def why_stop(rule: StopRule, series: Series, bytes_moved: int) -> str | None:
    """Why a run need not go on, or None.

    Args:
        bytes_moved: so far, down and up.
    """
    if rule.max_bytes is not None and bytes_moved >= rule.max_bytes:
        return f"{bytes_moved} bytes were moved, the budget is {rule.max_bytes}"
    sign = 1.0 if rule.mode == "max" else -1.0
    seen = [(number, metrics[rule.metric]) for number, metrics in series if _is_known(rule, metrics)]
    if not rule.metric or not seen:
        return None
    last_round, last = seen[-1]
    if rule.target is not None and sign * last >= sign * rule.target:
        return f"{rule.metric} is {last:.6g} after round {last_round}, the target is {rule.target:g}"
    if rule.patience is None:
        return None
    best_number, best = seen[0]
    for number, value in seen[1:]:
        if sign * (value - best) > rule.min_delta:
            best_number, best = number, value
    until = max(number for number, metrics in series if rule.metric in metrics)
    if until - best_number >= rule.patience:
        return f"{rule.metric} has not improved on {best:.6g} of round {best_number} for {rule.patience} rounds"
    return None
