"""One installation serves all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.installation import Installation


def bring_up(home: Path, regions: str, nodes: int, *options: str) -> Installation:
    there = Installation(home)
    up = there.process("up", "-d", "--regions", regions, "--nodes-per-region", str(nodes), *options, timeout_s=200)
    assert up.returncode == 0, up.stderr
    return there


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Two regions of two nodes."""
    there = bring_up(tmp_path_factory.mktemp("home"), "eu,us", 2)
    yield there
    there.run("down")
