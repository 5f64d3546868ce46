"""Codecs for updates and models: fewer bytes for a stated loss. Pure; numpy only.

A coded tensor travels as one U8 tensor whose name says how it was coded, so a frame describes itself:
nothing but the frame and the base is needed to decode it. What is coded is the difference to a
base that both sides have. Tensors of integers, and small ones, travel as they are.

bf16      two bytes an element, rounded to nearest
int8      one byte: stochastic rounding on a scale per block of 1,024 (QSGD, Alistarh et al. 2017,
          https://arxiv.org/abs/1610.02132)
int4      half a byte, likewise
+hadamard  before int8 or int4: blocks are rotated by a randomised Hadamard transform, which spreads outliers
          (Suresh et al. 2017, https://arxiv.org/abs/1611.00429)
topk:F    the share F of elements with the largest magnitude, as bf16; the sender keeps what is left out
          and adds it to its next update (error feedback: Stich et al. 2018, https://arxiv.org/abs/1809.07599)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedtide.fabric.errors import ConfigError, MalformedMessage
from fedtide.fabric.tensors.frame import Tensor, TensorSpec

BLOCK = 1024
"""Elements that share a scale, and are rotated together."""
_SMALLEST = 1024
"""Tensors with fewer elements are not worth coding."""
_MARK = "\x02"
_TOP_BLOCK = 1 << 16
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
KINDS = ("bf16", "int8", "int4", "topk")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Codec:
    """How tensors are coded; see this module's text."""

    kind: Literal["bf16", "int8", "int4", "topk"]
    rotate: bool = False
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Codec:
        """Read "int4+hadamard", "topk:0.01", ...

        Raises:
            ConfigError: there is no such codec.
        """
        name, _, share = text.partition(":")
        kind, plus, rotation = name.partition("+")
        how = "Known: bf16, int8, int4, int8+hadamard, int4+hadamard, topk:0.01 (a share above 0, at most 1)"
        if kind not in KINDS or (plus and (rotation != "hadamard" or kind not in ("int8", "int4"))):
            raise ConfigError(f"codec {text!r}", "there is no such codec", how)
        try:
            fraction = float(share) if share else 0.0
        except ValueError:
            fraction = -1.0
        if (kind == "topk") != (0 < fraction <= 1) or (share and kind != "topk"):
            raise ConfigError(f"codec {text!r}", "only topk takes a share, and it needs one", how)
        return cls(kind, bool(plus), fraction)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.kind + ("+hadamard" if self.rotate else "") + (f":{self.share:g}" if self.kind == "topk" else "")


def encode(tensors: Iterable[Tensor], base: Mapping[str, Tensor], codec: Codec, seed: int) -> list[Tensor]:
    """Tensors as differences to `base`, coded where that saves bytes.

    Args:
        seed: of the rounding and the rotation, below 2**63; another one for each sender and round.
    """
    return [_encode(t, base[t.name], codec, (seed, k)) if _worth_it(t, base) else t for k, t in enumerate(tensors)]


def is_coded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of these needs `decode`."""
    return any(t.name.startswith(_MARK) for t in tensors)


def spec_of(tensor: Tensor) -> TensorSpec:
    """A tensor as it will be when it is decoded.

    Raises:
        MalformedMessage: its name says that it is coded, but not how.
    """
    if not tensor.name.startswith(_MARK):
        return tensor.spec
    try:
        _, _, dtype, dims, name = tensor.name[1:].split("|", 4)
        spec = TensorSpec(name, dtype, tuple(int(n) for n in dims.split("x") if n))
        if dtype not in _FLOATS or min(spec.shape, default=0) < 0:
            raise ValueError(f"no tensor has the form {dtype} {dims}")
    except ValueError as exc:
        raise MalformedMessage(f"coded tensor {tensor.name[1:60]!r}: {exc}") from exc
    return spec


def decode(tensor: Tensor, base: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `encode` for one tensor, apart from the loss; in its original dtype.

    Raises:
        MalformedMessage: the data is not what its name says, or there is no such base.
    """
    if not tensor.name.startswith(_MARK):
        return tensor
    spec = spec_of(tensor)
    try:
        # Checked before memory of that size is allocated: the name is only a claim.
        if base[spec.name].shape != spec.shape:
            raise ValueError("its base has another shape")
        text, seed = tensor.name[1:].split("|", 2)[:2]
        words = tuple(int(s) for s in seed.split("."))
        difference = _read(Codec.parse(text), spec.elements, bytes(tensor.data), words)
        before = base[spec.name].numpy().reshape(-1)
    except (ValueError, KeyError, IndexError, ConfigError) as exc:
        raise MalformedMessage(f"coded tensor {tensor.name[1:60]!r}: {exc}") from exc
    return Tensor.of(spec.name, (before + difference).astype(_FLOATS[spec.dtype]).reshape(spec.shape))


def _worth_it(tensor: Tensor, base: Mapping[str, Tensor]) -> bool:
    known = base.get(tensor.name)
    floats = tensor.dtype in _FLOATS
    return floats and tensor.spec.elements >= _SMALLEST and known is not None and known.shape == tensor.shape


def _encode(tensor: Tensor, base: Tensor, codec: Codec, seed: tuple[int, int]) -> Tensor:
    difference = np.asarray(tensor.numpy() - base.numpy(), np.float32).reshape(-1)
    if not np.isfinite(difference).all():
        return tensor  # sent uncoded: the receiver refuses it with a reason
    writers: dict[str, Callable[[Floats, Codec, tuple[int, int]], bytes]] = {"bf16": _bf16, "topk": _topk}
    data = writers.get(codec.kind, _quantise)(difference, codec, seed)
    shape = "x".join(map(str, tensor.shape))
    name = f"{_MARK}{codec}|{seed[0]}.{seed[1]}|{tensor.dtype}|{shape}|{tensor.name}"
    return Tensor(name, "U8", (len(data),), data)


