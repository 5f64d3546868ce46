"""What was vouched for: of each version of a model one release, for ever."""

from __future__ import annotations

import json
from pathlib import Path

from fedtide.fabric.plans.release import ReleaseManifest
from fedtide.fabric.process.files import write_atomically
from fedtide.fabric.trust.refusals import Untrusted


class SignedBefore:
    """A file for each model; synced before a signature is given."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, manifest: ReleaseManifest, digest: str) -> None:
        """Raises Untrusted: another release of that version was vouched for."""
        file = self._folder / f"{manifest.model}.json"
        known: dict[str, str] = json.loads(file.read_bytes()) if file.exists() else {}
        before = known.setdefault(str(manifest.version), digest)
        if before != digest:
            raise Untrusted(
                "arbitrary",
                f"{manifest.model}@{manifest.version} was another release ({before[:12]}) when it was signed before",
            )
        write_atomically(file, json.dumps(known).encode())
