"""`python -m fedtide.coordinator.backup save|restore CONFIG.json FILE|URL`: an installation as a file, and back.

The log is copied before all else but the snapshot of it: blobs are stored before an event names them, and reports stay
until the log has them. So what comes after the log is at least what it speaks of, as after a coordinator was away.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import logging
import os
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fedtide.coordinator.__main__ import load
from fedtide.coordinator.adapters.tenant_keys import TenantKeys, publish
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.identity.tenants import Tenant, of_added
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.event_log import EventLog
from fedtide.coordinator.log.leader_lease import LEASE_S, Lease
from fedtide.coordinator.log.log_marks import Mark
from fedtide.coordinator.log.snapshots import Snapshots
from fedtide.coordinator.service import marks_of
from fedtide.fabric import logs
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import ConfigError, DigestMismatch, FedtideError, TransientError
from fedtide.fabric.nats.accounts import CORE
from fedtide.fabric.nats.authority import COORDINATOR, FILE, OPERATOR, SYSTEM_CREDENTIALS, Authority
from fedtide.fabric.nats.backup_file import (
    CONTENTS,
    IDENTITY,
    STREAMS,
    TENANTS,
    Contents,
    Copied,
    identity_in,
    opened,
    unpack_identity,
)
from fedtide.fabric.nats.backup_store import BackupStore, is_url
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.nats.stream_copies import StreamCopy, copy_stream, put_stream
from fedtide.fabric.nats.subjects import (
    AUDIT,
    CHECKPOINTS,
    CONTROL,
    DOWN,
    EVENTS,
    ORDERS,
    PARKED,
    RELEASES,
    UP,
    Subjects,
    up_stream,
)
from fedtide.fabric.process.retry import until_done

log = logging.getLogger(__name__)

_PIECE = 1 << 20


async def save(config: CoordinatorConfig, file: Path) -> Contents:
    """Write a backup of a running installation, with its tenants; the file is there as a whole, or not at all.

    Raises:
        BrokerUnavailable: no hub, or it went away.
        ConfigError: the file cannot be written.
    """
    part = file.with_name(f"{file.name}.part")
    broker = await _connect(config)
    try:
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as raw:
            with tarfile.open(fileobj=raw, mode="w") as archive:
                contents = await _copied(broker, config, archive, file.parent)
            raw.flush()
            os.fsync(raw.fileno())
        part.replace(file)
        return contents
    except OSError as exc:
        remedy = "Name a file in a folder that is there"
        raise ConfigError(str(file), f"cannot be written: {exc.strerror}", remedy) from exc
    finally:
        part.unlink(missing_ok=True)
        await broker.close()


async def _copied(broker: Broker, config: CoordinatorConfig, archive: tarfile.TarFile, folder: Path) -> Contents:
    # Before what takes long: reports go a while after they were read.
    reports = [name for name in await broker.stream_names() if name == UP or name.startswith(up_stream(""))]
    order = (CONTROL, EVENTS, *reports, ORDERS, AUDIT, PARKED, CHECKPOINTS, DOWN, RELEASES)
    streams = [await _add_stream(broker, stream, archive, folder) for stream in order]
    for path in sorted(config.identity_dir.iterdir()) if config.identity_dir is not None else ():
        if path.is_file() and path.name != OPERATOR:  # it is kept elsewhere
            _add(archive, IDENTITY + path.name, path.read_bytes())
    engine = _engine(broker, config)
    await engine.load()
    await engine.catch_up()
    tenants = sorted(engine.world.tenants.values(), key=lambda each: each.name)
    served = [each for each in tenants if not each.is_leaving]
    await _add_tenants(config, served, archive, folder)
    contents = Contents(
        tenants=[each.as_added_now() for each in served],
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        tenant=config.tenant,
        regions=config.regions,
        epoch=engine.world.epoch.id,
        events=next(int(each.state["last_seq"]) for each in streams if each.name == EVENTS),
        streams=streams,
    )
    _add(archive, CONTENTS, to_json(contents))
    return contents


async def _add_tenants(
    config: CoordinatorConfig, tenants: Sequence[Tenant], archive: tarfile.TarFile, folder: Path
) -> None:
    """A backup of each into this one."""
    if not tenants or config.identity_dir is None:
        return
    keys = TenantKeys(config, Authority.load(config.identity_dir))
    for tenant in tenants:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            file = Path(scratch) / "tenant.tar"
            await save(keys.written(tenant), file)
            archive.add(file, TENANTS + tenant.name, filter=_for_owner)


def _for_owner(about: tarfile.TarInfo) -> tarfile.TarInfo:
    about.mode = 0o600
    return about


def _engine(broker: Broker, config: CoordinatorConfig) -> Engine:
    subjects = Subjects(config.tenant)
    return Engine(broker, subjects, EventLog(broker, subjects), Snapshots(broker, subjects))


async def _add_stream(broker: Broker, stream: str, archive: tarfile.TarFile, folder: Path) -> Copied:
    copy, digest = await copy_stream(broker, stream), hashlib.sha256()
    with tempfile.TemporaryFile(dir=folder) as whole:  # a tar wants sizes first
        async for chunk in copy.chunks:
            digest.update(chunk)
            whole.write(chunk)
        about = tarfile.TarInfo(STREAMS + stream)
        about.size, about.mode = whole.tell(), 0o600
        whole.seek(0)
        archive.addfile(about, whole)
    return Copied(name=stream, config=copy.config, state=copy.state, sha256=digest.hexdigest())


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size, about.mode = len(data), 0o600
    archive.addfile(about, io.BytesIO(data))


async def log_length(config: CoordinatorConfig) -> int:
    """How many events the hub's log has had; 0: it holds none.

    Raises:
        BrokerUnavailable: no hub.
    """
    broker = await _connect(config)
    try:
        return await broker.last_sequence(EVENTS) if await broker.has_stream(EVENTS) else 0
    finally:
        await broker.close()


async def until_whole(config: CoordinatorConfig) -> None:
    """Wait until the hub holds a log, and as much of it as there was: a restore by somebody else is over then."""

    async def look() -> None:
        mark, there = await marks_of(config).read(), await log_length(config)
        if there == 0 or (mark is not None and there < mark.sequence):
            raise TransientError("the log is not restored yet")

    await until_done(log, "restore.waits", look)


async def restore(
    config: CoordinatorConfig, file: Path, *, replace: bool, host: CoordinatorConfig | None = None
) -> Contents:
    """Put a backup into a hub that runs and that no coordinator uses; it takes effect when one starts.

    Args:
        replace: delete what the hub holds.
        host: of the installation, if the backup is that of a tenant.

    Raises:
        ConfigError: it is no backup, one of another installation, a coordinator runs, or the hub is not empty.
        DigestMismatch: the backup is damaged; what was there has not been touched.
    """
    with opened(file) as (archive, contents):
        if contents.tenant != config.tenant:
            raise ConfigError(str(file), f"is a backup of tenant {contents.tenant!r}, not {config.tenant!r}")
        await asyncio.to_thread(_check, archive, contents)
        _put_identity(archive, config.identity_dir, str(file))
        mark = Mark(epoch=contents.epoch, sequence=contents.events, restored=f"restored from a backup of {contents.at}")
        broker = await _connect(config)
        try:
            await _make_room(broker, Subjects(config.tenant), contents, replace=replace)
            # The mark first, and the log last: a restore that breaks off leaves a hub on which nobody starts.
            await marks_of(host or config, config if host is not None else None).write(mark)
            await _restore_tenants(config, archive, contents, replace=replace)
            for each in sorted(contents.streams, key=lambda each: each.name == EVENTS):
                alone = {key: value for key, value in each.config.items() if key != "sources"}
                alone["num_replicas"] = config.stream_replicas
                await put_stream(broker, StreamCopy(alone, each.state, _pieces(archive, each)))
        finally:
            await broker.close()
        return contents


async def _restore_tenants(
    config: CoordinatorConfig, archive: tarfile.TarFile, contents: Contents, *, replace: bool
) -> None:
    """Raises ConfigError: a tenant's keys were sealed by another installation."""
    if not contents.tenants or config.identity_dir is None:
        return
    authority = Authority.load(config.identity_dir)
    keys, access = TenantKeys(config, authority), Access(config.identity_dir / SYSTEM_CREDENTIALS, config.ca_file)
    system = await Broker.connect(config.nats_url, "backup", access)
    try:
        for added in contents.tenants:
            tenant = of_added(added, datetime.now(UTC))
            await publish(system, keys.on_hub(tenant), tenant.regions)
            with tempfile.TemporaryDirectory(dir=keys.folder_of(tenant).parent.parent) as scratch:
                archive.extract(TENANTS + tenant.name, scratch, filter="data")
                await restore(keys.written(tenant), Path(scratch) / TENANTS / tenant.name, replace=replace, host=config)
    finally:
        await system.close()


