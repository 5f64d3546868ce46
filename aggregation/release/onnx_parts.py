"""An ONNX file as pieces, cut at its large tensors.

The concatenated pieces are the file, byte for byte. Each is stored under its digest, so a release
with an unchanged graph transfers only the tensors that changed. Nodes need no ONNX library: they
concatenate the pieces that they have and the pieces that they fetch.
"""

from __future__ import annotations

import onnx
from google.protobuf.message import DecodeError

MIN_TENSOR_BYTES = 16 * 1024
"""Smaller tensors are not cut out, since every piece costs messages."""


def cut(file: bytes) -> list[memoryview]:
    """The pieces of an ONNX file, in order; the whole file if it has no large tensor."""
    view, pieces, done = memoryview(file), [], 0
    for raw in _large_tensors(file):
        start = file.find(raw, done)
        if start < 0:
            continue  # stored out of order: it stays inside another piece
        pieces += [view[done:start], view[start : start + len(raw)]]
        done = start + len(raw)
    pieces.append(view[done:])
    return [piece for piece in pieces if len(piece)]


def _large_tensors(file: bytes) -> list[bytes]:
    try:
        graph = onnx.ModelProto.FromString(file).graph
    except DecodeError:
        return []  # loading it will report the error
    return [t.raw_data for t in graph.initializer if len(t.raw_data) >= MIN_TENSOR_BYTES]
