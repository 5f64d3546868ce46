"""Large metrics are in a file; the history is still the dict that Flower's Result has."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

from flwr.app import MetricRecord

from fedtide.aggregation.rounds.spilled_history import SpilledHistory


def test_it_is_the_dict_that_it_stands_for(tmp_path: Path) -> None:
    plain = {n: MetricRecord({"x": 0.1 * n, "list": [float(n), float("inf")] * (2000 * (n % 2))}) for n in range(6)}
    history = SpilledHistory(tmp_path / "a" / "history")
    for number, record in plain.items():
        history[number] = record
    history[3] = plain[3]  # once more, as a round that is tried again
    assert history == plain and plain == history and history != {}
    assert (len(history), list(history), 3 in history, 9 in history) == (6, list(range(6)), True, False)
    assert history[3] == plain[3] and history.get(9) is None and history.get(5) == plain[5]
    assert dict(history) == {**history} == history.copy() == copy.deepcopy(history) == plain
    assert list(history.items()) == list(plain.items()) and list(history.values()) == list(plain.values())
    assert pickle.loads(pickle.dumps(history)) == plain and repr(history) == repr(plain)
    assert history.pop(3) == plain[3] and history.pop(3, None) is None and len(history) == 5
