"""What `fedtide up` says of a supervisor that ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtide.console.cli.system_commands import _reason
from fedtide.console.home import SUPERVISOR_SAYS


@pytest.mark.parametrize(
    ("logged", "told"),
    [
        (
            f"{SUPERVISOR_SAYS}a fedtide is already up here\n2026 INFO httpx of the one that is up\n",
            "is already up here",
        ),
        ("Traceback (most recent call last):\nValueError: new\n", "ValueError: new"),
        ("", "no output"),
    ],
)
def test_the_reason_is_what_this_supervisor_said_last(tmp_path: Path, logged: str, told: str) -> None:
    file = tmp_path / "supervisor.log"
    file.write_text(f"{SUPERVISOR_SAYS}of last week\n")
    since = file.stat().st_size
    with file.open("a") as stream:
        stream.write(logged)
    assert _reason(file, since).endswith(told)
