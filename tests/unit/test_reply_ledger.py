"""Replies: transcripts of what happens to one task, and invariants of any history."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from fedtide.aggregation.link.reply_ledger import (
    CLOSED_KEPT,
    TABLE,
    Acknowledge,
    Actions,
    CancelOrder,
    Delivered,
    Event,
    Forget,
    GivenUp,
    HandOn,
    Late,
    NodeLeft,
    NodeReturned,
    NoReply,
    Publish,
    Read,
    ReadBrokenOff,
    ReadDone,
    ReadFailed,
    ReplyLedger,
    ResumeDisabled,
    RoundClosed,
    Sent,
    StartGrace,
    StopGrace,
    TellLost,
)

ASKED, REPLY, COPY = Sent("t", "n"), Delivered("t", "n", 7), Delivered("t", "n", 8)
LOST = NoReply("t", "no answer before the task expired", "timeout")
TOLD = TellLost("t", LOST.reason, LOST.category)
CANCEL = CancelOrder("t", "n")


def closed(*, counted: bool, carries: bool = False) -> RoundClosed:
    return RoundClosed("t", counted, carries)


@pytest.mark.parametrize(
    ("name", "transcript"),
    [
        (
            "a reply is read, handed on, and acknowledged with its round",
            [
                (ASKED, [Publish("t")]),
                (REPLY, [Read("t", 7)]),
                (ReadDone("t"), [HandOn("t")]),
                (closed(counted=True), [Acknowledge(7), Forget("t")]),
            ],
        ),
        (
            "the next attempt finds a reply that was not acknowledged, and does not ask again",
            [(REPLY, []), (ASKED, [Read("t", 7)]), (ReadDone("t"), [HandOn("t")])],
        ),
        (
            "a task that a predecessor sent is not sent again",
            [(Sent("t", "n", adopted=True), []), (REPLY, [Read("t", 7)]), (ReadDone("t"), [HandOn("t")])],
        ),
        (
            "a reply that is delivered again while its round lasts is kept; a copy of it is not",
            [
                (ASKED, [Publish("t")]),
                (REPLY, [Read("t", 7)]),
                (REPLY, []),
                (COPY, [Acknowledge(8)]),
                (ReadDone("t"), [HandOn("t")]),
                (REPLY, []),
                (COPY, [Acknowledge(8)]),
                (closed(counted=True), [Acknowledge(7), Forget("t")]),
                (COPY, [Acknowledge(8)]),
            ],
        ),
        (
            "a reply after its time is up is late, and not handed on",
            [
                (ASKED, [Publish("t")]),
                (LOST, [TOLD, CANCEL]),
                (REPLY, []),
                (closed(counted=True), [Acknowledge(7), Forget("t")]),
            ],
        ),
        (
            "a reply to a task that was given up is late",
            [
                (ASKED, [Publish("t")]),
                (GivenUp("t"), [CANCEL]),
                (REPLY, []),
                (closed(counted=False), [Late("t", 7), Acknowledge(7), Forget("t")]),
            ],
        ),
        (
            "time that is up while a reply is being read is told once, and what was read is not handed on",
            [
                (ASKED, [Publish("t")]),
                (REPLY, [Read("t", 7)]),
                (LOST, [TOLD, CANCEL]),
                (LOST, []),
                (GivenUp("t"), []),
                (ReadFailed("t", "too late", "timeout"), []),
                (closed(counted=True), [Acknowledge(7), Forget("t")]),
            ],
        ),
        (
            "a refused reply is told, cancelled, and acknowledged with its round: the next attempt must not ask again",
            [
                (ASKED, [Publish("t")]),
                (REPLY, [Read("t", 7)]),
                (ReadFailed("t", "NaN", "not_finite"), [TellLost("t", "NaN", "not_finite"), CANCEL]),
                (closed(counted=True), [Acknowledge(7), Forget("t")]),
            ],
        ),
        (
            "a reply whose reading was broken off is read again when it comes again",
            [
                (ASKED, [Publish("t")]),
                (REPLY, [Read("t", 7)]),
                (ReadBrokenOff("t"), []),
                (REPLY, [Read("t", 7)]),
                (ReadDone("t"), [HandOn("t")]),
            ],
        ),
        (
            "a reply that does not count yet is carried into a later round",
            [
                (ASKED, [Publish("t")]),
                (REPLY, [Read("t", 7)]),
                (ReadDone("t"), [HandOn("t")]),
                (closed(counted=False, carries=True), []),
                (closed(counted=True, carries=True), [Acknowledge(7), Forget("t")]),
            ],
        ),
        (
            "an absent node has a grace time, and its answer ends it",
            [
                (ASKED, [Publish("t")]),
                (NodeLeft("t", "gone"), [StartGrace("t", "gone")]),
                (NodeLeft("t", "gone"), []),
                (NodeReturned("t"), [StopGrace("t")]),
                (NodeReturned("t"), []),
                (NodeLeft("t", "gone"), [StartGrace("t", "gone")]),
                (REPLY, [StopGrace("t"), Read("t", 7)]),
                (NodeLeft("t", "gone"), []),
            ],
        ),
        (
            "an absent node that stays away is given up",
            [
                (ASKED, [Publish("t")]),
                (NodeLeft("t", "gone"), [StartGrace("t", "gone")]),
                (LOST, [StopGrace("t"), TOLD, CANCEL]),
            ],
        ),
    ],
)
def test_transcript(name: str, transcript: list[tuple[Event, list[object]]]) -> None:
    ledger = ReplyLedger()
    for number, (event, expected) in enumerate(transcript):
        assert list(ledger.step(event)) == expected, f"{name}: {number}"


def test_without_resume_a_reply_is_acknowledged_when_it_was_taken() -> None:
    ledger = ReplyLedger()
    ledger.step(Delivered("unasked", "n", 1))
    assert ledger.disable_resume() == (Acknowledge(1),)
    assert ledger.step(Delivered("unasked", "n", 2)) == (Acknowledge(2),)
    ledger.step(ASKED)
    ledger.step(REPLY)
    assert ledger.step(ReadDone("t")) == (HandOn("t"), Acknowledge(7))
    assert ledger.close_round({"t"}, carries=False) == (Forget("t"),)


def test_who_waits_for_what() -> None:
    ledger = ReplyLedger()
    for task, node in (("a", "n1"), ("b", "n1"), ("c", "n2")):
        ledger.step(Sent(task, node))
    ledger.step(GivenUp("b"))
    assert ledger.wanted("n1") == ["a"] and ledger.wanted() == ["a", "c"]
    assert ledger.is_wanted("a") and not ledger.is_wanted("b") and not ledger.is_wanted("never")
    ledger.step(Delivered("a", "n1", 1))
    ledger.step(Delivered("b", "n1", 2))
    assert ledger.unacknowledged == 1
    ledger.step(ReadDone("a"))
    assert ledger.unacknowledged == 2


def test_closed_tasks_are_known_for_a_while_and_do_not_add_up() -> None:
    ledger = ReplyLedger()
    for number in range(3 * CLOSED_KEPT):
        task = f"t{number}"
        ledger.step(Sent(task, "n"))
        ledger.step(Delivered(task, "n", number))
        ledger.step(ReadDone(task))
        ledger.close_round({task}, carries=False)
        assert ledger.step(Delivered(task, "n", 10_000 + number)) == (Acknowledge(10_000 + number),), "a duplicate"
        assert len(ledger._closed) <= CLOSED_KEPT and not ledger._states
    assert ledger.step(Delivered("t0", "n", 1)) == (), "held like one of an unknown task"
    assert ledger.close_round((), carries=False) == (Late("t0", 1), Acknowledge(1), Forget("t0"))


TASKS = st.sampled_from("ab")


class AnyHistory(RuleBasedStateMachine):
    """Two tasks, each named once; replies come, come again, come twice, and break off."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = ReplyLedger()
        self.sequence = 0
        self.sent: set[str] = set()
        self.answered: set[str] = set()
        self.reading: dict[str, int] = {}
        self.stored: dict[int, str] = {}
        """What the broker delivers again, by sequence."""

    def _take(self, actions: Actions) -> None:
        for action in actions:
            match action:
                case Read(task=task, sequence=sequence):
                    assert task not in self.reading
                    self.reading[task] = sequence
                case HandOn(task=task) | TellLost(task=task):
                    assert task in self.sent and task not in self.answered
                    self.answered.add(task)
                case Acknowledge(sequence=sequence):
                    del self.stored[sequence]  # fails at the second time
                case _:
                    pass

    @rule(task=TASKS, adopted=st.booleans())
    def send(self, task: str, adopted: bool) -> None:
        if task not in self.sent:
            self.sent.add(task)
            self._take(self.ledger.step(Sent(task, "n", adopted)))

    @rule(task=TASKS)
    def reply(self, task: str) -> None:
        self.sequence += 1
        self.stored[self.sequence] = task
        self._take(self.ledger.step(Delivered(task, "n", self.sequence)))

    @rule()
    def redeliver(self) -> None:
        for sequence, task in list(self.stored.items()):
            if sequence in self.stored:
                self._take(self.ledger.step(Delivered(task, "n", sequence)))

    @rule(task=TASKS, how=st.sampled_from(["done", "failed", "broken off"]))
    def read(self, task: str, how: str) -> None:
        if self.reading.pop(task, None) is not None:
            ends = {"done": ReadDone(task), "failed": ReadFailed(task, "bad", "malformed")}
            self._take(self.ledger.step(ends.get(how, ReadBrokenOff(task))))

    @rule(task=TASKS, what=st.sampled_from([NoReply("", "lost"), NodeLeft("", "gone"), NodeReturned("")]))
    def happen(self, task: str, what: NoReply | NodeLeft | NodeReturned) -> None:
        self._take(self.ledger.step(dataclasses.replace(what, task=task)))

    @rule(task=TASKS)
    def give_up(self, task: str) -> None:
        if self.ledger.is_wanted(task):
            self.answered.add(task)  # whoever gave it up knows
        self._take(self.ledger.step(GivenUp(task)))

    @rule(counted=st.sets(TASKS), carries=st.booleans())
    def close(self, counted: set[str], carries: bool) -> None:
        self._take(self.ledger.close_round(counted, carries=carries))

    @rule()
    def disable_resume(self) -> None:
        self._take(self.ledger.disable_resume())

    def teardown(self) -> None:
        """In the end every reply is acknowledged, once, and whoever waits still does."""
        for _ in range(3):
            self.redeliver()
            for task in list(self.reading):
                self.read(task, "done")
            self.close({"a", "b"}, carries=False)
        assert not self.stored
        assert self.sent == self.answered | set(self.ledger.wanted())


test_any_history = AnyHistory.TestCase


def test_every_event_is_in_the_table() -> None:
    events = {event for _, event in TABLE}
    assert {Sent, Delivered, ReadDone, ReadFailed, ReadBrokenOff, NoReply, GivenUp} <= events
    assert {NodeLeft, NodeReturned, RoundClosed, ResumeDisabled} <= events
