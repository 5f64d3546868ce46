"""The streams of the hub and of each region's leaf, as JetStream configurations.

Pure: `fedtide.coordinator.adapters.topology` applies them. A stream on the hub and one on a leaf never capture
the same subject, because interest crosses the leaf link and both would store the message.

Every stream has a share of its server's room, and refuses what does not fit: what is pushed in by others never takes
the room that the event log, orders and the lease need. Nothing goes by its age that somebody may still need
(`fedtide.coordinator.storage`).
"""

from __future__ import annotations

from fedtide.fabric.nats.subjects import (
    AUDIT,
    CACHE,
    CHECKPOINTS,
    CONTROL,
    DOWN,
    EVENTS,
    HUB_REGION,
    ORDERS,
    PARKED,
    RELEASES,
    STAY,
    UP,
    Subjects,
    up_stream,
)

_HOUR_NS = 3600 * 1_000_000_000
HUB_DOMAIN = "hub"
EPOCH = "fedtide-epoch"
MIRRORED = (DOWN, ORDERS)
"""Streams of the hub that every region has a mirror of."""
LARGEST_ROOM, USUAL_ROOM, SMALLEST_ROOM = 16 << 40, 64 << 30, 32 << 20
"""Bytes of a server's store: between the first and the last `Topology` finds out what there is."""
_PARKED_BYTES = 64 << 20
_SHARES_OF_HUB = {
    EVENTS: 0.20,
    CONTROL: 0.03,
    ORDERS: 0.04,
    PARKED: 0.02,
    AUDIT: 0.02,
    RELEASES: 0.24,
    DOWN: 0.15,
    CHECKPOINTS: 0.10,
    UP: 0.16,  # of all regions together
}
_SHARES_OF_LEAF = {DOWN: 0.25, ORDERS: 0.05, CACHE: 0.35, UP: 0.20, STAY: 0.10}

Config = dict[str, object]


def hub_streams(subjects: Subjects, replicas: int = 1, *, room: int = USUAL_ROOM, regions: int = 0) -> list[Config]:
    """The hub's streams but those of regions: the event log, what goes down, and what comes from processes beside it.

    Args:
        replicas: on how many servers each is.
        room: bytes that the hub's store has.
        regions: how many share the room for what comes up.
    """
    return [{**config, **_copies(replicas)} for config in _hub_streams(subjects, room, regions)]


def _hub_streams(subjects: Subjects, room: int, regions: int) -> list[Config]:
    # DOWN comes before ORDERS: in an installation that had one stream for both, it gives subjects up first.
    return [
        {
            "name": EVENTS,
            "subjects": [subjects.all_events],
            **_bounded(_SHARES_OF_HUB[EVENTS] * room),
            "retention": "limits",
            "allow_atomic": True,
            "duplicate_window": _HOUR_NS,
            "deny_delete": True,
        },
        {
            "name": PARKED,
            "subjects": [subjects.all_parked],
            **_bounded(min(_PARKED_BYTES, _SHARES_OF_HUB[PARKED] * room)),
            "max_msgs_per_subject": 1,
            "max_age": 90 * 24 * _HOUR_NS,
            "discard": "old",
        },
        {
            # The oldest entries go when it is full: `fedtide audit export` keeps them elsewhere.
            "name": AUDIT,
            "subjects": [subjects.audit],
            **_bounded(_SHARES_OF_HUB[AUDIT] * room),
            "discard": "old",
            "deny_delete": True,
            "deny_purge": True,
        },
        {
            "name": DOWN,
            "subjects": list(subjects.all_down),
            **_bounded(_SHARES_OF_HUB[DOWN] * room),
            "max_msgs_per_subject": 1,
            "allow_msg_ttl": True,
        },
        {
            "name": ORDERS,
            "subjects": [subjects.all_desired],
            **_bounded(_SHARES_OF_HUB[ORDERS] * room),
            "max_msgs_per_subject": 1,
        },
        {
            "name": RELEASES,
            "subjects": [subjects.all_releases],
            **_bounded(_SHARES_OF_HUB[RELEASES] * room),
            "max_msgs_per_subject": 1,
            "allow_msg_ttl": True,
        },
        {
            "name": CHECKPOINTS,
            "subjects": [subjects.checkpoints()],
            **_bounded(_SHARES_OF_HUB[CHECKPOINTS] * room),
            "max_msgs_per_subject": 1,
            "allow_msg_ttl": True,
        },
        {
            "name": CONTROL,
            "subjects": [subjects.all_control],
            **_bounded(_SHARES_OF_HUB[CONTROL] * room),
            "max_msgs_per_subject": 1,
        },
        _up(UP, [subjects.all_up(HUB_REGION)], _up_share(room, regions)),
    ]


