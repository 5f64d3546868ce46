"""How processes of Python are started here."""

from __future__ import annotations

import sys
from pathlib import Path


def module_command(name: str, *arguments: str, python: Path | str = sys.executable) -> list[str]:
    """The command that runs a module.

    With `-P`: the folder that somebody works in, an app's often, is not searched for modules, and a file `queue.py`
    there is not taken for Python's own.
    """
    return [str(python), "-P", "-m", name, *arguments]