def _check(archive: tarfile.TarFile, contents: Contents) -> None:
    for each in contents.streams:
        digest, stored = hashlib.sha256(), archive.extractfile(STREAMS + each.name)
        while stored is not None and (piece := stored.read(_PIECE)):
            digest.update(piece)
        if digest.hexdigest() != each.sha256:
            raise DigestMismatch(f"the backup is damaged: stream {each.name}", "Use another backup")


def _put_identity(archive: tarfile.TarFile, folder: Path | None, file: str) -> None:
    """Write the coordinator's secrets of a backup where there are none.

    Raises:
        ConfigError: there are those of another installation.
    """
    found = identity_in(archive)
    if folder is None or FILE not in found:
        return
    if (folder / FILE).exists():
        here, there = Authority.load(folder), Authority.parse(found[FILE].encode(), file)
        if here.public(CORE) != there.public(CORE):
            raise ConfigError(file, f"is a backup of another installation than {folder} belongs to")
        return
    unpack_identity(archive, folder)


async def _make_room(broker: Broker, subjects: Subjects, contents: Contents, *, replace: bool) -> None:
    if await broker.has_stream(CONTROL):
        lease = await broker.last(CONTROL, subjects.lease)
        if lease is not None and (holder := from_json(Lease, lease.data, "lease").holder):
            await asyncio.sleep(2 * LEASE_S)  # no clock says whether somebody renews it
            later = await broker.last(CONTROL, subjects.lease)
            if later is not None and later.sequence != lease.sequence:
                raise ConfigError("restore", f"coordinator {holder} runs", "Stop every coordinator first")
    there = [each.name for each in contents.streams if await broker.has_stream(each.name)]
    if EVENTS in there and await broker.last_sequence(EVENTS) > 0 and not replace:
        raise ConfigError("restore", "the hub holds a log already", "With --replace it is deleted")
    for name in there:
        await broker.delete_stream(name)


