"""The privacy ledger of a model: the epsilon spent in training, from the `dp-accounting` library.

The unit of privacy is a node: all that one node's data did to the model. Entries are composed over rounds,
runs and the releases that a run started from (Renyi accountant: Mironov 2017,
https://arxiv.org/abs/1702.07476).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedtide.aggregation.strategies.private import PrivateFedAvg
from fedtide.fabric.errors import CapabilityMissing
from fedtide.fabric.plans.release import Privacy, PrivacySpent


def ledger(before: Privacy | None, run: str, strategy: Strategy) -> Privacy | None:
    """The ledger of a model after this run, or None if its epsilon is unbounded.

    A run without noise makes epsilon unbounded and ends the ledger. Flower's own DP wrappers count as such a run:
    they scale the noise by the expected number of nodes, not by the replies, and weight updates by examples.
    """
    spent = _spent(run, strategy)
    if not spent:
        return None
    assert isinstance(strategy, PrivateFedAvg)
    delta = strategy.delta
    entries = [*(before.entries if before is not None else []), *spent]
    return Privacy(entries=entries, epsilon=epsilon(entries, delta), delta=delta)


def _spent(run: str, strategy: Strategy) -> list[PrivacySpent]:
    if isinstance(strategy, PrivateFedAvg):
        noise, population = strategy.noise_multiplier, strategy.population
        return [
            PrivacySpent(run=run, rounds=count, noise_multiplier=noise, cohort=cohort, population=population)
            for cohort, count in sorted(strategy.rounds_by_cohort.items())
        ]
    return []


def check(strategy: Strategy) -> None:
    """Check, before training, that the strategy's ledger can be kept.

    Raises:
        CapabilityMissing: `dp-accounting` is not installed here.
    """
    if isinstance(strategy, PrivateFedAvg) and find_spec("dp_accounting") is None:
        raise CapabilityMissing(
            "the privacy ledger needs dp-accounting, which is not installed here", "pip install 'fedtide[privacy]'"
        )


def epsilon(entries: Sequence[PrivacySpent], delta: float) -> float:
    """The epsilon that all entries together guarantee at `delta`; infinite without noise.

    Where a population is known, its cohorts are samples of fixed size, and data sets are neighbours if one
    node's data are replaced; else every node takes part, and they are neighbours if one is added or removed.
    """
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    replaced = any(e.population is not None for e in entries)
    relation = dp_accounting.NeighboringRelation
    accountant = RdpAccountant(neighboring_relation=relation.REPLACE_ONE if replaced else relation.ADD_OR_REMOVE_ONE)
    for entry in entries:
        # Replacing one update moves a sum of clipped updates twice as far as removing it.
        gaussian = dp_accounting.GaussianDpEvent(entry.noise_multiplier / (2 if replaced else 1))
        event: Any = gaussian
        if entry.population is not None:
            event = dp_accounting.SampledWithoutReplacementDpEvent(entry.population, entry.cohort, gaussian)
        elif replaced:
            event = dp_accounting.SampledWithoutReplacementDpEvent(entry.cohort, entry.cohort, gaussian)
        accountant.compose(event, entry.rounds)
    return float(accountant.get_epsilon(delta))
