"""Strategies for Flower ServerApps, under our Grid or Flower's own.

Each stands in its own module and cites its paper; none knows of NATS. Apps import them from here.
"""

from fedtide.aggregation.strategies.averaging import FedAvg
from fedtide.aggregation.strategies.bounded import CentredClipping, FLTrust, NormBound
from fedtide.aggregation.strategies.fedbuff import FedBuff
from fedtide.aggregation.strategies.fednova import FedNova
from fedtide.aggregation.strategies.private import PrivateFedAvg
from fedtide.aggregation.strategies.robust import (
    CoordinateMedian,
    Krum,
    MedianOfMeans,
    MultiKrum,
    StreamingTrimmedMean,
    TrimmedMean,
)
from fedtide.aggregation.strategies.scaffold import Scaffold
from fedtide.aggregation.strategies.server_optimizers import FedAdagrad, FedAdam, FedAvgM, FedProx, FedYogi

__all__ = [
    "CentredClipping",
    "CoordinateMedian",
    "FLTrust",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedNova",
    "FedProx",
    "FedYogi",
    "Krum",
    "MedianOfMeans",
    "MultiKrum",
    "NormBound",
    "PrivateFedAvg",
    "Scaffold",
    "StreamingTrimmedMean",
    "TrimmedMean",
]
