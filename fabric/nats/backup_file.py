"""The file of a backup: a tar of whole streams, of the coordinator's secrets, and of a list of what is in it."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field

from fedtide.fabric.encoding import from_json
from fedtide.fabric.errors import ConfigError, MalformedMessage
from fedtide.fabric.events.tenants import TenantAdded
from fedtide.fabric.nats.authority import FILE
from fedtide.fabric.nats.credentials import write_secret
from fedtide.fabric.strict import Message

FORMAT = 1
CONTENTS = "backup.json"
IDENTITY = "identity/"
STREAMS = "streams/"
TENANTS = "tenants/"


class Copied(Message):
    """A stream: what JetStream needs to make it again, and the digest of its bytes (SHA-256)."""

    name: str
    config: dict[str, Any]
    state: dict[str, Any]
    sha256: str


class Contents(Message):
    """What a backup holds. Whoever has it is the coordinator: it holds its secrets."""

    format: int = FORMAT
    at: str = Field(description="UTC, ISO 8601")
    tenant: str
    regions: list[str]
    epoch: str
    events: int = Field(description="How far its log goes")
    streams: list[Copied]
    tenants: list[TenantAdded] = Field(default=[], description="As they are now; of each there is a backup in this one")


@contextmanager
def opened(file: Path, whole: BinaryIO | None = None) -> Iterator[tuple[tarfile.TarFile, Contents]]:
    """A backup, for reading.

    Args:
        file: its name, in errors too.
        whole: its bytes, if they are not in a file here.

    Raises:
        ConfigError: it is none, or one of a newer version.
    """
    remedy = "`fedtide backup` makes one"
    try:
        archive = tarfile.open(file if whole is None else None, "r:", whole)  # noqa: SIM115  # closed below
    except (OSError, tarfile.TarError) as exc:
        raise ConfigError(str(file), f"is no backup that can be read: {type(exc).__name__}", remedy) from exc
    with archive:
        try:
            contents = from_json(Contents, read(archive, CONTENTS), CONTENTS)
        except (OSError, tarfile.TarError, MalformedMessage, KeyError) as exc:
            raise ConfigError(str(file), f"is no backup that can be read: {exc}", remedy) from exc
        if contents.format > FORMAT:
            raise ConfigError(str(file), "is a backup of a newer version of fedtide", "Upgrade fedtide")
        yield archive, contents


def read(archive: tarfile.TarFile, name: str) -> bytes:
    """Raises KeyError: there is none of that name."""
    found = archive.extractfile(name)
    if found is None:
        raise KeyError(name)
    return found.read()


def unpack_identity(archive: tarfile.TarFile, folder: Path) -> None:
    """Write the coordinator's secrets into a folder."""
    found = identity_in(archive)
    for name in sorted(found, key=lambda name: name == FILE):  # the last: it says that the others are there
        write_secret(folder / name, found[name])


def identity_in(archive: tarfile.TarFile) -> Mapping[str, str]:
    """The coordinator's secrets, by file name."""
    names = [
        name for name in archive.getnames() if name.startswith(IDENTITY) and "/" not in name.removeprefix(IDENTITY)
    ]
    return {name.removeprefix(IDENTITY): read(archive, name).decode() for name in names}
