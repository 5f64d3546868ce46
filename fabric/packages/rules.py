"""What of an app's packages may be installed on a machine: its owner's word. Pure data."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from fedtide.fabric.strict import Strict

THE_MACHINES_OWN = "default"
LOCK = "uv.lock"
"""In an app's folder: the exact versions of all that it needs (made by `uv lock`)."""


class PackageRules(Strict):
    """Where packages that an app needs may come from. Apps that need none are not concerned."""

    wheels: bool = Field(default=True, description="Wheels that travel with the app (`--with-wheels`)")
    index: str = Field(
        default="",
        description="URL of a package index; `default`: as uv is set up on this machine; empty: none",
        repr=False,
    )
    max_bytes: int = Field(
        default=5 * 1024**3, ge=1, description="Of all environments; those that were not used for longest go first"
    )

    folder: Path | None = Field(
        default=None, description="Where they are kept; processes of one machine may share it. Default: in data_dir"
    )

    @property
    def ways(self) -> list[str]:
        """How this machine may get packages: `wheels`, `index`."""
        return [*(["wheels"] if self.wheels else []), *(["index"] if self.index else [])]


class Wanted(Strict):
    """An environment to find or make; see `environment.environment_for`."""

    root: Path
    rules: PackageRules
    app_dir: Path
    dependencies: tuple[str, ...]
    wheels: dict[str, str] = Field(description="By file name: their digests")
