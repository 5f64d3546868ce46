"""Where an app went wrong: its own file and line, for people who cannot see the machine. No flwr needed."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType

_MOST_CHARACTERS = 1500


def place_of(function: object, directory: Path) -> str:
    """The app's file and line of a function that Flower has wrapped, as ` (FILE:LINE)`; empty: not found."""
    open_, seen = [function], set[int]()
    while open_:
        found = open_.pop(0)
        if id(found) in seen:
            continue
        seen.add(id(found))
        code = getattr(found, "__code__", None)
        if code is not None and Path(code.co_filename).is_relative_to(directory):
            return f" ({Path(code.co_filename).relative_to(directory)}:{code.co_firstlineno} {code.co_name})"
        open_ += [cell.cell_contents for cell in getattr(found, "__closure__", None) or ()]
    return ""


def told(error: BaseException, directory: Path) -> str:
    """The error and the app's own line that it came from; below that, if there is one, its traceback within the app."""
    first = f"{type(error).__name__}: {error}"
    frames = [*_own_frames(error.__traceback__, directory)]
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{type(error).__name__}: {error.msg} ({_short(error.filename, directory)}:{error.lineno})"
    if not frames:
        return first
    last = frames[-1]
    where = f"{_short(last.filename, directory)}:{last.lineno} in {last.name}"
    first, *more = first.splitlines() or [first]  # what is shown in one line ends with the place
    lines = more + [f"{_short(f.filename, directory)}:{f.lineno} in {f.name}: {f.line}" for f in frames]
    return f"{first} ({where})\n" + "\n".join(lines)[-_MOST_CHARACTERS:]


def _own_frames(found: TracebackType | None, directory: Path) -> list[traceback.FrameSummary]:
    home = directory.resolve()
    return [f for f in traceback.extract_tb(found) if Path(f.filename).resolve().is_relative_to(home)]


def _short(filename: str, directory: Path) -> str:
    file, home = Path(filename).resolve(), directory.resolve()
    return str(file.relative_to(home)) if file.is_relative_to(home) else file.name
