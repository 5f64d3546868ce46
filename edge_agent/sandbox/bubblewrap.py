"""The trainer process in namespaces of its own, made by bubblewrap: it sees neither other processes nor the agent's
files, has no network if it may have none, and ends with all that it has started.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from fedtide.edge_agent.sandbox.visible import devices

PROGRAM = "bwrap"
_RESOLVER = Path("/run/systemd/resolve")
TRY_S = 10.0


def command(
    hidden: Iterable[Path], read: Iterable[Path], write: Iterable[Path], *, network: bool, cwd: Path
) -> list[str]:
    """What stands before the program's own command line.

    Args:
        hidden: files and folders that it does not see, but for what of them is in `read` and `write`.
    """
    found = [PROGRAM, "--die-with-parent", "--unshare-user-try", "--unshare-pid", "--unshare-ipc", "--unshare-uts"]
    found += ["--unshare-cgroup-try", *([] if network else ["--unshare-net"])]
    found += [*_bind("--ro-bind", "/"), "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/run"]
    for device in devices():
        if device.name.startswith("nvidia") or device.name in ("dri", "kfd", "dxg"):
            found += _bind("--dev-bind-try", device)
    if network:
        found += _bind("--ro-bind-try", _RESOLVER)
    for path in hidden:
        if path.is_dir():
            found += ["--tmpfs", str(path)]
        elif path.exists():
            found += ["--ro-bind", "/dev/null", str(path)]
    for path in read:
        found += _bind("--ro-bind-try", path)
    for path in write:
        found += _bind("--bind", path)
    return [*found, "--chdir", str(cwd), "--"]


def _bind(how: str, path: Path | str) -> list[str]:
    return [how, str(path), str(path)]


def works() -> bool:
    """Whether it is installed, and the kernel lets this user make namespaces. Takes some milliseconds."""
    if shutil.which(PROGRAM) is None:
        return False
    asked = [*command((), (), (), network=False, cwd=Path("/")), "true"]
    try:
        return subprocess.run(asked, capture_output=True, timeout=TRY_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