def region_stream(
    subjects: Subjects,
    region: str,
    *,
    sourced: bool,
    replicas: int = 1,
    room: int = USUAL_ROOM,
    regions: int = 1,
) -> Config:
    """The hub's stream of what comes from a region; `sourced`: it is read from the region's server now.

    A message that a server sends to a source carries the subject under which it is stored, and nobody checks that: so
    each region has a stream of its own, and whoever reads one asks for that region's subjects only.
    """
    # A stream must capture something of its own; nobody publishes to this.
    captured = [f"{subjects.root}.up.{region}"]
    config = {**_up(up_stream(region), captured, _up_share(room, regions)), **_copies(replicas)}
    if sourced:
        external = {"api": f"$JS.{region}.API", "deliver": up_delivery(region)}
        config["sources"] = [{"name": UP, "external": external}]
    return config


def up_delivery(region: str) -> str:
    """The prefix of the subjects on which a region's server delivers to the hub's `region_stream`."""
    return f"DELIVER.{region}.UP"


def down_delivery(region: str, stream: str) -> str:
    """The subject on which the hub delivers what a region mirrors of a stream."""
    return f"DELIVER.{region}.{stream}"


def mirror_consumer(region: str) -> str:
    """The durable consumer of each stream in `MIRRORED` that a region's mirror reads."""
    return f"mirror-{region}"


def mirror_consumer_config(subjects: Subjects, region: str, stream: str) -> Config:
    """Made by the coordinator: a region does not choose what it gets, and where that is delivered (NATS ADR-60)."""
    filters = {
        DOWN: [subjects.all_blobs, subjects.all_round_blobs, f"{subjects.root}.down.node.{region}.*.task.>"],
        ORDERS: [subjects.desired_of(region, "*")],
    }
    return {
        "durable_name": mirror_consumer(region),
        "deliver_subject": down_delivery(region, stream),
        "ack_policy": "flow_control",
        "deliver_policy": "all",
        "filter_subjects": filters[stream],
    }


def _up_share(room: int, regions: int) -> float:
    return _SHARES_OF_HUB[UP] * room / (regions + 1)


def _bounded(max_bytes: float) -> Config:
    return {"storage": "file", "max_bytes": int(max_bytes), "discard": "new", "allow_direct": True}


def _up(name: str, captured: list[str], max_bytes: float) -> Config:
    return {
        "name": name,
        "subjects": captured,
        **_bounded(max_bytes),
        "duplicate_window": _HOUR_NS,
        "allow_msg_ttl": True,
    }


def _copies(replicas: int) -> Config:
    return {"num_replicas": replicas} if replicas > 1 else {}


def leaf_streams(subjects: Subjects, region: str, room: int = USUAL_ROOM, *, epoch: str = "") -> list[Config]:
    """The streams of a region: mirrors that republish what they store, UP, CACHE for releases, and STAY.

    Args:
        room: bytes that the region's store has.
        epoch: which log the hub has; mirrors of another one would wait for what never comes.
    """

    def bounded(stream: str) -> Config:
        return _bounded(_SHARES_OF_LEAF[stream] * room)

    # Mirrors last: they are made anew when the hub has another log, and what became smaller makes room for them.
    return [
        _up(UP, [subjects.all_up(region)], _SHARES_OF_LEAF[UP] * room),
        {
            "name": CACHE,
            "subjects": [subjects.all_cached(region)],
            **bounded(CACHE),
            "max_msgs_per_subject": 1,
            "allow_msg_ttl": True,
        },
        {
            "name": STAY,
            "subjects": [subjects.all_staying(region)],
            **bounded(STAY),
            "allow_msg_ttl": True,
        },
        *(
            {
                "name": stream,
                "mirror": {
                    "name": stream,
                    "external": {"api": f"$JS.{HUB_DOMAIN}.API"},
                    "consumer": {"name": mirror_consumer(region), "deliver_subject": down_delivery(region, stream)},
                },
                "republish": {"src": subjects.down_nodes, "dest": subjects.live_nodes},
                **bounded(stream),
                "max_msgs_per_subject": 1,
                "mirror_direct": True,
                "allow_msg_ttl": True,
                "metadata": {EPOCH: epoch},
            }
            for stream in MIRRORED
        ),
    ]
