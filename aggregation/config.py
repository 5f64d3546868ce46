"""What a launcher hands to an aggregator process."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.nats.urls import NatsUrl
from fedtide.fabric.packages.rules import PackageRules
from fedtide.fabric.plans.run_spec import RunSpec
from fedtide.fabric.strict import Strict


class WorkerConfig(Strict):
    """One run, one attempt. Read from a JSON file, so that nothing secret stands in a command line."""

    run: str
    attempt: int
    life: int = Field(default=1, description="1, and one more each time that the run goes on after its end")
    spec: RunSpec
    nats_url: NatsUrl
    tenant: str = "default"
    credentials: Path | None = None
    ca_file: Path | None = None
    work_dir: Path
    regions: list[str]
    packages: PackageRules = PackageRules()
    trace: str = Field(default="", description="W3C traceparent of the run; empty: it is not traced")
    larger_machine: bool = Field(default=False, description="The next attempt gets one, if this runs out of memory")

    @property
    def access(self) -> Access:
        return Access(self.credentials, self.ca_file)
