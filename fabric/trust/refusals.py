"""Why something is not believed."""

from __future__ import annotations

from fedtide.fabric.errors import RemoteError
from fedtide.fabric.messages.trust import RefusalKind


class Untrusted(RemoteError):
    """What came is not what those say who may say it; `kind` names the attack that it would be."""

    def __init__(self, kind: RefusalKind, what: str, remedy: str = "") -> None:
        self.kind: RefusalKind = kind
        super().__init__(f"{what} ({kind.replace('_', ' ')})", remedy)
