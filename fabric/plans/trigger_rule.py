"""Trigger rules: what starts a run, a round or a roll-out because something happened. Pure data."""

from __future__ import annotations

import re
from datetime import time
from typing import Annotated, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from fedtide.fabric.errors import ConfigError
from fedtide.fabric.ids import check_token
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.plans.run_spec import RunRequest
from fedtide.fabric.plans.windows import Window
from fedtide.fabric.strict import Strict, Tagged

SCHEDULE_TYPE = "dev.fedtide.schedule."


class StartRun(RunRequest, Tagged):
    """A run of an app, or of a model's app from its latest release."""

    kind: Literal["run"] = "run"

    def request(self) -> RunRequest:
        return RunRequest(**{name: getattr(self, name) for name in RunRequest.model_fields})


class StartRollout(Tagged):
    """A roll-out of a model's latest release."""

    kind: Literal["rollout"] = "rollout"
    model: str = Field(description="Whose latest release is rolled out")
    regions: list[str] = Field(default=[], description="In this order; empty: all")
    canary: float = Field(default=0.34, ge=0, description="As `canary` of a roll-out")
    plan: dict[str, JsonValue] = Field(default={}, description="Any other field of a roll-out plan")

    def request(self) -> RolloutRequest:
        """Raises pydantic.ValidationError for a field of `plan` that is wrong."""
        named = {"regions": self.regions, "canary": self.canary, "model": self.model}
        return RolloutRequest.model_validate({**named, **self.plan})


class StartRound(Tagged):
    """One more round of a model, from its latest release."""

    kind: Literal["round"] = "round"
    model: str = Field(description="Which model is trained for one more round")
    selector: dict[str, str] = Field(default={}, description="Labels that a node must have")

    def request(self) -> RunRequest:
        return RunRequest(model=self.model, selector=self.selector, rounds=1, base="latest")


class Notify(Tagged):
    """Tells people or another system, through one of the coordinator's channels."""

    kind: Literal["notify"] = "notify"
    to: str = Field(description="A channel, by its name in the coordinator's `notify`")
    text: str = Field(
        default="",
        max_length=4000,
        description="With $name for fields of the event; empty: its type and all its fields",
    )


Action = Annotated[StartRun | StartRound | StartRollout | Notify, Field(discriminator="kind")]


class Schedule(Strict):
    """Five-field cron, or a daily window of which the best hour is taken; in a time zone."""

    cron: str = Field(default="", description="Five fields: minute, hour, day of month, month, day of week")
    when: str = Field(
        default="",
        description="Instead: `most-available within 02:00-06:00`, once in each such window, at the hour when most of "
        "the nodes that it would ask are likely to be online and idle",
    )
    timezone: str = Field(default="UTC", description="Of the five fields, or of the window")

    @model_validator(mode="after")
    def _one_of_both(self) -> Schedule:
        if bool(self.cron) == bool(self.when):
            raise ValueError("needs either `cron` or `when`")
        if self.when and _WITHIN.fullmatch(self.when) is None:
            raise ValueError("`when` is written like: most-available within 02:00-06:00")
        return self

    @property
    def window(self) -> Window | None:
        """The times of day of `when`."""
        found = _WITHIN.fullmatch(self.when)
        if found is None:
            return None
        return Window(start=time.fromisoformat(found[1]), end=time.fromisoformat(found[2]))


_TIME = r"((?:[01]\d|2[0-3]):[0-5]\d)"
_WITHIN = re.compile(rf"most-available within {_TIME} ?- ?{_TIME}")


class TriggerRule(Strict):
    """One rule. It fires at most once for one event, even if that is delivered again."""

    name: str = Field(description="Its name: letters, digits, `-`, `_`")
    on: str = Field(default="", description="Event type; a trailing * matches any end")
    schedule: Schedule | None = Field(default=None, description="Instead of `on`: fires by the clock")
    where: str = Field(default="", description="Expression over the event's fields; empty: always")
    do: Action = Field(description="What it starts: a `run`, a `round` or a `rollout`; or `notify`")
    cooldown_s: float = Field(default=0.0, ge=0, description="Seconds after a firing in which nothing fires")
    policy: Literal["skip", "queue", "replace"] = Field(default="skip", description="If what it started is active")
    max_queue: int = Field(default=16, ge=1, description="With `queue`: more are skipped")
    budget: int | None = Field(default=None, ge=0, description="Firings in all; None: no limit")
    budget_rounds: int | None = Field(default=None, ge=0, description="Rounds in all; needs a run with `rounds`")
    dedupe: str = Field(default="", description="A field: equal values fire once; empty: each event for itself")

    @model_validator(mode="after")
    def _one_source(self) -> TriggerRule:
        if bool(self.on) == (self.schedule is not None):
            raise ValueError("needs either `on` or `schedule`")
        return self

    @model_validator(mode="after")
    def _rounds_are_known(self) -> TriggerRule:
        if self.budget_rounds is not None and not (isinstance(self.do, StartRun) and self.do.rounds):
            raise ValueError("`budget_rounds` needs a run with `rounds`")
        return self

    @property
    def most_firings(self) -> int | None:
        """How often it may fire in all, by whichever budget is smaller."""
        limits = [] if self.budget is None else [self.budget]
        if self.budget_rounds is not None and isinstance(self.do, StartRun) and self.do.rounds:
            limits.append(self.budget_rounds // self.do.rounds)
        return min(limits, default=None)

    @property
    def type(self) -> str:
        """The type of the events that it listens to."""
        return self.on or f"{SCHEDULE_TYPE}{self.name}"

    @field_validator("name")
    @classmethod
    def _one_token(cls, value: str) -> str:
        try:
            return check_token("name", value)
        except ConfigError as exc:
            raise ValueError(exc.what) from exc


FieldValue = bool | int | float | str | list[bool | int | float | str]


class Signal(Strict):
    """What a rule sees of an event: its type, its id, and flat fields (`data.` and attributes)."""

    id: str
    type: str
    fields: dict[str, FieldValue] = {}


def matches_type(rule: TriggerRule, type_: str) -> bool:
    return type_.startswith(rule.type[:-1]) if rule.type.endswith("*") else type_ == rule.type
