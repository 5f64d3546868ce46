"""A Linux of our own as a process (https://docs.kernel.org/virt/uml/user_mode_linux_howto_v2.html).

For what the kernel of this machine does not give to a test. It sees the machine's files, and has a folder for
temporary ones of its own.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

PROGRAM = "linux.uml"
BOOT_AND_RUN_S = 200
_INIT = """\
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME={folder}/tmp TMPDIR={folder}/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs run /run
mount -t tmpfs tmp {folder}/tmp
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup
ip link set lo up
{setup}
cd {here}
{command} > {folder}/output 2>&1 < /dev/null
echo "ended with $?" >> {folder}/output
poweroff -f
"""


def run(command: list[str], folder: Path, setup: str = "") -> str:
    """What a command prints there as root, and last `ended with CODE`.

    Args:
        folder: an empty one for its files.
        setup: lines of sh that come before the command.

    Raises:
        subprocess.TimeoutExpired: it took longer than `BOOT_AND_RUN_S`.
    """
    init, told = folder / "init", folder / "output"
    (folder / "tmp").mkdir()
    text = _INIT.format(folder=folder, here=Path.cwd(), setup=setup, command=shlex.join(command))
    init.write_text(text)
    init.chmod(0o755)
    booted = [PROGRAM, "mem=1500M", "rootfstype=hostfs", "rootflags=/", "rw", f"init={init}", "con=null"]
    subprocess.run(booted, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOOT_AND_RUN_S, check=False)
    return told.read_text()
