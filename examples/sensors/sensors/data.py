"""Smartwatch recordings of ten people doing seven shoulder exercises, read from the seglearn wheel.

140 recordings, 6 axes (accelerometer in g, gyroscope in rad/s) at 50 Hz. A node holds the
recordings of one or more people, as a real fleet would; two people are held out for the test.
The file is read from the installed package's folder; seglearn itself is never imported.
Burns et al. 2018, "Shoulder physiotherapy exercise recognition" (arXiv:1802.01489).
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

WINDOW = 100
"""Samples a window: 2 s at 50 Hz."""
STEP = 50
AXES = 6
SCALE = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
"""Typical size of each axis: fixed by the sensor's range, so no node has to reveal statistics."""
TEST_SUBJECTS = (9, 10)
TRAIN_SUBJECTS = (1, 2, 3, 4, 5, 6, 7, 8)
LABELS = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")

Windows = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def of_node(index: int, count: int) -> tuple[Windows, Labels]:
    """The windows of node `index` of `count`: every count-th person, from person `index` on.

    Raises:
        ValueError: more nodes than people.
    """
    people = TRAIN_SUBJECTS[index::count]
    if not people:
        raise ValueError(f"there are {len(TRAIN_SUBJECTS)} people to train on, but {count} nodes")
    return of_people(people)


@lru_cache(maxsize=4)
def of_people(people: tuple[int, ...]) -> tuple[Windows, Labels]:
    """(windows (N, WINDOW, AXES) in sensor units, labels (N,))."""
    recordings = _recordings()
    windows: list[Windows] = []
    labels: list[int] = []
    for signal, label, subject in zip(recordings["X"], recordings["y"], recordings["subject"], strict=True):
        if int(subject) in people:
            cut = [signal[s : s + WINDOW] for s in range(0, len(signal) - WINDOW + 1, STEP)]
            windows.append(np.asarray(cut, dtype=np.float32))
            labels += [int(label)] * len(cut)
    return np.concatenate(windows), np.asarray(labels, dtype=np.int64)


def normalise(windows: Windows) -> Windows:
    return windows / np.asarray(SCALE, dtype=np.float32)


@lru_cache(maxsize=1)
def _recordings() -> dict:
    spec = find_spec("seglearn")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the recordings come with the seglearn wheel: pip install --no-deps seglearn==1.2.5")
    path = Path(next(iter(spec.submodule_search_locations)), "data", "watch_dataset.npy")
    # The wheel's own file, installed by pip from a pinned version: the one place where a pickle is read.
    return np.load(path, allow_pickle=True).item()
