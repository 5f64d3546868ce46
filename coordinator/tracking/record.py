"""A run as it is reported to trackers: the whole of it each time, so that nothing depends on what came before. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from fedtide.fabric.strict import Strict

Outcome = Literal["running", "completed", "failed", "cancelled"]


class TrackedRound(Strict):
    """What one round came to."""

    round: int
    at: float = Field(description="When it closed, Unix seconds")
    metrics: dict[str, float]


class RunRecord(Strict):
    """A run so far. `files`: artefacts by name; they are made once a reporter asks for them, at the end."""

    run: str
    experiment: str
    began: float = Field(description="Unix seconds, as all times here")
    ended: float | None = None
    outcome: Outcome = "running"
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    rounds: list[TrackedRound] = []
    files: dict[str, Path] | None = Field(default=None, description="None: not there yet")
    mlflow: str = ""
    artifact_schemes: list[str] = Field(default=[], description="Where MLflow may have artefacts put, beside itself")
    event_files: Path | None = Field(default=None, description="TensorBoard's folder for all runs")
