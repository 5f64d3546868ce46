"""The trainer process in namespaces of its own, made by bubblewrap: it sees neither other processes nor the agent's
files, has no network if it may have none, and ends with all that it has started.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from fedtide.edge_agent.sandbox.users import User, closed_to
from fedtide.edge_agent.sandbox.visible import gpus, interpreter, package

PROGRAM = "bwrap"
_CHANGES_USER = (
    *("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"),
    *("--cap-add", "CAP_SETPCAP", "--cap-add", "CAP_KILL"),
)
"""A namespace of users would have one user only. The trainer process lets apps become another, and ends them."""
_RESOLVER = Path("/run/systemd/resolve")
TRY_S = 10.0


def command(
    hidden: Iterable[Path],
    read: Iterable[Path],
    write: Iterable[Path],
    *,
    network: bool,
    cwd: Path,
    user: User | None = None,
    data: Iterable[Path] = (),
) -> list[str]:
    """What stands before the program's own command line.

    Args:
        hidden: files and folders that it does not see, but for what of them is in `read` and `write`.
        user: whom it lets apps become; only as root.
        data: what such a user must reach beside the above and the interpreter.
    """
    hidden, read, write = [*hidden], [*read], [*write]
    found = [PROGRAM, "--die-with-parent", *(_CHANGES_USER if user else ["--unshare-user-try"]), "--unshare-pid"]
    found += ["--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", *([] if network else ["--unshare-net"])]
    found += [*_bind("--ro-bind", "/"), "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/run"]
    for device in gpus():
        found += _bind("--dev-bind-try", device)
    if user is not None:
        found += ["--perms", "1777", "--tmpfs", "/dev/shm"]  # noqa: S108  # its own
        found += _opened(user, [*interpreter(), *package(), *data], [*hidden, *read, *write])
    for path in hidden:
        if path.is_dir():
            found += ["--tmpfs", str(path)]
        elif path.exists():
            found += ["--ro-bind", "/dev/null", str(path)]
    if user is not None:
        found += _ways([*read, *write, _RESOLVER], {*hidden, Path("/run")})
    for path in [*read, *([_RESOLVER] if network else [])]:
        found += _bind("--ro-bind-try", path)
    for path in write:
        found += _bind("--bind", path)
    return [*found, "--chdir", str(cwd), "--"]


def _opened(user: User, shown: list[Path], others: list[Path]) -> list[str]:
    """Folders that the user may not pass (root's home, often) stand empty, but for what is to be reached below them."""
    real = sorted({path.resolve() for path in shown})  # what holds another comes before it
    closed = closed_to(user, [*shown, *others])
    # A link stays one: mounted, it would show again what is hidden where it leads.
    elsewhere = {path for path in shown if path != path.resolve() and not closed.isdisjoint(path.parents)}
    links = sorted(path for path in elsewhere if {*real}.isdisjoint(path.parents))
    found = [word for folder in sorted(closed) for word in ("--tmpfs", str(folder))]
    found += _ways([*real, *links, *others], closed)
    for path in real:
        if not closed.isdisjoint(path.parents):
            found += _bind("--ro-bind-try", path)
    return [*found, *(word for path in links for word in ("--symlink", str(path.resolve()), str(path)))]


def _ways(paths: Iterable[Path], emptied: set[Path]) -> list[str]:
    """Folders that lead to what is shown below an emptied one: those that bubblewrap makes are root's alone."""
    between = {folder for path in paths for folder in path.parents if not emptied.isdisjoint(folder.parents)}
    return [word for folder in sorted(between) for word in ("--dir", str(folder))]


def _bind(how: str, path: Path | str) -> list[str]:
    return [how, str(path), str(path)]


def works(user: User | None = None) -> bool:
    """Whether it is installed, and the kernel lets this user make namespaces. Takes some milliseconds."""
    if shutil.which(PROGRAM) is None:
        return False
    asked = [*command((), (), (), network=False, cwd=Path("/"), user=user), "true"]
    try:
        return subprocess.run(asked, capture_output=True, timeout=TRY_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
