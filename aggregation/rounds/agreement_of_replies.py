"""Which replies of a phase do not go with the others: one odd answer costs one answer, not the run.

Flower's strategies end the run (`InconsistentMessageReplies`) when replies differ in their records, names of arrays or
metrics, or lack their weight. Here those that most replies agree with stay, and the others are refused. When no reply
is right, all stay, and Flower says what is wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flowers

from fedtide.aggregation.sums.admission import Refusal
from fedtide.fabric.flower import bridge as flower

Shapes = Mapping[str, tuple[int, ...]]
Refuse = Callable[[Message, Refusal], Message]
"""Counts a reply as refused; gives the error reply that takes its place."""


def shapes_of(record: ArrayRecord) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in record.items()}


def misshapen(replies: Sequence[Message], sent: Shapes) -> dict[int, Refusal]:
    """The replies, by position, with an array whose shape is not that of most replies; in doubt the model's counts."""
    votes: dict[str, Counter[tuple[int, ...]]] = {}
    of_replies = {}
    for number, reply in enumerate(replies):
        if reply.has_content():
            shapes = [shapes_of(record) for record in reply.content.array_records.values()]
            of_replies[number] = {name: shape for each in shapes for name, shape in each.items()}
            for name, shape in of_replies[number].items():
                votes.setdefault(name, Counter())[shape] += 1
    usual = {name: _usual(counts, sent.get(name)) for name, counts in votes.items()}
    return {
        number: Refusal("wrong_shape", f"tensor {name!r} has shape {shape}, that of others is {usual[name]}")
        for number, shapes_ in of_replies.items()
        for name, shape in shapes_.items()
        if shape != usual[name]
    }


def _usual(votes: Counter[tuple[int, ...]], sent: tuple[int, ...] | None) -> tuple[int, ...]:
    return max(votes, key=lambda shape: (votes[shape], shape == sent))


def refuse_odd_replies(
    refuse: Refuse, sent: Callable[[], Shapes | None], replies_of_phase: Callable[[], Sequence[Message]]
) -> None:
    """Change Flower's check of replies, for all its strategies in this process.

    Args:
        sent: the model of the phase under way; None: no phase, Flower's own check.
        replies_of_phase: those to it, of which an app's strategy may have Flower average the contents.
    """

    def look(strategy: flowers.FedAvg, replies: list[Message], is_train: bool) -> list[Message]:
        model = sent()
        if model is None:
            return replies
        average = strategy.train_metrics_aggr_fn if is_train else strategy.evaluate_metrics_aggr_fn
        by_lengths = flower.is_flowers_average(average)
        odd = _odd(replies, strategy.weighted_by_key, model if is_train else None, by_lengths=by_lengths)
        return [refuse(r, odd[n]) if n in odd else r for n, r in enumerate(replies)]

    def look_at_shapes(replies: list[Message]) -> list[Message]:
        model = sent()
        wrong = misshapen(replies, model) if model is not None else {}
        return [refuse(r, wrong[n]) if n in wrong else r for n, r in enumerate(replies)]

    def look_at_contents(contents: list[RecordDict]) -> list[RecordDict]:
        known = {id(r.content): r for r in replies_of_phase() if r.has_content()}
        replies = [known.get(id(content)) for content in contents]
        if None in replies:  # the app's own records
            return contents
        return [r.content for r in look_at_shapes([r for r in replies if r is not None]) if r.has_content()]

    flower.look_before_check(look)
    flower.look_before_average(look_at_shapes)
    flower.look_before_sum(look_at_contents)


def _odd(replies: Sequence[Message], weight: str, model: Shapes | None, *, by_lengths: bool) -> dict[int, Refusal]:
    """The replies that do not fit, by position. `model`: of a training phase, whose replies hold arrays."""
    contents = {n: reply.content for n, reply in enumerate(replies) if reply.has_content()}
    wrong = {n: found for n, c in contents.items() if (found := _wrong(c, weight, arrays=model is not None))}
    forms = {n: _form(c, by_lengths, arrays=model is not None) for n, c in contents.items() if n not in wrong}
    if not forms:
        return {}
    counts = Counter(forms.values())
    names = frozenset(model or ())
    usual = max(counts, key=lambda form: (counts[form], form[1] == names))
    return wrong | {n: _difference(form, usual) for n, form in forms.items() if form != usual}


def has_weight(reply: Message, weight: str) -> bool:
    """Whether an answer has any weight in an average."""
    return any(bool(metrics.get(weight)) for metrics in reply.content.metric_records.values())


def _wrong(content: RecordDict, weight: str, *, arrays: bool) -> Refusal | None:
    if arrays and len(content.array_records) != 1:
        return Refusal("malformed", f"the reply holds {len(content.array_records)} array records, expected one")
    if len(content.metric_records) != 1:
        return Refusal("malformed", f"the reply holds {len(content.metric_records)} metric records, expected one")
    (metrics,) = content.metric_records.values()
    value = metrics.get(weight)
    if not isinstance(value, int | float):
        return Refusal("bad_weight", f"the metrics hold no number {weight!r}")
    if not (math.isfinite(value) and value >= 0):
        return Refusal("bad_weight", f"{weight!r} is {value}, expected a weight of at least 0")
    return None


Form = tuple[Any, ...]
"""What replies must have in common: name of the array record, of arrays, of the metric record, of metrics."""


def _form(content: RecordDict, by_lengths: bool, *, arrays: bool) -> Form:
    (name, metrics), *_ = content.metric_records.items()
    said = frozenset((key, _length(value) if by_lengths else None) for key, value in metrics.items())
    if not arrays:
        return None, None, name, said
    (record, found), *_ = content.array_records.items()
    return record, frozenset(found), name, said


def _length(value: MetricRecord | Any) -> int | None:
    return len(value) if isinstance(value, list) else None


def _difference(form: Form, usual: Form) -> Refusal:
    number = next(n for n in range(len(form)) if form[n] != usual[n])
    what = ("the name of its array record", "the names of its arrays", "the name of its metric record", "its metrics")
    told = f"{what[number]}: unlike most nodes, {_told(form[number], usual[number])}"
    return Refusal("wrong_shape" if number == 1 else "malformed", told)


def _told(mine: Any, usual: Any) -> str:
    if isinstance(mine, str):
        return f"{mine!r}, not {usual!r}"
    more, less = sorted(map(_name, mine - usual)), sorted(map(_name, usual - mine))
    return "; ".join(
        f"{word} {', '.join(names[:5])}" for word, names in (("only here:", more), ("missing:", less)) if names
    )


def _name(entry: Any) -> str:
    if not isinstance(entry, tuple):
        return repr(entry)
    key, length = entry
    return repr(key) if length is None else f"{key!r} (a list of {length})"
