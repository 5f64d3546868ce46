"""What every aggregator does first, done once by a fork that has nothing to do yet.

A fork copies each page of memory that it is the first to touch. Here it pays for that before there is a run that waits.
"""

from __future__ import annotations

import asyncio
import io
import threading
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from fedtide.fabric.flower.apps import describe, unpack
from fedtide.fabric.packages.requirements import unmet

_APP = """
[project]
name = "rehearsal"
dependencies = ["numpy"]
[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"
"""


def rehearse() -> None:
    """Talk over a socket in a loop of another thread, and unpack and read an app. Nothing of it stays."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(_talk(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    with TemporaryDirectory() as folder:
        app = Path(folder) / "app"
        bundle = io.BytesIO()
        with zipfile.ZipFile(bundle, "w") as file:
            file.writestr("pyproject.toml", _APP)
        unpack(bundle.getvalue(), app)
        unmet(describe(app).dependencies)


async def _talk() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    with TemporaryDirectory() as folder:
        address = Path(folder) / "socket"
        async with await asyncio.start_unix_server(answer, address):
            reader, writer = await asyncio.open_unix_connection(address)
            writer.write(b"ping\n")
            await reader.readline()
            writer.close()