async def _pieces(archive: tarfile.TarFile, each: Copied) -> AsyncIterator[bytes]:
    stored = archive.extractfile(STREAMS + each.name)
    while stored is not None and (piece := stored.read(_PIECE // 2)):
        yield piece


async def _connect(config: CoordinatorConfig) -> Broker:
    credentials = config.identity_dir / COORDINATOR if config.identity_dir is not None else None
    return await Broker.connect(config.nats_url, "backup", Access(credentials, config.ca_file))


def main() -> int:
    parser = argparse.ArgumentParser(prog="fedtide backup")
    parser.add_argument("verb", choices=["save", "restore", "await"], help="await: until the hub holds a whole log")
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "file",
        nargs="?",
        default="",
        help="A file, or a URL of an object store; one that ends with / is a place for many",
    )
    parser.add_argument("--replace", action="store_true")
    parser.add_argument("--if-empty", action="store_true", help="Do nothing if the hub holds a log")
    parser.add_argument("--keep", type=int, help="So many of the newest backups in the place")
    asked = parser.parse_args()
    logs.to_stderr()
    try:
        config = load(asked.config)
        if asked.verb == "await":
            asyncio.run(until_whole(config))
            return 0
        with tempfile.TemporaryDirectory(dir=_scratch(config, asked.file)) as scratch:
            said = (
                _save(config, asked, Path(scratch)) if asked.verb == "save" else _restore(config, asked, Path(scratch))
            )
    except FedtideError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    print(said)
    return 0


def _scratch(config: CoordinatorConfig, target: str) -> Path | None:
    """Where the file lies on its way to or from a store: there is room."""
    if is_url(target):
        config.data_dir.mkdir(parents=True, exist_ok=True)
        return config.data_dir
    return None


def _save(config: CoordinatorConfig, asked: argparse.Namespace, scratch: Path) -> str:
    if not is_url(asked.file):
        return _about(asked.file, asyncio.run(save(config, Path(asked.file))))
    store, file = BackupStore(asked.file), scratch / "backup.tar"
    contents = asyncio.run(save(config, file))
    return _about(store.put(file, asked.keep), contents)


def _restore(config: CoordinatorConfig, asked: argparse.Namespace, scratch: Path) -> str:
    if asked.if_empty and asyncio.run(log_length(config)):
        return "the hub holds a log: nothing to do"
    named, file = asked.file, Path(asked.file)
    if is_url(asked.file):
        file = scratch / "backup.tar"
        named = BackupStore(asked.file).fetch(file)
    return _about(named, asyncio.run(restore(config, file, replace=asked.replace)))


def _about(named: str, found: Contents) -> str:
    return f"{named}: {found.events} events, {len(found.streams)} streams, of {found.at}"


if __name__ == "__main__":
    sys.exit(main())
