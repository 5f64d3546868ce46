"""The folder of one embedded installation, and its layout."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import ValidationError

from fedtide.fabric.errors import NotFound
from fedtide.fabric.strict import Strict

ENVIRONMENT = "FEDTIDE_HOME"
TENANT = "FEDTIDE_TENANT"
"""Environment variable: which tenant of the installation a command is for; none: the installation itself."""
SUPERVISOR_SAYS = "fedtide up: "
"""Begins the line in which a supervisor says why it ends."""


class UpState(Strict):
    """The published state of a running installation; written once everything is up."""

    pid: int
    apis: list[str]
    hub_url: str
    regions: list[str]
    nodes: list[str]


@dataclass(frozen=True, slots=True)
class Home:
    """`tenant`: whose keys are meant; empty: those of the installation itself."""

    root: Path
    tenant: str = ""

    @classmethod
    def find(cls) -> Home:
        """`$FEDTIDE_HOME`, or `.fedtide` in the current folder."""
        return cls(Path(os.environ.get(ENVIRONMENT) or ".fedtide").resolve())

    @classmethod
    def of_caller(cls) -> Home:
        """The same, with the keys of the tenant that a command is for."""
        return cls(cls.find().root, os.environ.get(TENANT, ""))

    @property
    def keys(self) -> Path:
        """Below which the keys are that a person holds."""
        return self.root / "tenants" / self.tenant if self.tenant else self.root

    @property
    def up_file(self) -> Path:
        return self.root / "up.json"

    @property
    def lock_file(self) -> Path:
        return self.root / "up.lock"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def identity(self) -> Path:
        """Folder of secrets of the coordinator."""
        return self.root / "identity"

    @property
    def trust(self) -> Path:
        """Folder of the offline keys, for as long as nobody has taken them away."""
        return self.keys / "trust"

    @property
    def release_authority(self) -> Path:
        """Folder of the release authority: its key, and what it has signed."""
        return self.keys / "release-authority"

    @property
    def join_token_file(self) -> Path:
        return self.root / "config" / "join-token"

    @property
    def api_token_file(self) -> Path:
        """What callers of the API must show; the CLI reads it here."""
        return self.keys / "api-token" if self.tenant else self.identity / "api-token"

    def store(self, server: str) -> Path:
        """Storage folder of a nats-server."""
        return self.root / "nats" / server

    def endpoint_file_of(self, coordinator: str) -> Path:
        return self.root / "coordinator" / f"{coordinator}.json"

    def state_of_this_process(self) -> UpState:
        """The installation that this very process supervises."""
        return UpState.model_validate_json(self.up_file.read_bytes())

    def state(self) -> UpState:
        """The running installation.

        Raises:
            NotFound: nothing is up here (a state left by a killed supervisor does not count).
        """
        try:
            state = UpState.model_validate_json(self.up_file.read_bytes())
            command = psutil.Process(state.pid).cmdline()
        except (OSError, ValidationError, psutil.Error):
            command = []
        if "fedtide.console.embedded" not in command:
            raise NotFound(f"no fedtide is up in {self.root}", "Start one with `fedtide up`, or set FEDTIDE_HOME")
        return state
