"""byzfl's rules, in byzfl's own environment: a script that knows nothing of this project.

`cases COUNT OUT.npz`: results on seeded random cases. `time N E`: seconds of each rule on N x E float32, as JSON.

byzfl imports torchvision at the top, for its data sets only: its aggregators are imported past that.
"""

import importlib.util
import json
import statistics
import sys
import time
import types

import numpy as np


def _aggregators():
    spec = importlib.util.find_spec("byzfl")
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators.aggregators")


def case(seed):
    """(updates of shape (n, d), f, radius); every third case holds ties."""
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(3, 14)), int(rng.integers(1, 60))
    updates = rng.integers(-3, 4, (n, d)).astype("f8") if seed % 3 == 0 else rng.standard_normal((n, d))
    return updates, int(rng.integers(0, (n - 1) // 2 + 1)), float(rng.uniform(0.5, 8.0))


def _rules(aggregators, f, radius):
    return {
        "median": aggregators.Median(),
        "trimmed": aggregators.TrMean(f=f),
        "multikrum": aggregators.MultiKrum(f=f),
        "clipping": aggregators.CenteredClipping(tau=radius),
    }


def main():
    aggregators = _aggregators()
    if sys.argv[1] == "cases":
        found = {}
        for seed in range(int(sys.argv[2])):
            updates, f, radius = case(seed)
            for name, rule in _rules(aggregators, f, radius).items():
                found[f"{name}-{seed}"] = rule(updates)
        np.savez(sys.argv[3], **found)
        return
    count, elements = int(sys.argv[2]), int(sys.argv[3])
    updates = np.random.default_rng(0).standard_normal((count, elements), dtype=np.float32)
    seconds = {}
    for name, rule in _rules(aggregators, count // 5, 100.0).items():
        times = []
        for _ in range(3):
            began = time.perf_counter()
            rule(updates)
            times.append(time.perf_counter() - began)
        seconds[name] = statistics.median(times)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
