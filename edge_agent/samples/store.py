"""A bounded store on disk of the requests that this node kept, with the labels that arrived later.

Its content never leaves the node. It is in SQLite: a power loss may cost the newest samples, and never
leaves a partial one.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedtide.edge_agent.serving.scoring import Array, Labels
from fedtide.fabric.tensors.frame import Tensor, decode, encode

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    model TEXT NOT NULL, id TEXT NOT NULL, at REAL NOT NULL, inputs BLOB NOT NULL,
    label TEXT, labelled_at REAL, UNIQUE (model, id)
);
CREATE INDEX IF NOT EXISTS labelled ON samples (model, labelled_at) WHERE label IS NOT NULL;
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: the inputs as they came, `label` once it is known. `at` is in Unix seconds."""

    model: str
    id: str
    at: float
    inputs: dict[str, Array]
    label: Labels | None = None
    number: int = 0


def samples_file(data_dir: Path) -> Path:
    """Where a node keeps its samples."""
    return data_dir / "samples" / "samples.sqlite"


class SampleStore:
    """Owns one file. May be used from several threads, and read by other processes."""

    def __init__(self, file: Path, max_bytes: int, max_age_s: float) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._one_at_a_time = threading.Lock()
        try:
            self._db = _open(file)
        except sqlite3.DatabaseError as exc:
            damaged = file.with_suffix(".damaged")
            log.error("samples.damaged", extra={"kept_as": str(damaged), "reason": str(exc)})
            file.replace(damaged)
            self._db = _open(file)
        self._bytes = self._count_bytes()
        """Size of the samples in bytes, or a little more: replaced ones are included until the next recount."""

    def close(self) -> None:
        self._db.close()

    def add(self, samples: Iterable[Sample], now: float, *, is_sure: bool = True) -> None:
        """Add samples, replacing those with the same id; then delete what exceeds the limits.

        Args:
            is_sure: not only this machine's clock says that it is `now`. Else nothing goes by its age, and no sample is
                dated before those that are there: a clock that jumps deletes nothing.
        """
        newest = 0.0 if is_sure else self._newest()
        rows = [(s.model, s.id, max(s.at, newest), _pack(s.inputs)) for s in samples]
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO samples (model, id, at, inputs) VALUES (?, ?, ?, ?)", rows)
            if is_sure:
                self._db.execute("UPDATE samples SET at = ? WHERE at > ?", (now, now))
                self._db.execute("DELETE FROM samples WHERE at < ?", (now - self._max_age_s,))
            self._bytes += sum(len(packed) + len(key) for _, key, _, packed in rows)
            if self._bytes > self._max_bytes:
                self._trim()

    def _trim(self) -> None:
        """Delete the oldest tenth until the rest fits: deleting less would be needed at every write."""
        self._bytes = self._count_bytes()
        while self._bytes > self._max_bytes:
            count = self._db.execute("SELECT COUNT(*) FROM samples").fetchone()[0]
            oldest = "SELECT number FROM samples ORDER BY at LIMIT ?"
            self._db.execute(f"DELETE FROM samples WHERE number IN ({oldest})", (max(1, count // 10),))  # noqa: S608 - a constant
            self._bytes = self._count_bytes()

    def _newest(self) -> float:
        with self._one_at_a_time:
            return float(self._db.execute("SELECT COALESCE(MAX(at), 0) FROM samples").fetchone()[0])

    def _count_bytes(self) -> int:
        query = "SELECT COALESCE(SUM(LENGTH(inputs) + LENGTH(id) + COALESCE(LENGTH(label), 0)), 0) FROM samples"
        return int(self._db.execute(query).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._one_at_a_time:
            self._db.execute("BEGIN")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def label(self, model: str, labels: Mapping[str, Labels], now: float) -> int:
        """Add labels to samples; returns how many of the samples were found."""
        rows = [(json.dumps(label), now, model, key) for key, label in labels.items()]
        with self._transaction():
            done = self._db.executemany(
                "UPDATE samples SET label = ?, labelled_at = ? WHERE model = ? AND id = ?", rows
            ).rowcount
        return max(0, done)

    def labelled(self, model: str, limit: int, since: float = 0.0) -> list[Sample]:
        """The newest `limit` samples that got a label after `since`, oldest first."""
        query = (
            "SELECT number, id, at, inputs, label FROM samples WHERE model = ? AND label IS NOT NULL "
            "AND labelled_at > ? ORDER BY number DESC LIMIT ?"
        )
        with self._one_at_a_time:
            rows = self._db.execute(query, (model, since, limit)).fetchall()
        return [Sample(model, i, at, _unpack(raw), json.loads(label), n) for n, i, at, raw, label in reversed(rows)]

    def labelled_rows(self, model: str) -> list[tuple[int, int]]:
        """(number, row) of everything of a model that has a label, oldest first: a request may hold several rows."""
        query = "SELECT number, label FROM samples WHERE model = ? AND label IS NOT NULL ORDER BY number"
        with self._one_at_a_time:
            found = [(number, json.loads(label)) for number, label in self._db.execute(query, (model,))]
        return [(n, row) for n, label in found for row in range(len(label) if isinstance(label, list) else 1)]

    def read(self, number: int) -> Sample | None:
        query = "SELECT model, id, at, inputs, label FROM samples WHERE number = ?"
        with self._one_at_a_time:
            row = self._db.execute(query, (number,)).fetchone()
        if row is None:
            return None
        model, key, at, raw, label = row
        return Sample(model, key, at, _unpack(raw), json.loads(label) if label else None, number)

    def counts(self) -> dict[str, dict[str, int]]:
        """By model: samples, how many have a label, bytes."""
        query = "SELECT model, COUNT(*), COUNT(label), SUM(LENGTH(inputs)) FROM samples GROUP BY model"
        with self._one_at_a_time:
            rows = self._db.execute(query).fetchall()
        return {model: {"samples": n, "labelled": labelled, "bytes": size} for model, n, labelled, size in rows}

    def forget(self, model: str, *, id_: str | None = None, before: float | None = None) -> int:
        """Delete samples of a model: one, those older than `before`, or all; their bytes are overwritten."""
        with self._one_at_a_time:
            self._db.execute("PRAGMA secure_delete=ON")
            done = self._db.execute(
                "DELETE FROM samples WHERE model = ? AND (? IS NULL OR id = ?) AND (? IS NULL OR at < ?)",
                (model, id_, id_, before, before),
            ).rowcount
            # Also clears the write-ahead log, which may still hold the deleted rows.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return max(0, done)


def _open(file: Path) -> sqlite3.Connection:
    db = sqlite3.connect(file, check_same_thread=False, isolation_level=None, timeout=30)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("PRAGMA cache_size=-512")
        db.executescript(_SCHEMA)
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db


def _pack(inputs: dict[str, Array]) -> bytes:
    return b"".join(encode([Tensor.of(name, array) for name, array in inputs.items()]))


def _unpack(raw: bytes) -> dict[str, Array]:
    return {t.name: t.numpy() for t in decode(raw)}
