"""A function of named tensors as an ONNX graph whose batch size is free."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from fedtide.aggregation.training_export.decompositions import decompositions
from fedtide.aggregation.training_export.translations import translations
from fedtide.fabric.errors import FedtideError

Arguments = dict[str, Tensor]
_OPERATOR = re.compile(r"\b(?:aten|prims|torchvision|quantized)[.:]+\w+(?:\.\w+)?")


class NotExportable(FedtideError):
    """A model that uses an operator without an ONNX translation."""


def to_onnx(function: Callable[[Arguments], Arguments], sample: Arguments, per_sample: Mapping[str, int]) -> bytes:
    """Trace `function` at `sample` and translate it.

    Args:
        per_sample: the first axis as a multiple of the batch size, for arguments that have a batch axis.

    Raises:
        NotExportable: names the operator.
    """
    names = list(sample)
    outputs: list[str] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        found = function(dict(zip(names, tensors, strict=True)))
        outputs[:] = list(found)
        return list(found.values())

    batch = Dim("batch", min=1, max=1 << 16)
    shapes = [_axes(per_sample.get(name, 0), batch) for name in names]
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            graph = make_fx(flat, tracing_mode="symbolic", decomposition_table=decompositions())(*sample.values())
            program = torch.export.export(graph, tuple(sample.values()), dynamic_shapes=tuple(shapes))
            translated = torch.onnx.export(
                program,
                dynamo=True,
                input_names=names,
                output_names=outputs,
                verbose=False,
                custom_translation_table=translations(),
            )
    except Exception as exc:  # torch's tracers raise whatever a model makes them raise
        raise NotExportable(_why(exc), "Replace it in the model, or train this app with torch on the nodes") from exc
    assert translated is not None
    proto = translated.model_proto
    for part in (
        *proto.graph.node,
        *proto.graph.input,
        *proto.graph.value_info,
        *(n for f in proto.functions for n in f.node),
    ):
        del part.metadata_props[:]  # the torch source of each operator: most of the file's size
    return bytes(proto.SerializeToString())


def _axes(times: int, batch: Any) -> dict[int, Any]:
    return {0: times * batch if times > 1 else batch} if times else {}


def _why(exc: BaseException) -> str:
    texts = []
    seen: BaseException | None = exc
    while seen is not None:
        texts.append(str(seen))
        seen = seen.__cause__ or seen.__context__
    found = [name for text in reversed(texts) for name in _OPERATOR.findall(text)]
    if found:
        return f"the operator {found[0]} has no ONNX translation"
    return f"the training step cannot be traced: {texts[0].splitlines()[0] if texts[0] else type(exc).__name__}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporters, which log to the root logger and to stdout."""
    with redirect_stdout(io.StringIO()):
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
