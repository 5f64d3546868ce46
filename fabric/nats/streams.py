"""The streams of the hub and of each region's leaf, as JetStream configurations.

Pure: `fedtide.coordinator.adapters.topology` applies them. A stream on the hub and one on a leaf never capture
the same subject, because interest crosses the leaf link and both would store the message.
"""

from __future__ import annotations

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
    up_stream,
)

_HOUR_NS = 3600 * 1_000_000_000
HUB_DOMAIN = "hub"
_PARKED_BYTES = 64 * 1024 * 1024

Config = dict[str, object]


def hub_streams(subjects: Subjects, replicas: int = 1) -> list[Config]:
    """The hub's streams but those of regions: the event log, what goes down, and what comes from processes beside it.

    Args:
        replicas: on how many servers each is.
    """
    return [{**config, **_copies(replicas)} for config in _hub_streams(subjects)]


def _hub_streams(subjects: Subjects) -> list[Config]:
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
        _up(UP, [subjects.all_up(HUB_REGION)]),
    ]


def region_stream(subjects: Subjects, region: str, *, sourced: bool, replicas: int = 1) -> Config:
    """The hub's stream of what comes from a region; `sourced`: it is read from the region's server now.

    A message that a server sends to a source carries the subject under which it is stored, and nobody checks that: so
    each region has a stream of its own, and whoever reads one asks for that region's subjects only.
    """
    # A stream must capture something of its own; nobody publishes to this.
    config = {**_up(up_stream(region), [f"{subjects.root}.up.{region}"]), **_copies(replicas)}
    if sourced:
        external = {"api": f"$JS.{region}.API", "deliver": up_delivery(region)}
        config["sources"] = [{"name": UP, "external": external}]
    return config


def up_delivery(region: str) -> str:
    """The prefix of the subjects on which a region's server delivers to the hub's `region_stream`."""
    return f"DELIVER.{region}.UP"


def down_delivery(region: str) -> str:
    """The subject on which the hub delivers what goes down to a region."""
    return f"DELIVER.{region}.DOWN"


def mirror_consumer(region: str) -> str:
    """The durable consumer of the hub's stream DOWN that a region's mirror reads."""
    return f"mirror-{region}"


def mirror_consumer_config(subjects: Subjects, region: str) -> Config:
    """Made by the coordinator: a region does not choose what it gets, and where that is delivered (NATS ADR-60)."""
    return {
        "durable_name": mirror_consumer(region),
        "deliver_subject": down_delivery(region),
        "ack_policy": "flow_control",
        "deliver_policy": "all",
        "filter_subjects": [
            f"{subjects.root}.down.blob.>",
            f"{subjects.root}.down.round.>",
            f"{subjects.root}.down.node.{region}.>",
        ],
    }


def _up(name: str, captured: list[str]) -> Config:
    return {
        "name": name,
        "subjects": captured,
        "storage": "file",
        "max_age": 7 * 24 * _HOUR_NS,
        "duplicate_window": _HOUR_NS,
        "allow_direct": True,
        "allow_msg_ttl": True,
    }


def _copies(replicas: int) -> Config:
    return {"num_replicas": replicas} if replicas > 1 else {}


def leaf_streams(subjects: Subjects, region: str) -> list[Config]:
    """The streams of a region: a mirror of DOWN that republishes what it stores, UP, CACHE for releases, and STAY."""
    return [
        {
            "name": DOWN,
            "mirror": {
                "name": DOWN,
                "external": {"api": f"$JS.{HUB_DOMAIN}.API"},
                "consumer": {"name": mirror_consumer(region), "deliver_subject": down_delivery(region)},
            },
            "republish": {"src": subjects.down_nodes, "dest": subjects.live_nodes},
            "storage": "file",
            "max_msgs_per_subject": 1,
            "allow_direct": True,
            "mirror_direct": True,
            "allow_msg_ttl": True,
        },
        _up(UP, [subjects.all_up(region)]),
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
