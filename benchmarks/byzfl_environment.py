"""byzfl in an environment of its own: only its own package; torch and scipy are this environment's."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

VERSION = "0.0.11"
_SCRIPT = Path(__file__).with_name("byzfl_peer.py")


def run(*arguments: str, folder: Path = Path(".fedtide", "bench", "byzfl")) -> str:
    """Output of the peer script; the environment is made at the first call (needs a package index)."""
    python = folder / "bin" / "python"
    if not list(folder.glob(f"lib/*/site-packages/byzfl-{VERSION}.dist-info")):
        venv.create(folder, with_pip=False)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, f"byzfl=={VERSION}"], check=True)
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    command = [str(python), str(_SCRIPT), *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
