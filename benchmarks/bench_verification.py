"""What it costs a node to verify what comes down, in turn with the digest of 1 MiB, which it takes anyway."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable

from benchmarks.report import Row, load_now, write
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.trust.chain import Chain, Files
from fedtide.fabric.trust.claims import publishers_of, signed_app
from fedtide.fabric.trust.signatures import MessageCheck
from tests.trust import NOW, Published, aggregator

TIMES, CALLS = 9, 300
SUBJECT, PATH = "ft.v1.default.task.eu.n1", "orders/eu/n1"


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS


def _cases(chain: Chain, of: Published) -> dict[str, Callable[[], object]]:
    now, body = NOW.timestamp(), b"x" * 4096
    headers = aggregator(of.keys).headers(SUBJECT, body)
    known = MessageCheck()
    app = signed_app(AppRef(name="app", bundle=BlobRef(digest="a" * 64, size_bytes=10)), [of.keys.publisher])
    return {
        "a task of a run that is known": lambda: known.check(chain, PATH, SUBJECT, body, headers, now),
        "a run's first task, with its mandate": lambda: MessageCheck().check(chain, PATH, SUBJECT, body, headers, now),
        "an app": lambda: publishers_of(chain, app, now),
    }


def main() -> None:
    load = load_now()
    of = Published.first()
    block = b"x" * 2**20
    chain, refusal = Chain(Files(of.metadata.roots[0])).updated(of.metadata, NOW.timestamp())
    assert refusal is None
    cases = {"peer": lambda: hashlib.sha256(block).digest(), **_cases(chain, of)}
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(TIMES):
        for name, call in cases.items():
            found[name].append(_seconds(call) * 1000)
    peer = statistics.median(found.pop("peer"))
    rows = [Row(name, "time", "ms", statistics.median(each), peer, "SHA-256 of 1 MiB") for name, each in found.items()]
    write("verification", load, rows)


if __name__ == "__main__":
    main()
