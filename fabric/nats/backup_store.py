"""Backups in an object store: S3 and what speaks like it, Google Cloud Storage, Azure (obstore reads their usual
environment variables and pods' identities).

A URL that ends with `/` is a place for many backups, whose names are their times; another one is one backup.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtide.fabric.errors import CapabilityMissing, ConfigError, NotFound, TransientError

_ENDING = ".tar"
_PIECE = 8 << 20


def is_url(target: str) -> bool:
    return "://" in target


class BackupStore:
    """The place that a URL names.

    Raises:
        CapabilityMissing: obstore is not installed.
        ConfigError: no store has such a URL.
    """

    def __init__(self, url: str) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as exc:
            raise CapabilityMissing("the client of object stores is not here", "pip install 'fedtide[backup]'") from exc
        self._url, self._obstore, self._error = url, obstore, BaseError
        place, _, self._name = url.rpartition("/")
        try:
            self._store = from_url(place)
        except (BaseError, ValueError) as exc:
            remedy = "Write s3://BUCKET/FOLDER/, gs://BUCKET/FOLDER/ or az://ACCOUNT/CONTAINER/FOLDER/"
            raise ConfigError("url", f"{url!r} names no store: {_first_line(exc)}", remedy) from exc

    def put(self, file: Path, keep: int | None = None) -> str:
        """Store a backup; returns its URL.

        Args:
            keep: remove all but so many of the newest in this place.

        Raises:
            TransientError: the store refuses, or does not answer.
        """
        name = self._name or f"fedtide-{datetime.now(UTC):%Y%m%dT%H%M%SZ}{_ENDING}"
        try:
            with file.open("rb") as whole:
                self._obstore.put(self._store, name, whole)
            for old in self._names()[:-keep] if keep and not self._name else ():
                self._obstore.delete(self._store, old)
        except (self._error, OSError) as exc:  # what is absent or forbidden is Python's own error
            raise self._failed(exc) from exc
        return f"{self._url.removesuffix(self._name)}{name}"

    def fetch(self, file: Path) -> str:
        """Write the backup, or the newest of this place, into a file; returns its URL.

        Raises:
            NotFound: there is none.
            TransientError: as for `put`.
        """
        try:
            name = self._name or next(iter(self._names()[::-1]), "")
            if not name:
                raise NotFound(f"there is no backup in {self._url}", "Name the place that backups were stored to")
            found = self._obstore.get(self._store, name)
            with file.open("wb") as whole:
                for piece in found.stream(min_chunk_size=_PIECE):
                    whole.write(piece)
        except FileNotFoundError as exc:
            raise NotFound(f"there is no backup {self._url}", "Name the place that backups were stored to") from exc
        except (self._error, OSError) as exc:
            raise self._failed(exc) from exc
        return f"{self._url.removesuffix(self._name)}{name}"

    def _names(self) -> list[str]:
        """Of the backups in this place, oldest first."""
        found: Any = self._obstore.list_with_delimiter(self._store)
        names = (str(each["path"]) for each in found["objects"])
        return sorted(name for name in names if name.startswith("fedtide-") and name.endswith(_ENDING))

    def _failed(self, exc: Exception) -> TransientError:
        return TransientError(
            f"{self._url}: {_first_line(exc)}", "See that the bucket is there, and who may write to it"
        )


def _first_line(exc: Exception) -> str:
    told, _, _ = str(exc).partition("Debug source:")
    return " ".join(told.split())[:300]
