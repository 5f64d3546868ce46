"""What happens to runs and their rounds, as events of the log.

(run, attempt, round, trial, phase, node) is the identity of an answer.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedtide.fabric.ids import NAME
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.plans.round_policy import Cause
from fedtide.fabric.plans.run_spec import RunSpec
from fedtide.fabric.strict import TaggedMessage


class RunRequested(TaggedMessage):
    kind: Literal["run.requested"] = "run.requested"
    run: str
    spec: RunSpec
    by: str = Field(default="cli", description="Who or what asked")
    cause: str = Field(default="", description="The event that led to it, for `fedtide why`")
    trace: str = Field(default="", description="W3C traceparent of what led to it, if it had one")


class RunPauseRequested(TaggedMessage):
    kind: Literal["run.pause_requested"] = "run.pause_requested"
    run: str
    reason: str = "asked by a person"


class RunResumeRequested(TaggedMessage):
    kind: Literal["run.resume_requested"] = "run.resume_requested"
    run: str


class RunStopRequested(TaggedMessage):
    """The run is to be completed now, with what it has learned."""

    kind: Literal["run.stop_requested"] = "run.stop_requested"
    run: str
    reason: str = "asked by a person"


class RunRemoved(TaggedMessage):
    """A run that has ended is forgotten, with all that was kept of it."""

    kind: Literal["run.removed"] = "run.removed"
    run: str


class RunCancelRequested(TaggedMessage):
    kind: Literal["run.cancel_requested"] = "run.cancel_requested"
    run: str
    reason: str = "asked by a person"


class AggregatorStarted(TaggedMessage):
    """An aggregator process took the run; attempts count from 1."""

    kind: Literal["run.aggregator_started"] = "run.aggregator_started"
    run: str
    attempt: int


class AggregatorWaits(TaggedMessage):
    """An aggregator cannot begin yet: no machine has room for it, its image does not come."""

    kind: Literal["run.aggregator_waits"] = "run.aggregator_waits"
    run: str
    attempt: int
    reason: str


class AggregatorExited(TaggedMessage):
    kind: Literal["run.aggregator_exited"] = "run.aggregator_exited"
    preempted: bool = Field(default=False, description="It was ended from outside: no fault of the run")
    hopeless: bool = Field(default=False, description="The next attempt would end as this one: a person must act first")
    out_of_memory: bool = Field(default=False, description="The next attempt needs a larger machine")
    run: str
    attempt: int
    code: int
    reason: str = ""
    usage: Usage = Field(default=Usage(), description="In all, also what it has reported before")


class RunCleanedUp(TaggedMessage):
    """Nothing of an ended run is left in the broker. `key`: that of its aggregators, which is void from now on."""

    kind: Literal["run.cleaned_up"] = "run.cleaned_up"
    run: str
    key: str = ""


class RoundsRestarted(TaggedMessage):
    """An app that runs its own rounds (without `Strategy.start`) begins again after a crash."""

    kind: Literal["run.rounds_restarted"] = "run.rounds_restarted"
    run: str
    attempt: int


class RoundWaits(TaggedMessage):
    """A phase waits for nodes before it sends anything: `needed` are wanted, `there` are in its cohort.

    `held`: it waits for something else, such as money.
    """

    kind: Literal["round.waits"] = "round.waits"
    run: str
    attempt: int
    round: int
    trial: int = 1
    phase: str = ""
    needed: int
    there: int
    held: str = ""


class RoundOpened(TaggedMessage):
    """Tasks of one kind went out for a round; a round has a train and perhaps an evaluate phase."""

    kind: Literal["round.opened"] = "round.opened"
    run: str
    attempt: int
    round: int
    trial: int = Field(default=1, description="Number of the trial, from 1: an abandoned round is retried")
    phase: str
    nodes: list[str] = Field(description="Every node whose answer may count, also those that were asked before")
    bytes_down: int
    wan_bytes: int = Field(default=0, ge=0, description="What of it goes to the regions, each byte once to each")
    quorum: int | None = Field(default=None, description="Updates that suffice; None: the app decides by itself")
    resumable: bool = Field(default=True, description="Whether a new attempt can continue this round")
    timed: bool = Field(default=True, description="Whether the coordinator keeps the deadline of this phase")


class UpdateReceived(TaggedMessage):
    """An answer that was accepted. (run, attempt, round, phase, node) is its identity."""

    kind: Literal["round.update_received"] = "round.update_received"
    run: str
    attempt: int
    round: int
    trial: int = 1
    phase: str
    node: str
    bytes_up: int
    seconds: float
    staleness: int = Field(default=0, description="How many rounds ago its node was asked")
    usage: Usage = Field(default=Usage(), description="Of the node for this answer, as it says")
    stays: bool = Field(default=False, description="Its tensors stayed in the node's region")


class UpdateRefused(TaggedMessage):
    """An answer, or the lack of one, that does not count; `reason` says why."""

    kind: Literal["round.update_refused"] = "round.update_refused"
    run: str
    attempt: int
    round: int
    trial: int = 1
    phase: str
    node: str
    category: Literal[
        "app_error",
        "node_lost",
        "timeout",
        "not_needed",
        "late",
        "stale",
        "wrong_shape",
        "not_finite",
        "out_of_range",
        "bad_weight",
        "too_far",
        "too_large",
        "malformed",
    ]
    reason: str
    usage: Usage = Field(default=Usage(), description="Of the node for the answer that does not count, as it says")
    bytes_up: int = Field(default=0, ge=0, description="Of that answer")


class RoundCollected(TaggedMessage):
    """A phase takes no more answers; what it has is aggregated now."""

    kind: Literal["round.collected"] = "round.collected"
    run: str
    attempt: int
    round: int
    trial: int = 1
    phase: str
    received: int
    cause: Cause


class RoundAbandoned(TaggedMessage):
    """Too few answered: the round is tried again with a new selection, or the run fails."""

    kind: Literal["round.abandoned"] = "round.abandoned"
    run: str
    attempt: int
    round: int
    trial: int
    reason: str


class RoundClosed(TaggedMessage):
    kind: Literal["round.closed"] = "round.closed"
    run: str
    attempt: int
    round: int
    metrics: dict[str, float]
    seconds: float
    updates: str = Field(
        default="", max_length=64, description="Root of the Merkle tree of the updates that count (fabric.merkle)"
    )
    usage: Usage = Field(default=Usage(), description="Of the aggregator since its last report")
    regional: dict[Annotated[str, Field(pattern=NAME)], Usage] = Field(
        default={}, max_length=200, description="Of regional aggregators for this run since then, by region"
    )


class RunCompleted(TaggedMessage):
    kind: Literal["run.completed"] = "run.completed"
    run: str
    attempt: int
    note: str = ""
    usage: Usage = Field(default=Usage(), description="Of the aggregator since its last report")


class RunFailed(TaggedMessage):
    """The app itself failed: another attempt would fail the same way."""

    kind: Literal["run.failed"] = "run.failed"
    run: str
    attempt: int
    reason: str
    usage: Usage = Field(default=Usage(), description="Of the aggregator since its last report")
