"""The example apps, which train real networks with torch: on Flower's own loop and here, equal to the byte."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fedtide.fabric.nats.subjects import RELEASES, Subjects
from fedtide.fabric.nats.transfer import Source, read_blob
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.frame import decode
from tests.conftest import EXAMPLES
from tests.fidelity.reference import shown
from tests.fidelity.test_referee import NODES
from tests.integration.installation import Installation


def _reference(app: str, config: dict[str, Any]) -> Any:
    """One thread, as nodes here train with one: sums in another order are other sums."""
    command = [sys.executable, "-m", "tests.fidelity.reference", str(EXAMPLES / app), *NODES]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        command, input=json.dumps(config), capture_output=True, text=True, check=True, env={**os.environ, **threads}
    )
    return json.loads(done.stdout.splitlines()[-1])


async def _arrays(there: Installation, ref: BlobRef) -> dict[str, str]:
    broker, subjects = await there.hub.connect("test-reader"), Subjects()
    source = Source(broker, RELEASES)
    try:
        frame = await read_blob(source, subjects.release_blob, ref)
        return shown({t.spec.name: t.numpy() for t in decode(memoryview(frame))})
    finally:
        await broker.close()


@pytest.mark.slow
@pytest.mark.parametrize("app", ["digits", "sensors"])
def test_an_example_learns_the_same(installation: Installation, app: str) -> None:
    config = {"num-server-rounds": 2}
    expected = _reference(app, config)
    view = installation.train(EXAMPLES / app, "--rounds", "2")
    assert view.state == "completed" and view.model and view.version, view.reason
    published = installation.until_events("release.published", about=view.model)[-1].data
    arrays = BlobRef.model_validate(published["manifest"]["arrays"])
    assert asyncio.run(_arrays(installation, arrays)) == expected["arrays"]
    for each in view.rounds:
        for name, value in expected["metrics"].get(str(each.round), {}).items():
            assert each.metrics[name] == pytest.approx(value, rel=1e-5), (each.round, name)
