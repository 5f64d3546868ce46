"""Sums: transcripts of what happens to an update that is summed here, in a region or in shards; and any history."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from fedtide.aggregation.folding.sum_ledger import (
    SHARDS,
    TABLE,
    Actions,
    Arrived,
    ArrivedFor,
    Ask,
    BrokenOff,
    Drop,
    Event,
    Fold,
    Folded,
    FoldInstead,
    Lost,
    Merged,
    NoAnswer,
    PhaseOver,
    Promised,
    Refused,
    SumLedger,
    Withdraw,
    Withdrawn,
)

HERE, REGION, SHARDED = Arrived("t"), ArrivedFor("t", "eu"), ArrivedFor("t", SHARDS)
OVER = PhaseOver("t")


@pytest.mark.parametrize(
    ("name", "transcript", "counts"),
    [
        ("an update is folded while it arrives", [(HERE, [Fold("t")]), (Folded("t"), []), (OVER, [])], True),
        (
            "a reading that breaks off goes on, and counts once it is whole",
            [(HERE, [Fold("t")]), (BrokenOff("t"), []), (HERE, [Fold("t")]), (Folded("t"), [])],
            True,
        ),
        (
            "what is half there when its phase ends is withdrawn",
            [(HERE, [Fold("t")]), (BrokenOff("t"), []), (OVER, [Withdraw("t")]), (Withdrawn("t"), [])],
            False,
        ),
        (
            "what is refused half-way is withdrawn",
            [(HERE, [Fold("t")]), (Refused("t"), [Withdraw("t")]), (Withdrawn("t"), []), (OVER, [])],
            False,
        ),
        (
            "what could not be withdrawn is tried again before the sum is used",
            [(HERE, [Fold("t")]), (Refused("t"), [Withdraw("t")]), (OVER, [Withdraw("t")]), (Withdrawn("t"), [])],
            False,
        ),
        (
            "a region sums it, and its sum is merged",
            [(REGION, [Ask("t", "eu")]), (Promised("t"), []), (OVER, []), (Merged("t"), [])],
            True,
        ),
        (
            "what a region promised and does not deliver is folded here",
            [(REGION, [Ask("t", "eu")]), (Promised("t"), []), (OVER, []), (Lost("t"), [FoldInstead("t")])],
            True,
        ),
        (
            "a region that does not answer leaves it to be folded here",
            [(REGION, [Ask("t", "eu")]), (NoAnswer("t"), [Fold("t")]), (Folded("t"), [])],
            True,
        ),
        (
            "of that, too, a half is taken up again, wherever the region is by then",
            [(REGION, [Ask("t", "eu")]), (NoAnswer("t"), [Fold("t")]), (BrokenOff("t"), []), (REGION, [Fold("t")])],
            False,
        ),
        (
            "what a region refuses, or delivers too late, does not count",
            [(REGION, [Ask("t", "eu")]), (Refused("t"), [Drop("t")]), (OVER, [])],
            False,
        ),
        (
            "shards sum it, and their mean is taken",
            [(SHARDED, [Ask("t", SHARDS)]), (Promised("t"), []), (OVER, []), (Merged("t"), [])],
            True,
        ),
        (
            "without an answer of the shards it comes again",
            [
                (SHARDED, [Ask("t", SHARDS)]),
                (NoAnswer("t"), [Drop("t")]),
                (SHARDED, [Ask("t", SHARDS)]),
                (Promised("t"), []),
            ],
            True,
        ),
    ],
)
def test_transcript(name: str, transcript: list[tuple[Event, list[object]]], counts: bool) -> None:
    ledger = SumLedger()
    for number, (event, expected) in enumerate(transcript):
        assert list(ledger.step(event)) == expected, f"{name}: {number}"
    assert ledger.counts("t") == counts, name


def test_what_each_place_has_promised() -> None:
    ledger = SumLedger()
    for task, place in (("a", "eu"), ("b", "us"), ("c", "eu"), ("d", "eu")):
        ledger.step(ArrivedFor(task, place))
        ledger.step(Refused(task) if task == "d" else Promised(task))
    assert ledger.elsewhere() == {"eu": ["a", "c"], "us": ["b"]}
    ledger.step(Merged("b"))
    assert ledger.elsewhere() == {"eu": ["a", "c"]}


TASKS = st.sampled_from("abc")


class AnyHistory(RuleBasedStateMachine):
    """Three updates, one read at a time: bytes here and promises elsewhere are what the ledger says, at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = SumLedger()
        self.bytes: dict[str, str] = {}
        """Of each update the bytes that are in the sum here: half, or whole."""
        self.promised: set[str] = set()
        self.told: set[str] = set()
        self.over = False

    def _take(self, actions: Actions) -> None:
        for action in actions:
            if isinstance(action, Withdraw):
                assert self.bytes.pop(action.task) == "half"
                self._take(self.ledger.step(Withdrawn(action.task)))
            elif isinstance(action, FoldInstead):
                self.bytes[action.task] = "whole"
            elif isinstance(action, Drop):
                assert action.task not in self.bytes

    @precondition(lambda self: not self.over)
    @rule(
        task=TASKS,
        place=st.sampled_from([None, "eu", SHARDS]),
        answer=st.sampled_from([Promised, Refused, NoAnswer]),
        read=st.sampled_from([Folded, Refused, BrokenOff]),
    )
    def arrive(
        self,
        task: str,
        place: str | None,
        answer: type[Promised | Refused | NoAnswer],
        read: type[Folded | Refused | BrokenOff],
    ) -> None:
        if task in self.told:
            return  # it is read only once
        (action,) = self.ledger.step(Arrived(task) if place is None else ArrivedFor(task, place))
        if isinstance(action, Ask):
            actions = self.ledger.step(answer(task))
            self._take(actions)
            if answer is Promised:
                self.promised.add(task)
            if answer is not NoAnswer:
                self.told.add(task)
            if not any(isinstance(a, Fold) for a in actions):
                return
        self.bytes[task] = "whole" if read is Folded else "half"
        self._take(self.ledger.step(read(task)))
        if read is not BrokenOff:
            self.told.add(task)

    @rule(delivers=st.booleans())
    def end(self, delivers: bool) -> None:
        if self.over:
            return
        self.over = True
        self._take(self.ledger.close())
        for tasks in self.ledger.elsewhere().values():
            for task in tasks:
                self.promised.discard(task)
                if delivers:
                    self.bytes[task] = "whole"  # with the sum of its place
                self._take(self.ledger.step(Merged(task) if delivers else Lost(task)))
        assert set(self.bytes.values()) <= {"whole"} and not self.promised

    def teardown(self) -> None:
        self.end(True)
        for task in "abc":
            assert self.ledger.counts(task) == (task in self.bytes), "what counts is in the sum, once and whole"


test_any_history = AnyHistory.TestCase


def test_every_event_is_in_the_table() -> None:
    assert {event for _, event in TABLE} == set(Event.__args__)
