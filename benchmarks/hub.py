"""A real nats-server with a store of its own, for one measurement."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtide.console.embedded import nats_config
from fedtide.console.embedded.plan import free_ports, nats_server


@contextmanager
def hub() -> Iterator[tuple[str, int]]:
    """Its address and pid."""
    with tempfile.TemporaryDirectory() as folder:
        port, leaf_port = free_ports(2)
        config = Path(folder, "hub.conf")
        config.write_text(nats_config.hub(port, leaf_port, Path(folder, "store")))
        quiet = subprocess.DEVNULL
        server = subprocess.Popen([nats_server(), "-c", str(config)], stdout=quiet, stderr=quiet)
        try:
            yield f"nats://127.0.0.1:{port}", server.pid
        finally:
            server.kill()
            server.wait()
