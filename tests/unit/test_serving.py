"""Lanes and swaps: batches of one release only, bounded queues, nothing dropped."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

from fedtide.edge_agent.serving.batching import Overloaded
from fedtide.edge_agent.serving.serving import Served, Serving
from fedtide.edge_agent.serving.sessions import InferenceFailed, InterfaceChanged, Model, ModelUnusable
from fedtide.fabric.errors import ConfigError, NotFound, RemoteError
from fedtide.fabric.plans.release import Export
from fedtide.fabric.tensors.preprocessing import Preprocessing, Scale
from tests.integration.releases import graph
from tests.served import config, model


def _x(*rows: float) -> dict[str, Any]:
    return {"x": np.array([[r, r, r] for r in rows], np.float32)}


async def _first(serving: Serving, *rows: float) -> tuple[str, list[float]]:
    used, outputs = await serving.infer("scale", None, _x(*rows))
    return used.version, outputs["y"][:, 0].tolist()


async def test_requests_that_wait_are_run_together_and_each_gets_its_own_rows(tmp_path: Path) -> None:
    serving = Serving(config(tmp_path, batch_wait_ms=50))
    serving.swap(model(tmp_path, 2))
    answers = await asyncio.gather(*(_first(serving, *range(n, n + n % 3 + 1)) for n in range(12)))
    assert answers == [("2", [2.0 * r for r in range(n, n + n % 3 + 1)]) for n in range(12)]
    assert serving._active["scale"].largest_batch > 1


async def test_a_swap_under_way_drops_nothing_and_every_answer_is_of_one_release(tmp_path: Path) -> None:
    serving = Serving(config(tmp_path, batch_wait_ms=5))
    releases = [model(tmp_path, version) for version in range(1, 6)]
    serving.swap(releases[0])
    asked = []
    for release in releases:
        serving.swap(release)
        asked += [asyncio.ensure_future(_first(serving, 1, 2)) for _ in range(20)]
        await asyncio.sleep(0)
    for version, answer in await asyncio.gather(*asked):
        assert answer == [float(version), 2 * float(version)]


async def test_more_requests_than_may_wait_are_refused_and_the_others_answered(tmp_path: Path) -> None:
    serving = Serving(config(tmp_path, batch_wait_ms=50, queue_size=4))
    serving.swap(model(tmp_path))
    done = await asyncio.gather(*(_first(serving, 1) for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(d, Overloaded) for d in done) == 6
    assert sum(d == ("1", [1.0]) for d in done) == 4


def _table() -> bytes:
    """A table of three numbers: ONNX Runtime fails on an index that is not in it."""
    index = helper.make_tensor_value_info("x", TensorProto.INT64, ["batch"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"])
    table = helper.make_tensor("table", TensorProto.FLOAT, [3], [10.0, 11.0, 12.0])
    body = helper.make_graph([helper.make_node("Gather", ["table", "x"], ["y"])], "table", [index], [y], [table])
    return bytes(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())


async def test_one_bad_request_in_a_batch_is_not_the_end_of_the_others(tmp_path: Path) -> None:
    serving = Serving(config(tmp_path, batch_wait_ms=50))
    serving.swap(model(tmp_path, onnx=_table()))
    seen: list[Served] = []
    serving.observers.append(seen.append)
    asked = [serving.infer("scale", None, {"x": np.array([i])}) for i in (0, 99, 2)]
    good, bad, other = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(bad, InferenceFailed)
    assert [r[1]["y"].tolist() for r in (good, other) if isinstance(r, tuple)] == [[10.0], [12.0]]
    assert (serving.served, serving.failed) == (2, 1)
    assert sorted(s.outputs is None for s in seen) == [False, False, True]


async def test_an_older_version_is_answered_by_who_names_it_as_long_as_it_is_kept(tmp_path: Path) -> None:
    serving = Serving(config(tmp_path))
    old, new = model(tmp_path, 1), model(tmp_path, 2)
    serving.swap(new)
    serving.keep(old, "scale")
    used, _ = await serving.infer("scale", "1", _x(1))
    assert used is old
    assert [m.version for m in serving.versions("scale")] == ["2", "1"]
    serving.keep(None, "scale")
    with pytest.raises(NotFound, match="served in version 2"):
        await serving.infer("scale", "1", _x(1))


async def test_inputs_are_preprocessed_as_the_manifest_says_and_checked_against_the_graph(tmp_path: Path) -> None:
    serving = Serving(config(tmp_path))
    export = Export(preprocessing=[Preprocessing(input="x", steps=[Scale(factor=10)])])
    serving.swap(model(tmp_path, 2, export=export))
    assert await _first(serving, 1) == ("2", [20.0])
    for inputs, words in (
        ({"x": np.ones((1, 4))}, "has shape"),
        ({"z": np.ones((1, 3))}, "takes inputs"),
        ({"x": np.array([["a", "b", "c"]])}, "preprocessing|cannot be read"),
    ):
        with pytest.raises(RemoteError, match=words):
            await serving.infer("scale", None, inputs)


def test_a_release_with_other_inputs_is_refused_by_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(InterfaceChanged, match="new_interface"):
        model(tmp_path, 2, onnx=_table()).check_interface(model(tmp_path, 1))
    model(tmp_path, 3).check_interface(model(tmp_path, 1))


def test_a_graph_that_reads_files_outside_its_folder_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(np.float32(5).tobytes())
    proto = onnx.ModelProto.FromString(graph(5.0))
    tensor = proto.graph.initializer[0]
    set_external_data(tensor, location="../secret")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    with pytest.raises(ModelUnusable, match="load"):
        model(tmp_path, 5, onnx=proto.SerializeToString())


def test_a_provider_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CUDAExecutionProvider"):
        model(tmp_path, providers=["CUDAExecutionProvider"])
    loaded: Model = model(tmp_path, providers=["CPUExecutionProvider"], graph_optimization="basic")
    assert loaded.batchable


def _found() -> bytes:
    """The places of the numbers that are not zero: rows out are not rows in."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, ["found", 2])
    nodes = [helper.make_node("NonZero", ["x"], ["t"]), helper.make_node("Transpose", ["t"], ["y"])]
    body = helper.make_graph(nodes, "found", [x], [y])
    return bytes(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())


@pytest.mark.parametrize("lies", [False, True])
async def test_a_model_whose_rows_out_are_not_its_rows_in_is_run_request_by_request(tmp_path: Path, lies: bool) -> None:
    content = _found()
    if lies:  # it says that they are
        proto = onnx.ModelProto.FromString(content)
        proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
        content = proto.SerializeToString()
    serving = Serving(config(tmp_path, batch_wait_ms=30))
    serving.swap(model(tmp_path, onnx=content))
    rows = [np.array([[1, 0, 0]], np.float32), np.array([[0, 0, 1]], np.float32), np.array([[1, 1, 1]], np.float32)]
    answers = await asyncio.gather(*(serving.infer("scale", None, {"x": row}) for row in rows))
    assert [outputs["y"].tolist() for _, outputs in answers] == [[[0, 0]], [[0, 2]], [[0, 0], [0, 1], [0, 2]]]


async def test_an_observer_that_fails_is_no_reason_to_fail_a_request(tmp_path: Path) -> None:
    serving = Serving(config(tmp_path))
    serving.swap(model(tmp_path, 2))

    def broken(_: Served) -> None:
        raise ValueError("whatever")

    serving.observers.append(broken)
    assert await _first(serving, 1) == ("2", [2.0])
