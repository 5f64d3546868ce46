"""The metadata that say who may do what, as they were published. Pure; `adapters.director` verifies before it logs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.identity import TrustEvent, TrustPublished, TrustVouched
from fedtide.fabric.messages.trust import TrustKnown, TrustMetadata


@dataclass(frozen=True, slots=True)
class Trust:
    """`roots`: of versions 1, 2, ... `version`: of timestamp and snapshot."""

    roots: tuple[str, ...] = ()
    targets: str = ""
    timestamp: str = ""
    snapshot: str = ""
    version: int = 0

    @property
    def is_used(self) -> bool:
        return bool(self.roots)

    def newer_than(self, known: TrustKnown) -> TrustMetadata:
        """What somebody lacks who knows these versions."""
        whole = known.timestamp < self.version or known.root < len(self.roots)
        return TrustMetadata(
            roots=list(self.roots[known.root :]),
            timestamp=self.timestamp if whole else "",
            snapshot=self.snapshot if whole else "",
            targets=self.targets if whole else "",
        )


def step(state: Trust, event: TrustEvent) -> Trust:
    """Raises InvalidTransition: others have published meanwhile."""
    match event:
        case TrustPublished(roots=roots, targets=targets, after=after):
            if roots and after != len(state.roots):
                raise InvalidTransition(f"{len(state.roots)} roots are known, not {after}", "Publish again")
            return replace(state, roots=(*state.roots, *roots), targets=targets or state.targets)
        case TrustVouched(version=version, timestamp=timestamp, snapshot=snapshot):
            if version <= state.version:
                return state
            return replace(state, version=version, timestamp=timestamp, snapshot=snapshot)
