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
