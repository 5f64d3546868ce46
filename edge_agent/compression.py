"""Compression of updates as a Flower mod: what a ClientApp answers leaves the node coded.

The trainer puts it around every app whose task asks for a codec. With Flower's own engine an app takes it
itself, `ClientApp(mods=[CompressionMod("int8")])`, and a strategy of ours on the server reads it.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ArrayRecord, Context, Message

from fabric import flower
from fabric.codecs import Codec, decode, encode
from fabric.ids import flower_int
from fabric.tensors import Tensor

_RESIDUAL = "fedtide.residual"


class CompressionMod:
    """Codes the difference between the only array record that came and the only one that goes.

    With topk, what was left out is kept in the context's state and added to the next update.
    """

    def __init__(self, codec: str) -> None:
        self._codec = Codec.parse(codec)

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        came = list(message.content.array_records.values())
        base = {t.name: t for t in flower.tensors_of(came[0])} if len(came) == 1 else {}
        reply = call_next(message, context)
        if not base or not reply.has_content() or len(reply.content.array_records) != 1:
            return reply
        ((name, record),) = reply.content.array_records.items()
        update = flower.tensors_of(record)
        feeds_back = self._codec.kind == "topk"
        wanted = _with_residual(update, context) if feeds_back else update
        seed = flower_int(f"{context.node_id}.{message.metadata.message_id}")
        coded = encode(wanted, base, self._codec, seed)
        if feeds_back:
            context.state[_RESIDUAL] = _left_out(wanted, coded, base)
        reply.content[name] = ArrayRecord({t.name: flower.array_of(t) for t in coded})
        return reply


def _with_residual(update: list[Tensor], context: Context) -> list[Tensor]:
    kept = context.state.array_records.get(_RESIDUAL, ArrayRecord())
    return [
        Tensor.of(t.name, (t.numpy() + kept[t.name].numpy()).astype(t.numpy().dtype)) if t.name in kept else t
        for t in update
    ]


def _left_out(wanted: list[Tensor], coded: list[Tensor], base: dict[str, Tensor]) -> ArrayRecord:
    return ArrayRecord(
        {
            was.name: flower.array_of(Tensor.of(was.name, was.numpy() - decode(is_, base).numpy()))
            for was, is_ in zip(wanted, coded, strict=True)
            if is_.name != was.name
        }
    )
