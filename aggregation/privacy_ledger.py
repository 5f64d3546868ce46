"""What a model's training has spent of its nodes' privacy: epsilon from the `dp-accounting` library.

The unit of privacy is a node: all that one node's data did to the model. Entries are composed over rounds,
runs and the releases that a run started from (Renyi accountant: Mironov 2017,
https://arxiv.org/abs/1702.07476).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flwr.serverapp import strategy as flowers
from flwr.serverapp.strategy import Strategy

from aggregation.strategies.private import PrivateFedAvg
from fabric.errors import CapabilityMissing
from fabric.release import Privacy, PrivacySpent

DELTA = 1e-5
"""Where a strategy names no delta."""

_FLOWERS = (
    flowers.DifferentialPrivacyServerSideFixedClipping,
    flowers.DifferentialPrivacyServerSideAdaptiveClipping,
    flowers.DifferentialPrivacyClientSideFixedClipping,
    flowers.DifferentialPrivacyClientSideAdaptiveClipping,
)


def ledger(before: Privacy | None, run: str, strategy: Strategy, rounds: int) -> Privacy | None:
    """What a model has cost after `rounds` of this run, or None if nothing bounds it.

    A run without noise makes whatever was spent before unbounded: the ledger ends there.
    """
    spent = _spent(run, strategy, rounds)
    if not spent:
        return None
    delta = strategy.delta if isinstance(strategy, PrivateFedAvg) else DELTA
    entries = [*(before.entries if before is not None else []), *spent]
    return Privacy(entries=entries, epsilon=epsilon(entries, delta), delta=delta)


def _spent(run: str, strategy: Strategy, rounds: int) -> list[PrivacySpent]:
    if isinstance(strategy, PrivateFedAvg):
        noise, population = strategy.noise_multiplier, strategy.population
        return [
            PrivacySpent(run=run, rounds=count, noise_multiplier=noise, cohort=cohort, population=population)
            for cohort, count in sorted(strategy.rounds_by_cohort.items())
        ]
    if isinstance(strategy, _FLOWERS) and rounds:
        cohort, noise = strategy.num_sampled_clients, strategy.noise_multiplier
        return [PrivacySpent(run=run, rounds=rounds, noise_multiplier=noise, cohort=cohort)]
    return []


def epsilon(entries: Sequence[PrivacySpent], delta: float) -> float:
    """The epsilon that all entries together guarantee at `delta`; infinite without noise.

    Where a population is known, its cohorts are samples of fixed size, and data sets are neighbours if one
    node's data are replaced; else every node takes part, and they are neighbours if one is added or removed.

    Raises:
        CapabilityMissing: `dp-accounting` is not installed here.
    """
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ModuleNotFoundError as exc:
        raise CapabilityMissing(
            "the privacy ledger needs dp-accounting, which is not installed here", "pip install 'fedtide[privacy]'"
        ) from exc
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
