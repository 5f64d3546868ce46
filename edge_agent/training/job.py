"""What the agent asks of a trainer process: one task as files. Pure data."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from fedtide.fabric.strict import ConfigValues, Strict

STATE = "state"
"""The run's state after a task, among the files of its answer."""
USUAL_PROCESSES = 512


class Job(Strict):
    """One task as files: what the agent asks of the trainer process."""

    run: str
    task_file: Path
    log_file: Path = Field(description="What the app prints and logs in this run")
    blobs: dict[str, Path]
    app_dir: Path
    work_dir: Path = Field(description="The app's working directory, of this run")
    state_file: Path
    progress_file: Path = Field(description="Checkpoint of a task that takes long")
    out_dir: Path
    node_id: int
    node_config: ConfigValues = Field(description="Flower's node config")
    checkpoint_s: float
    confinement: str | None = Field(default=None, description="A `Confinement` as JSON; None: whatever the agent may")
    python: Path | None = Field(default=None, description="The interpreter that has the app's packages; None: this one")
    processes: int = Field(default=USUAL_PROCESSES, description="It may have so many at a time; one more fails")
    threads: int = Field(description="Threads of numeric libraries; 0: one per core")
