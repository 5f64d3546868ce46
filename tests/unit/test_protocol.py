"""The Open Inference Protocol's bytes: both ways, and everything that can be wrong with them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedtide.edge_agent.serving.protocol import InferRequest, decode_request, encode_response
from fedtide.fabric.errors import RemoteError


def _body(*tensors: dict[str, Any], tail: bytes = b"", **more: Any) -> tuple[bytes, int]:
    text = json.dumps({"inputs": list(tensors), **more}).encode()
    return text + tail, len(text)


def _binary(name: str, kind: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": size}}


@given(
    npst.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_]),
        npst.array_shapes(max_dims=3, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False},
    )
)
def test_a_tensor_comes_back_as_it_was_in_either_form(array: Any) -> None:
    for binary in (False, True):
        asked = InferRequest("7", {}, {"y": binary}, binary)
        body, json_length = encode_response(("m", "1", "d"), {"y": array}, asked)
        assert (json_length is None) is not binary
        head = json.loads(body[:json_length])
        assert head["id"] == "7"
        again = json.dumps({"inputs": head["outputs"]}).encode()
        tail = body[json_length:] if json_length is not None else b""
        found = decode_request(again + tail, len(again)).inputs["y"]
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_strings_are_carried_in_both_forms() -> None:
    texts = np.array([["a", "öö"]], dtype=object)
    body, length = encode_response(("m", "1", "d"), {"t": texts}, InferRequest("", {}, {}, True))
    assert length is not None
    tensor = json.loads(body[:length])["outputs"][0]
    text = json.dumps({"inputs": [tensor]}).encode()
    assert decode_request(text + body[length:], len(text)).inputs["t"].tolist() == [["a", "öö"]]
    plain, _ = _body({"name": "t", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]})
    assert decode_request(plain, None).inputs["t"].tolist() == ["a", "b"]


def test_outputs_say_for_themselves_whether_they_are_binary() -> None:
    body, length = _body(
        {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]},
        outputs=[{"name": "y", "parameters": {"binary_data": False}}, {"name": "z"}],
        parameters={"binary_data_output": True},
    )
    assert decode_request(body, length).outputs == {"y": False, "z": True}


@pytest.mark.parametrize(
    ("body", "length", "words"),
    [
        (b"not json", None, "malformed"),
        (b"{}", None, "malformed"),
        (b'{"inputs": [1]}', None, "malformed"),
        (b'{"inputs": []}', 99, "the body has"),
        (*_body(_binary("x", "FP32", [2], 4), tail=b"1234"), "do not fill shape"),
        (*_body(_binary("x", "FP32", [2], 8), tail=b"1234"), "are left"),
        (*_body(_binary("x", "FP32", [-1], 4), tail=b"1234"), "negative"),
        (*_body(_binary("x", "FP32", [1], 4), tail=b"12345678"), "belong to no input"),
        (*_body(_binary("x", "BYTES", [1], 3), tail=b"123"), "cut off"),
        (*_body(_binary("x", "BYTES", [1], 5), tail=b"\x09\0\0\0a"), "cut off"),
        (*_body(_binary("x", "FP31", [1], 4), tail=b"1234"), "FP31"),
    ],
)
def test_a_malformed_request_is_refused_with_the_reason(body: bytes, length: int | None, words: str) -> None:
    with pytest.raises(RemoteError, match=words):
        decode_request(body, length)


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        ("FP32", [1, None], "null is no FP32"),
        ("FP32", [1, True], "true is no FP32"),
        ("FP64", [1, "2"], '"2" is no FP64'),
        ("FP32", [1, 1e39], "too large for FP32"),
        ("INT32", [1, 1.5], "1.5 is no INT32"),
        ("INT32", [1, False], "false is no INT32"),
        ("UINT8", [1, 256], "OverflowError|out of bounds"),
        ("UINT8", [1, -1], "OverflowError|out of bounds"),
        ("BOOL", [True, 1], "1 is no BOOL"),
        ("BYTES", ["a", 1], "1 is no BYTES"),
    ],
)
def test_an_element_is_checked_and_not_cast(kind: str, data: list[Any], words: str) -> None:
    body, _ = _body({"name": "x", "datatype": kind, "shape": [2], "data": data})
    with pytest.raises(RemoteError, match=words):
        decode_request(body, None)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_is_not_json_is_refused_and_never_sent(constant: str) -> None:
    text = f'{{"inputs": [{{"name": "x", "datatype": "FP32", "shape": [1], "data": [{constant}]}}]}}'
    with pytest.raises(RemoteError, match="no number of JSON"):
        decode_request(text.encode(), None)
    output = np.array([1.5, float(constant.replace("Infinity", "inf"))], np.float32)
    sent, _ = encode_response(("m", "1", "d"), {"y": output}, InferRequest("", {}, {}, False))

    def refuse(found: str) -> None:
        raise AssertionError(found)

    assert json.loads(sent, parse_constant=refuse)["outputs"][0]["data"] == [1.5, None]


@pytest.mark.parametrize(
    ("shape", "data"), [([], 5), ([], [5]), ([0, 3], []), ([2, 0], [[], []]), ([2, 2], [[1, 2], [3, 4]])]
)
def test_scalars_empty_tensors_and_nested_lists_are_taken(shape: list[int], data: Any) -> None:
    body, _ = _body({"name": "x", "datatype": "INT64", "shape": shape, "data": data})
    assert decode_request(body, None).inputs["x"].shape == tuple(shape)
