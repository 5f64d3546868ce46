"""Strategies for Flower ServerApps, under our Grid or Flower's own.

Each stands in its own module and cites its paper; none knows of NATS. Apps import them from here.
"""

from aggregation.strategies.averaging import FedAvg
from aggregation.strategies.bounded import CentredClipping, FLTrust, NormBound
from aggregation.strategies.fedbuff import FedBuff
from aggregation.strategies.fednova import FedNova
from aggregation.strategies.private import PrivateFedAvg
from aggregation.strategies.robust import (
    CoordinateMedian,
    Krum,
    MedianOfMeans,
    MultiKrum,
    StreamingTrimmedMean,
    TrimmedMean,
)
from aggregation.strategies.scaffold import Scaffold
from aggregation.strategies.server_optimizers import FedAdagrad, FedAdam, FedAvgM, FedProx, FedYogi

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
