"""The order in which torch would draw samples, without torch: equal seeds, equal batches on every node of a round."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_LARGE = 2**32 // 20
"""Beyond this many samples torch draws 64 bits for each."""


class TorchShuffle:
    """`torch.Generator().manual_seed(seed)` as far as `torch.randperm` uses it (ATen: randperm_cpu).

    Both are a Mersenne Twister with the initialisation of Matsumoto and Nishimura 2002, and a shuffle from the front.
    """

    def __init__(self, seed: int) -> None:
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)

    def permutation(self, size: int) -> npt.NDArray[np.int64]:
        """`torch.randperm(size, generator=...)`; each call goes on where the last one ended.

        Raises:
            ValueError: more samples than torch shuffles with 32 bits for each.
        """
        if size >= _LARGE:
            raise ValueError(f"{size} samples are more than the {_LARGE} that can be shuffled")
        drawn = self._twister.randint(0, 2**32, max(0, size - 1), np.uint32)
        jumps = (drawn % np.arange(size, 1, -1, dtype=np.uint32)).tolist()
        order = list(range(size))
        for place, jump in enumerate(jumps):
            order[place], order[place + jump] = order[place + jump], order[place]
        return np.asarray(order, np.int64)
