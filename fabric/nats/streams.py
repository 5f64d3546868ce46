"""The streams of the hub and of each region's leaf, as JetStream configurations.

Pure: `fedtide.coordinator.adapters.topology` applies them. A stream on the hub and one on a leaf never capture
the same subject, because interest crosses the leaf link and both would store the message.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedtide.fabric.nats.subjects import (
    CACHE,
    CHECKPOINTS,
    CONTROL,
    DOWN,
    EVENTS,
    HUB_REGION,
    PARKED,
    RELEASES,
    STAY,
    UP,
    Subjects,
)

_HOUR_NS = 3600 * 1_000_000_000
HUB_DOMAIN = "hub"
_PARKED_BYTES = 64 * 1024 * 1024

Config = dict[str, object]


def hub_streams(subjects: Subjects, regions: Iterable[str], replicas: int = 1) -> list[Config]:
    """The streams of the hub: the event log, what goes down, and what comes up; each on `replicas` servers."""
    copies = {"num_replicas": replicas} if replicas > 1 else {}
    return [{**config, **copies} for config in _hub_streams(subjects, regions)]


def _hub_streams(subjects: Subjects, regions: Iterable[str]) -> list[Config]:
    return [
        {
            "name": EVENTS,
            "subjects": [subjects.all_events],
            "storage": "file",
            "retention": "limits",
            "discard": "new",
            "allow_direct": True,
            "allow_atomic": True,
            "duplicate_window": _HOUR_NS,
            "deny_delete": True,
        },
        {
            "name": PARKED,
            "subjects": [subjects.all_parked],
            "storage": "file",
            "max_msgs_per_subject": 1,
            "max_bytes": _PARKED_BYTES,
            "max_age": 90 * 24 * _HOUR_NS,
            "allow_direct": True,
        },
        {
            "name": DOWN,
            "subjects": [subjects.all_down],
            "storage": "file",
            "max_msgs_per_subject": 1,
            "allow_direct": True,
            "allow_msg_ttl": True,
        },
        {
            "name": RELEASES,
            "subjects": [subjects.all_releases],
            "storage": "file",
            "max_msgs_per_subject": 1,
            "allow_direct": True,
            "allow_msg_ttl": True,
        },
        {
            "name": CHECKPOINTS,
            "subjects": [subjects.checkpoints()],
            "storage": "file",
            "max_msgs_per_subject": 1,
            "max_age": 30 * 24 * _HOUR_NS,
            "allow_direct": True,
            "allow_msg_ttl": True,
        },
        {
            "name": CONTROL,
            "subjects": [subjects.all_control],
            "storage": "file",
            "max_msgs_per_subject": 1,
            "allow_direct": True,
        },
        {
            "name": UP,
            "subjects": [subjects.all_up(HUB_REGION)],
            "sources": [{"name": UP, "external": {"api": f"$JS.{region}.API"}} for region in sorted(regions)],
            "storage": "file",
            "max_age": 7 * 24 * _HOUR_NS,
            "duplicate_window": _HOUR_NS,
            "allow_direct": True,
            "allow_msg_ttl": True,
        },
    ]


def leaf_streams(subjects: Subjects, region: str) -> list[Config]:
    """The streams of a region: a mirror of DOWN that republishes what it stores, UP, CACHE for releases, and STAY."""
    return [
        {
            "name": DOWN,
            "mirror": {"name": DOWN, "external": {"api": f"$JS.{HUB_DOMAIN}.API"}},
            "republish": {"src": subjects.down_nodes, "dest": subjects.live_nodes},
            "storage": "file",
            "max_msgs_per_subject": 1,
            "allow_direct": True,
            "mirror_direct": True,
            "allow_msg_ttl": True,
        },
        {
            "name": UP,
            "subjects": [subjects.all_up(region)],
            "storage": "file",
            "max_age": 7 * 24 * _HOUR_NS,
            "duplicate_window": _HOUR_NS,
            "allow_direct": True,
            "allow_msg_ttl": True,
        },
        {
            "name": CACHE,
            "subjects": [subjects.all_cached(region)],
            "storage": "file",
            "max_msgs_per_subject": 1,
            "allow_direct": True,
            "allow_msg_ttl": True,
        },
        {
            "name": STAY,
            "subjects": [subjects.all_staying(region)],
            "storage": "file",
            "max_age": 7 * 24 * _HOUR_NS,
            "allow_direct": True,
            "allow_msg_ttl": True,
        },
    ]
