"""What happens to roll-outs: started, asked for by a person, reported by nodes and regions."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from fedtide.fabric.plans.rollout_plan import Measured, NodePhase, RolloutPlan
from fedtide.fabric.strict import TaggedMessage


class RolloutStarted(TaggedMessage):
    """`counter` is the desired-state counter of this roll-out; `counter + 1` is reserved for its rollback."""

    kind: Literal["rollout.started"] = "rollout.started"
    rollout: str
    plan: RolloutPlan
    counter: int
    by: str = "cli"
    trace: str = Field(default="", description="W3C traceparent of what led to it, if it had one")


class RolloutAbortRequested(TaggedMessage):
    """Stop, and take the release back from every node that was offered it."""

    kind: Literal["rollout.abort_requested"] = "rollout.abort_requested"
    rollout: str
    reason: str = "asked by a person"


class RolloutRollbackRequested(TaggedMessage):
    """Like an abort, but also possible for a completed roll-out."""

    kind: Literal["rollout.rollback_requested"] = "rollout.rollback_requested"
    rollout: str
    reason: str = "asked by a person"


class RolloutPauseRequested(TaggedMessage):
    kind: Literal["rollout.pause_requested"] = "rollout.pause_requested"
    rollout: str
    reason: str = "asked by a person"


class RolloutResumeRequested(TaggedMessage):
    """Go on where it stopped; what paused it is judged again."""

    kind: Literal["rollout.resume_requested"] = "rollout.resume_requested"
    rollout: str
    by: str = "cli"


class RolloutPromoteRequested(TaggedMessage):
    """A person takes the decision that a wave waits for: approval, bake, gates. Errors still stop it."""

    kind: Literal["rollout.promote_requested"] = "rollout.promote_requested"
    rollout: str
    region: str = Field(default="", description="Empty: every wave that waits")
    by: str = "cli"


class RolloutNextRequested(TaggedMessage):
    """Begin the next group of waves now, beside those that are under way."""

    kind: Literal["rollout.next_requested"] = "rollout.next_requested"
    rollout: str
    by: str = "cli"


class RolloutRetryRequested(TaggedMessage):
    """Offer the release again to nodes that failed or were taken back, under `counter`."""

    kind: Literal["rollout.retry_requested"] = "rollout.retry_requested"
    rollout: str
    counter: int
    by: str = "cli"


class RegionCached(TaggedMessage):
    """A region's leaf holds every chunk of a roll-out's release."""

    kind: Literal["rollout.region_cached"] = "rollout.region_cached"
    rollout: str
    region: str
    wan_bytes: int = Field(ge=0, description="What had to be sent over the link")


class RolloutSettled(TaggedMessage):
    """These nodes keep the release, and are told so: nothing of the roll-out is left to do for them."""

    kind: Literal["rollout.settled"] = "rollout.settled"
    rollout: str
    nodes: list[str]


class RegionCacheFailed(TaggedMessage):
    """A blob of a roll-out's release is missing or damaged: no region can get the whole release."""

    kind: Literal["rollout.region_cache_failed"] = "rollout.region_cache_failed"
    rollout: str
    region: str
    reason: str


class QueryAnswered(TaggedMessage):
    """What a gate's question was answered while a region's stage baked; no value: `reason` says why."""

    kind: Literal["rollout.query_answered"] = "rollout.query_answered"
    rollout: str
    region: str
    stage: str
    since: datetime = Field(description="When the bake began that it is about")
    gate: int = Field(ge=0, description="Which of the plan's gates, from 0")
    value: float | None = Field(default=None, allow_inf_nan=False)
    reason: str = Field(default="", max_length=500)


class NodeMeasured(TaggedMessage):
    """What a node counted since it activated a release: totals, so a later report replaces an earlier one."""

    kind: Literal["rollout.node_measured"] = "rollout.node_measured"
    rollout: str
    node: str
    counter: int
    measured: Measured


class NodePhaseReported(TaggedMessage):
    """The phase that a node has reached with one desired state."""

    kind: Literal["rollout.node_phase"] = "rollout.node_phase"
    rollout: str
    node: str
    counter: int
    phase: NodePhase
    reason: str = ""
    wan_bytes: int = Field(default=0, ge=0, description="Fetched over the link, not from its region's cache")
