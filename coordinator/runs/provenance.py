"""How a release came to be, as SLSA provenance: what was planned, from what, and what went into it. Pure.

Names no node: the updates that count are one digest (fabric.merkle).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fedtide.coordinator.runs import rounds, runs
from fedtide.fabric import merkle
from fedtide.fabric.encoding import to_json
from fedtide.fabric.plans.release import ReleaseManifest
from fedtide.fabric.plans.run_spec import RunSpec
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.trust.provenance import BUILD_TYPE, external


def predicate(manifest: ReleaseManifest, run: runs.Run | None, at: datetime, version: str) -> dict[str, Any]:
    """The predicate of a release's statement (https://slsa.dev/spec/v1.0/provenance).

    Args:
        run: what has made it; None: it is forgotten, or was made elsewhere.
        at: when it was published.
        version: of the coordinator.
    """
    lineage = manifest.lineage
    closed = [r for _, r in sorted(run.rounds.items()) if isinstance(r, rounds.Closed)] if run is not None else []
    dependencies = [_dependency(f"app/{lineage.app.name}", lineage.app.bundle)]
    dependencies += [_dependency("base", lineage.base)] if lineage.base is not None else []
    about: dict[str, Any] = {
        **external(manifest),
        "plan": {"sha256": digest_of(run.facts.spec)} if run is not None else None,
        "runConfig": {name: _plain(value) for name, value in lineage.run_config.items()},
        "askedBy": run.facts.by if run is not None else "",
    }
    went_in = {
        "rounds": lineage.rounds,
        "updates": lineage.updates,
        "participants": lineage.participants,
        "merkleRoot": updates_of(closed),
        "dropped": dropped(run.rounds) if run is not None else {},
        "metrics": {name: _plain(value) for name, value in manifest.metrics.items()},
        "privacy": lineage.privacy.model_dump(mode="json") if lineage.privacy is not None else None,
    }
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": about,
            "internalParameters": went_in,
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": {"id": "urn:fedtide:coordinator", "version": {"fedtide": version}},
            "metadata": {
                "invocationId": lineage.run,
                "startedOn": run.facts.requested_at.isoformat() if run is not None else None,
                "finishedOn": at.isoformat(),
            },
            "byproducts": [
                {"name": f"round/{each.number}", "digest": {"sha256": each.updates}} for each in closed if each.updates
            ],
        },
    }


def digest_of(spec: RunSpec) -> str:
    """Of a plan, as the log has it."""
    return hashlib.sha256(to_json(spec)).hexdigest()


def updates_of(closed: list[rounds.Closed]) -> str:
    """The Merkle root over the roots of rounds, in their order; empty: of none is one known."""
    told = [each.updates for each in closed if each.updates]
    return merkle.root(told) if told else ""


def dropped(of: Mapping[int, rounds.Round]) -> dict[str, int]:
    """How many answers of training did not count, by why."""
    tallies = [r.phases["train"] for r in of.values() if "train" in r.phases]
    return dict(sorted(Counter(each.category for t in tallies for each in t.refused.values()).items()))


def _dependency(uri: str, ref: BlobRef) -> dict[str, Any]:
    return {"uri": f"urn:fedtide:{uri}", "digest": {"fedtideBlob": ref.digest}}


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
