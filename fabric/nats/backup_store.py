"""Backups in an object store: S3 and what speaks like it, Google Cloud Storage, Azure (obstore reads their usual
environment variables and pods' identities).

A URL that ends with `/` is a place for many backups, whose names are their times; another one is one backup.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

from fedtide.fabric.errors import CapabilityMissing, ConfigError, NotFound, TransientError

_ENDING = ".tar"
_PIECE = 16 << 20
"""Fetched by one request: none takes so long that the store's client gives it up."""
_PART = 64 << 20
"""Stored by one request: S3 takes 10,000 of them."""


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
                self._obstore.put(self._store, name, whole, chunk_size=_PART, max_concurrency=2)
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
        with self.opened() as (url, whole), file.open("wb") as here:
            shutil.copyfileobj(whole, here, _PIECE)
        return url

    @contextmanager
    def opened(self) -> Iterator[tuple[str, BinaryIO]]:
        """The backup's URL, and its bytes: only those that are read are fetched. Raises as `fetch`."""
        missing = NotFound(f"there is no backup {self._url}", "Name the place that backups were stored to")
        try:
            name = self._name or next(iter(self._names()[::-1]), "")
            if not name:
                raise missing
            whole = self._obstore.open_reader(self._store, name, buffer_size=_PIECE)
        except FileNotFoundError as exc:
            raise missing from exc
        except (self._error, OSError) as exc:
            raise self._failed(exc) from exc
        # Not around what is done with it: a full disk here is no error of the store.
        yield f"{self._url.removesuffix(self._name)}{name}", cast("BinaryIO", _Reader(whole, self._reading))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (self._error, OSError) as exc:
            raise self._failed(exc) from exc

    def _names(self) -> list[str]:
        """Of the backups in this place, oldest first."""
        found: Any = self._obstore.list_with_delimiter(self._store)
        names = (str(each["path"]) for each in found["objects"])
        return sorted(name for name in names if name.startswith("fedtide-") and name.endswith(_ENDING))

    def _failed(self, exc: Exception) -> TransientError:
        return TransientError(
            f"{self._url}: {_first_line(exc)}", "See that the bucket is there, and who may write to it"
        )


class _Reader(io.RawIOBase):
    """obstore's reader, as Python's libraries expect one."""

    def __init__(self, whole: Any, reading: Callable[[], AbstractContextManager[None]]) -> None:
        self._whole = whole
        self._reading = reading

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        with self._reading():
            return bytes(self._whole.read(size if size >= 0 else None))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._whole.seek(offset, whence))

    def tell(self) -> int:
        return int(self._whole.tell())


def _first_line(exc: Exception) -> str:
    told, _, _ = str(exc).partition("Debug source:")
    return " ".join(told.split())[:300]
