"""What of an app's packages may be installed on a machine: its owner's word. Pure data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedtide.fabric.strict import Strict

THE_MACHINES_OWN = "default"
Way = Literal["wheels", "index"]


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

    @property
    def ways(self) -> list[Way]:
        """How this machine may get packages."""
        return [*(["wheels"] if self.wheels else []), *(["index"] if self.index else [])]  # type: ignore[list-item]