def _read(codec: Codec, count: int, data: bytes, seed: tuple[int, ...]) -> Floats:
    if codec.kind == "bf16":
        if len(data) != 2 * count:
            raise ValueError("has another number of elements")
        return _from_bf16(np.frombuffer(data, "<u2"))
    if codec.kind == "topk":
        return _from_topk(count, data)
    return _dequantise(codec, count, data, seed)


def _bf16(values: Floats, codec: Codec, seed: tuple[int, int]) -> bytes:
    bits = values.view("<u4")
    # To nearest, ties to even: half a unit minus one, and the lowest bit that is kept.
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return bytes((rounded >> np.uint32(16)).astype("<u2"))


def _from_bf16(bits: npt.NDArray[np.uint16]) -> Floats:
    return (bits.astype("<u4") << np.uint32(16)).view("<f4")


def _levels(codec: Codec) -> int:
    return 127 if codec.kind == "int8" else 7


def _quantise(values: Floats, codec: Codec, seed: tuple[int, int]) -> bytes:
    blocks = np.zeros((-(-values.size // BLOCK), BLOCK), np.float32)
    blocks.reshape(-1)[: values.size] = values
    if codec.rotate:
        blocks = _rotated(blocks * _signs(seed))
    levels = _levels(codec)
    scales = np.abs(blocks).max(axis=1) / np.float32(levels)
    scaled = blocks / np.where(scales > 0, scales, 1)[:, None]
    chance = np.random.Generator(np.random.SFC64([*seed, 1])).random(scaled.shape, np.float32)
    codes = np.clip(np.floor(scaled + chance), -levels, levels).astype(np.int8).reshape(-1)
    if codec.kind == "int4":
        nibbles = (codes + 8).astype(np.uint8)
        packed = (nibbles[0::2] | (nibbles[1::2] << 4))[: -(-values.size // 2) if not codec.rotate else None]
        return bytes(scales.astype("<f4")) + bytes(packed)
    return bytes(scales.astype("<f4")) + bytes(codes[: values.size if not codec.rotate else None])


def _dequantise(codec: Codec, count: int, data: bytes, seed: tuple[int, ...]) -> Floats:
    rows = -(-count // BLOCK)
    scales = np.frombuffer(data, "<f4", rows)
    codes = np.frombuffer(data, np.uint8, offset=4 * rows)
    wanted = rows * BLOCK if codec.rotate else count
    if codec.kind == "int4":
        both = np.empty(2 * codes.size, np.int8)
        both[0::2], both[1::2] = (codes & 15).astype(np.int8) - 8, (codes >> 4).astype(np.int8) - 8
        numbers = both
        if not 0 <= numbers.size - wanted <= 1:
            raise ValueError("has another number of elements")
    else:
        numbers = codes.view(np.int8)
        if numbers.size != wanted:
            raise ValueError("has another number of elements")
    blocks = np.zeros((rows, BLOCK), np.float32)
    blocks.reshape(-1)[:wanted] = numbers[:wanted]
    blocks *= scales[:, None]
    if codec.rotate:
        blocks = _rotated(blocks) * _signs(seed)
    return blocks.reshape(-1)[:count]


def _signs(seed: tuple[int, ...]) -> Floats:
    """+1 or -1 for each place of a block."""
    words = np.random.SFC64([*seed, 0]).random_raw(BLOCK // 64)
    bits = np.unpackbits(np.asarray(words, "<u8").view(np.uint8))
    return bits.astype(np.float32) * 2 - 1


def _rotated(blocks: Floats) -> Floats:
    """The Walsh-Hadamard transform of each row, normalised: its own inverse."""
    rows = blocks.shape[0]
    half = 1
    while half < BLOCK:
        pairs = blocks.reshape(rows, -1, 2, half)
        blocks = np.concatenate((pairs[:, :, :1] + pairs[:, :, 1:], pairs[:, :, :1] - pairs[:, :, 1:]), axis=2)
        half *= 2
    return blocks.reshape(rows, BLOCK) * np.float32(BLOCK**-0.5)


def _topk(values: Floats, codec: Codec, seed: tuple[int, int]) -> bytes:
    count = max(1, math.ceil(codec.share * values.size))
    chosen = np.sort(np.argpartition(np.abs(values), values.size - count)[values.size - count :])
    per_block = np.bincount(chosen // _TOP_BLOCK, minlength=-(-values.size // _TOP_BLOCK)).astype("<u4")
    low = (chosen % _TOP_BLOCK).astype("<u2")
    return per_block.tobytes() + low.tobytes() + _bf16(values[chosen], codec, seed)


def _from_topk(count: int, data: bytes) -> Floats:
    blocks = -(-count // _TOP_BLOCK)
    per_block = np.frombuffer(data, "<u4", blocks)
    chosen = int(per_block.sum(dtype=np.uint64))
    if len(data) != 4 * blocks + 4 * chosen:
        raise ValueError("has another number of elements")
    low = np.frombuffer(data, "<u2", chosen, offset=4 * blocks)
    places = np.repeat(np.arange(blocks) * _TOP_BLOCK, per_block) + low
    values: Any = np.zeros(count, np.float32)
    values[places] = _from_bf16(np.frombuffer(data, "<u2", chosen, offset=4 * blocks + 2 * chosen))
    return values  # type: ignore[no-any-return]
