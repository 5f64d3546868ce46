"""Which log the coordinator has, as this node heard last: with another one it does not know all that it knew."""

from __future__ import annotations

from pathlib import Path

from fedtide.fabric.process.files import write_atomically


class Epochs:
    """Kept in a file of the node's folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "epoch"

    def is_another(self, epoch: str) -> bool:
        """Whether it is not the one that was heard last; the first one is kept at once."""
        if not epoch:
            return False
        try:
            return self._file.read_text(encoding="utf-8") != epoch
        except FileNotFoundError:
            self.keep(epoch)
            return False

    def keep(self, epoch: str) -> None:
        write_atomically(self._file, epoch.encode())
