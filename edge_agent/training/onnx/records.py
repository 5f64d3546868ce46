"""A message's records as tensors and values, without flwr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedtide.edge_agent.training.onnx.errors import WrongTask
from fedtide.fabric.messages.scaffold import CONTROL
from fedtide.fabric.messages.tasks import Arrays, Values, WireMessage
from fedtide.fabric.process.files import map_file
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors import codecs
from fedtide.fabric.tensors.frame import Tensor, decode


def model_record(message: WireMessage) -> str:
    """The name of the record that holds the model.

    Raises:
        WrongTask: there is none, or several.
    """
    names = [name for name, part in (message.content or {}).items() if isinstance(part, Arrays) and name != CONTROL]
    if len(names) != 1:
        raise WrongTask(f"the message carries {len(names)} array records, a training bundle answers those with one")
    return names[0]


def tensors_of(part: Arrays, blobs: Mapping[str, Path]) -> dict[str, Tensor]:
    """An array record by name, decoded if it came coded.

    Raises:
        MalformedMessage: a frame that does not decode.
    """
    found = decode(map_file(blobs[part.blob.digest]) if part.blob is not None else part.inline or b"")
    if not part.coded:
        return {t.name: t for t in found}
    base = {t.name: t for t in decode(map_file(blobs[part.base.digest]))} if part.base is not None else {}
    return {codecs.spec_of(t).name: codecs.decode(t, base) for t in found}


def config_of(message: WireMessage) -> ConfigValues:
    """The scalars of all config records."""
    parts = [p for p in (message.content or {}).values() if isinstance(p, Values) and p.kind == "config"]
    return {k: v for p in parts for k, v in p.values.items() if isinstance(v, bool | int | float | str)}
