"""Codecs: what comes back, how far off it may be, how many bytes it took, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtide.fabric.errors import ConfigError, MalformedMessage
from fedtide.fabric.tensors.codecs import Codec, decode, encode, is_coded, spec_of
from fedtide.fabric.tensors.frame import Tensor
from fedtide.fabric.tensors.frame import decode as unframe
from fedtide.fabric.tensors.frame import encode as frame

CODECS = ["bf16", "int8", "int4", "int8+hadamard", "int4+hadamard", "topk:0.05"]


def _pair(seed: int, size: int = 5000, dtype: str = "f4") -> tuple[Tensor, dict[str, Tensor]]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(size).astype(dtype)
    update = (base + 0.01 * rng.standard_normal(size)).astype(dtype)
    return Tensor.of("w|x", update), {"w|x": Tensor.of("w|x", base)}


@pytest.mark.parametrize(
    ("codec", "bound", "saving"),
    [("bf16", 0.004, 1.99), ("int8", 0.02, 3.9), ("int4", 0.4, 7.8), ("int8+hadamard", 0.02, 3.1),
     ("int4+hadamard", 0.4, 6.2), ("topk:0.05", 1.0, 19)],
)  # fmt: skip
def test_a_difference_comes_back_within_the_codecs_loss(codec: str, bound: float, saving: float) -> None:
    tensor, base = _pair(1)
    (coded,) = unframe(b"".join(frame(encode([tensor], base, Codec.parse(codec), 7))))
    assert is_coded([coded])
    assert spec_of(coded) == tensor.spec
    found = decode(coded, base)
    difference = tensor.numpy() - base["w|x"].numpy()
    loss = np.linalg.norm(found.numpy() - tensor.numpy()) / np.linalg.norm(difference)
    assert loss < bound
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert len(tensor.data) / len(coded.data) > saving


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CODECS), st.integers(1024, 9000), st.sampled_from(["f2", "f4", "f8"]), st.integers(0, 2**63 - 1))
def test_any_size_and_precision_survives_and_equal_seeds_give_equal_bytes(
    codec: str, size: int, dtype: str, seed: int
) -> None:
    tensor, base = _pair(size, size, dtype)
    (coded,) = encode([tensor], base, Codec.parse(codec), seed)
    (again,) = encode([tensor], base, Codec.parse(codec), seed)
    assert coded == again
    assert np.isfinite(decode(coded, base).numpy()).all()


@pytest.mark.parametrize("codec", ["int8", "int4", "int4+hadamard"])
def test_rounding_is_unbiased(codec: str) -> None:
    tensor, base = _pair(3, 2048)
    decoded = [decode(encode([tensor], base, Codec.parse(codec), s)[0], base).numpy() for s in range(300)]
    difference = tensor.numpy() - base["w|x"].numpy()
    bias = np.mean(decoded, axis=0) - tensor.numpy()
    assert np.linalg.norm(bias) < 0.05 * np.linalg.norm(difference)


def test_the_rotation_spreads_an_outlier() -> None:
    tensor, base = _pair(4)
    values = np.array(tensor.numpy())
    values[7] += 3.0
    outlying = Tensor.of("w|x", values)

    def loss(codec: str) -> float:
        found = decode(encode([outlying], base, Codec.parse(codec), 1)[0], base)
        return float(np.linalg.norm(np.delete(found.numpy() - values, 7)))

    assert loss("int4+hadamard") < 0.7 * loss("int4")


def test_topk_keeps_the_largest_differences() -> None:
    base = {"w": Tensor.of("w", np.zeros(200_000, "f4"))}
    values = np.zeros(200_000, "f4")
    values[[0, 65_535, 65_536, 199_999]] = [4, -3, 2, 1]
    (coded,) = encode([Tensor.of("w", values)], base, Codec.parse("topk:0.00002"), 0)
    np.testing.assert_array_equal(decode(coded, base).numpy(), values)


def test_integers_small_tensors_and_what_is_not_finite_travel_as_they_are() -> None:
    tensors = [
        Tensor.of("n", np.arange(5000)),
        Tensor.of("b", np.ones(10, "f4")),
        Tensor.of("bad", np.full(5000, np.nan, "f4")),
        Tensor.of("new", np.ones(5000, "f4")),
    ]
    base = {t.name: Tensor.of(t.name, np.zeros_like(t.numpy())) for t in tensors[:3]}
    assert encode(tensors, base, Codec.parse("int8"), 0) == tensors


@pytest.mark.parametrize("codec", CODECS)
def test_data_that_is_not_what_its_name_says_is_refused(codec: str) -> None:
    tensor, base = _pair(5)
    (coded,) = encode([tensor], base, Codec.parse(codec), 7)
    broken = [
        replace(coded, data=bytes(coded.data)[:-8], shape=(len(coded.data) - 8,)),
        replace(coded, name=coded.name.replace("F32", "F31")),
        replace(coded, name=coded.name.replace("5000", "-5")),
        replace(coded, name=coded.name.replace("w|x", "v")),
        replace(coded, name="\x02int9|1.0|F32|5000|w|x"),
        replace(coded, name="\x02"),
    ]
    for tensor in broken:
        with pytest.raises(MalformedMessage, match="coded tensor"):
            decode(tensor, base)


@pytest.mark.parametrize(
    "text", ["int3", "bf16+hadamard", "topk", "topk:0", "topk:2", "topk:x", "int8:0.5", "int8+fft"]
)
def test_a_codec_that_does_not_exist_says_which_do(text: str) -> None:
    with pytest.raises(ConfigError, match="Known: bf16"):
        Codec.parse(text)


@pytest.mark.parametrize("text", CODECS)
def test_a_codec_reads_what_it_writes(text: str) -> None:
    assert str(Codec.parse(text)) == text
