"""Accuracy after R rounds on four splits of the digits, for every strategy at its defaults and Flower's FedAvg.

10 nodes, all of which take part; equal seeds, so the same data, batches and start for each. Peers are Flower's
FedAvg on the same split. A ratio says little here: read the points in between.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import strategy as flowers

from benchmarks.report import Row, load_now, write
from benchmarks.simulation import NODES, RATE, SPLITS, Fleet
from fedtide.aggregation import strategies as ours
from fedtide.edge_agent.training.scaffold import ScaffoldMod
from fedtide.fabric.flower import bridge as flower

ROUNDS, SEEDS = 8, (1,)
FEW = {"min_train_nodes": NODES, "min_available_nodes": NODES}
FAULTY = 1


def _own_update(fleet: Fleet) -> Callable[[int, ArrayRecord], ArrayRecord]:
    """FLTrust's: the server trains on 100 of node 0's samples of an even split."""
    server = Fleet.of("iid", fleet.seed)
    server.parts = [server.parts[0][:100]] * NODES

    def own_update(round_: int, arrays: ArrayRecord) -> ArrayRecord:
        (reply, *_) = server.replies(ours.FedAvg(**FEW), arrays, round_)
        return reply.content["arrays"]

    return own_update


def _strategies(fleet: Fleet) -> dict[str, Callable[[], Any]]:
    return {
        "FedAvg": lambda: ours.FedAvg(**FEW),
        "FedProx": lambda: ours.FedProx(**FEW),
        "FedAvgM": lambda: ours.FedAvgM(**FEW),
        "FedAdam": lambda: ours.FedAdam(**FEW),
        "FedYogi": lambda: ours.FedYogi(**FEW),
        "FedAdagrad": lambda: ours.FedAdagrad(**FEW),
        "FedNova": lambda: ours.FedNova(**FEW),
        "Scaffold": lambda: ours.Scaffold(**FEW),
        "CoordinateMedian": lambda: ours.CoordinateMedian(**FEW),
        "TrimmedMean": lambda: ours.TrimmedMean(**FEW),
        "StreamingTrimmedMean": lambda: ours.StreamingTrimmedMean(num_malicious_nodes=FAULTY, **FEW),
        "MedianOfMeans": lambda: ours.MedianOfMeans(**FEW),
        "MultiKrum": lambda: ours.MultiKrum(num_malicious_nodes=FAULTY, num_nodes_to_select=NODES - FAULTY, **FEW),
        "NormBound": lambda: ours.NormBound(bound=10.0, **FEW),
        "CentredClipping": lambda: ours.CentredClipping(radius=10.0, **FEW),
        "FLTrust": lambda: ours.FLTrust(own_update=_own_update(fleet), **FEW),
    }


def _learn(make: Callable[[], Any], split: str, seed: int, *, scaffold: bool = False) -> float:
    fleet = Fleet.of(split, seed, mod=(lambda: ScaffoldMod(RATE)) if scaffold else None)
    strategy, arrays = make(), fleet.start()
    for round_ in range(1, ROUNDS + 1):
        found, _ = strategy.aggregate_train(round_, fleet.replies(strategy, arrays, round_))
        arrays = found if found is not None else arrays
    return fleet.accuracy(arrays)


def main() -> None:
    load = load_now()
    logging.disable(logging.WARNING)
    flower.adopt_identity(1, flower.SUPERLINK_NODE_ID)
    wanted = sys.argv[1:]
    rows = []
    for split in SPLITS:
        peers = [_learn(lambda: flowers.FedAvg(**FEW), split, seed) for seed in SEEDS]
        peer = 100 * sum(peers) / len(peers)
        for name in _strategies(Fleet.of(split, SEEDS[0])):
            if wanted and name not in wanted:
                continue
            scores = [
                _learn(_strategies(Fleet.of(split, seed))[name], split, seed, scaffold=name == "Scaffold")
                for seed in SEEDS
            ]
            own = 100 * sum(scores) / len(scores)
            rows.append(Row(split, name, "%", own, peer, "Flower's FedAvg", f"{own - peer:+.2f} points"))
            print(split, name, f"{own:.2f}", f"{own - peer:+.2f}", file=sys.stderr)
    write("quality", load, rows)


if __name__ == "__main__":
    main()
