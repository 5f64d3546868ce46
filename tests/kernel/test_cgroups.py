"""The limits that a delegated cgroup (v2) holds, on a kernel that has one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.kernel import on_cgroups, user_mode_linux

DELEGATED = f"""\
echo "+cpu +memory +pids" > /sys/fs/cgroup/cgroup.subtree_control
mkdir {on_cgroups.GROUP}
echo $$ > {on_cgroups.GROUP}/cgroup.procs
"""


@pytest.mark.slow  # boots a kernel
def test_the_kernel_holds_the_limits_of_the_owners_policy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(on_cgroups.__file__)]
    told = user_mode_linux.run(command, tmp_path, setup=DELEGATED)
    print(told)
    assert told.endswith("ended with 0\n")
    assert "3 passed" in told
