"""`fedtide trust ...`: the offline keys of an installation, and what they delegate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.home import Home
from fedtide.console.output import Format, Output, say, show_list
from fedtide.console.trust_folder import TrustFolder
from fedtide.fabric.errors import ConfigError, FedtideError
from fedtide.fabric.ids import check_token
from fedtide.fabric.trust import ceremony, keys
from fedtide.fabric.trust.installation import DIRECTOR_KEY, PUBLISHER_KEY, RELEASES_KEY, ROOT_KEY, TIMESTAMP_KEY
from fedtide.fabric.trust.libraries import CryptoSigner, Key
from fedtide.fabric.trust.store import pin_of

trust_app = typer.Typer(no_args_is_help=True, help="Who may say what: the root's keys, and what they delegate.")

Folder = Annotated[
    Path | None, typer.Option("--folder", help="Where the offline metadata are; default: trust/ of the present home")
]
SignWith = Annotated[
    list[str] | None, typer.Option("--sign", help="An offline key: file (PEM), or hsm:... ; repeat. Default: root.pem")
]
Publish = Annotated[bool, typer.Option("--publish/--no-publish", help="Give it to the coordinator at once")]
Keys = Annotated[list[Path] | None, typer.Option("--key", help="File with a public key (PEM); repeat")]


@trust_app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="A new folder")],
    count: Annotated[int, typer.Option("--keys", min=1, max=20, help="How many root keys to make")] = 1,
    threshold: Annotated[int, typer.Option(min=1, max=20, help="How many of them must sign")] = 1,
    root_key: Annotated[list[str] | None, typer.Option(help="Instead: a key that exists (PEM or hsm:...)")] = None,
    publisher: Annotated[list[str] | None, typer.Option(help="A publisher of apps; repeat. Default: owner")] = None,
) -> None:
    """Keys and metadata of a new installation. $FEDTIDE_KEY_PASSPHRASE protects the files of root and publishers."""
    there = TrustFolder(folder)
    if there.is_begun or any(folder.glob("*.pem")):
        raise ConfigError(str(folder), "holds keys already", "Name a new folder; `trust rotate root` replaces keys")
    for each in publisher or []:
        check_token("--publisher", each)
    now, passphrase = datetime.now(UTC), os.environ.get(keys.PASSPHRASE, "")
    offline: dict[str, CryptoSigner] = {}
    if root_key:
        signers = [keys.load(name) for name in root_key]
    else:
        names = [ROOT_KEY] if count == 1 else [f"root-{number}.pem" for number in range(1, count + 1)]
        offline = {name: keys.new() for name in names}
        signers = list(offline.values())
    online = {name: keys.new() for name in (DIRECTOR_KEY, TIMESTAMP_KEY, RELEASES_KEY)}
    roles = {
        ceremony.DIRECTOR: ceremony.role_of(ceremony.DIRECTOR, [online[DIRECTOR_KEY].public_key]),
        ceremony.RELEASES: ceremony.role_of(ceremony.RELEASES, [online[RELEASES_KEY].public_key]),
    }
    for each in publisher or ["owner"]:
        file = f"publisher-{each}.pem" if publisher else PUBLISHER_KEY
        offline[file] = keys.new()
        name = f"{ceremony.PUBLISHER}{each}"
        roles[name] = ceremony.role_of(name, [offline[file].public_key])
    of = ceremony.Offline([s.public_key for s in signers], threshold, [online[TIMESTAMP_KEY].public_key])
    root, targets = ceremony.new_root(of, signers, now), ceremony.targets(roles, signers, now)
    folder.mkdir(parents=True, exist_ok=True)
    for file, signer in offline.items():
        keys.save(signer, folder / file, passphrase)
    for file, signer in online.items():
        keys.save(signer, folder / file)
    there.begin(root, targets)
    say(f"root: {pin_of(root)}")
    say(
        "for the coordinator's folder of identities: "
        f"trust-roots.json trust-targets.json {DIRECTOR_KEY} {TIMESTAMP_KEY}"
    )
    say(f"for the release authority: trust-roots.json {RELEASES_KEY}")
    say("keep offline, and remove from here: root*.pem; for whoever publishes apps: publisher*.pem")


@trust_app.command("show")
def show(output: Output = Format.table) -> None:
    """Whom the installation believes: roles, keys, and what they may sign."""
    view = Client.find().send(endpoints.trust())
    if output is Format.table:
        say(f"root {view.pin}, until {view.root_expires:%Y-%m-%d}; delegations until {view.targets_expires:%Y-%m-%d}")
    rows = [
        {"role": r.role, "keys": [k[:12] for k in r.keys], "threshold": r.threshold, "may sign": r.paths}
        for r in view.roles
    ]
    show_list(view.roles if output is Format.table else [view], rows, output)


@trust_app.command("delegate")
def delegate(
    role: Annotated[str, typer.Argument(help="publisher-NAME, director-REGION, releases-NAME")],
    key: Keys = None,
    of: Annotated[
        list[str] | None, typer.Option("--for", help="Apps or models, * and ? stand for others; repeat")
    ] = None,
    threshold: Annotated[int, typer.Option(min=1, max=20, help="How many of the keys must sign")] = 1,
    sign: SignWith = None,
    folder: Folder = None,
    publish: Publish = True,
) -> None:
    """Let keys sign something: apps, releases of some models, orders of a region. Without --key one is made."""
    there = _folder(folder)
    public = _public(there, role, key)
    roles = {**ceremony.roles_in(there.targets), role: ceremony.role_of(role, public, of or [], threshold)}
    _next_targets(there, roles, sign, publish=publish)


@trust_app.command("revoke")
def revoke(
    role: Annotated[str, typer.Argument(help="A role, as `trust show` names it")],
    key: Annotated[str, typer.Option("--key", help="Only this key of it: the beginning of its id, or its file")] = "",
    sign: SignWith = None,
    folder: Folder = None,
    publish: Publish = True,
) -> None:
    """Take back what was delegated to a role, or to one of its keys."""
    there = _folder(folder)
    roles = ceremony.roles_in(there.targets)
    if role not in roles:
        raise ConfigError("role", f"there is no {role!r}", f"There are {', '.join(roles)}")
    keyid = keys.public_of(Path(key)).keyid if key and Path(key).is_file() else key
    left = [k for k in roles[role].keys if key and not k.keyid.startswith(keyid)]
    if len(left) == len(roles[role].keys):
        raise ConfigError("--key", f"{role} has no key {keyid!r}", f"It has {', '.join(k.keyid for k in left)}")
    if left:
        roles[role] = replace(roles[role], keys=left, threshold=_threshold(role, None, roles[role].threshold, left))
    else:
        del roles[role]
    _next_targets(there, roles, sign, publish=publish)


@trust_app.command("rotate")
def rotate(
    role: Annotated[str, typer.Argument(help="root, timestamp, or a role as `trust show` names it")],
    key: Keys = None,
    keep: Annotated[bool, typer.Option(help="The keys before stay good beside the new ones")] = False,
    threshold: Annotated[int | None, typer.Option(min=1, max=20, help="How many must sign; default: as before")] = None,
    sign: SignWith = None,
    folder: Folder = None,
    publish: Publish = True,
) -> None:
    """New keys for a role. Without --key one is made. The root's keys of before and of now must sign a new root."""
    there = _folder(folder)
    if role in ("root", "timestamp"):
        _rotate_root(there, role, key, sign, threshold, keep=keep, publish=publish)
        return
    roles = ceremony.roles_in(there.targets)
    if role not in roles:
        raise ConfigError("role", f"there is no {role!r}", f"There are root, timestamp, {', '.join(roles)}")
    public = _public(there, role, key)
    held = [*roles[role].keys, *public] if keep else public
    roles[role] = replace(roles[role], keys=held, threshold=_threshold(role, threshold, roles[role].threshold, held))
    _next_targets(there, roles, sign, publish=publish)


def _threshold(role: str, asked: int | None, before: int, held: Sequence[Key]) -> int:
    """Raises ConfigError: fewer keys would have to sign than before, and nobody has said so."""
    if asked is None and len(held) < before:
        raise ConfigError(
            "--threshold",
            f"{before} keys of {role} had to sign, and it would have {len(held)}",
            f"Name {before} keys with --key, or say --threshold {len(held)}",
        )
    return asked or before


def _rotate_root(
    there: TrustFolder,
    role: str,
    key: list[Path] | None,
    sign: list[str] | None,
    threshold: int | None,
    *,
    keep: bool,
    publish: bool,
) -> None:
    before = ceremony.offline_in(there.roots[-1])
    signers = there.signers(sign or [])
    public = _public(there, role, key)
    if role == "timestamp":
        of = replace(before, timestamp=[*before.timestamp, *public] if keep else public)
    else:
        held = [*before.keys, *public] if keep else public
        of = replace(before, keys=held, threshold=_threshold(role, threshold, before.threshold, held))
        signers += [keys.load(file) for file in _made(there, public)]
    lacks = there.next_root(ceremony.next_root(there.roots[-1], of, signers, datetime.now(UTC)))
    if role == "root":  # what the old keys have delegated is signed by the new ones
        lacks = max(lacks, there.next_targets(ceremony.roles_in(there.targets), signers, datetime.now(UTC)))
    _done(there, lacks, publish=publish)


def _made(there: TrustFolder, public: Sequence[Key]) -> list[Path]:
    """The private keys of these public ones, as far as they are in the folder."""
    wanted = {key.keyid for key in public}
    return [file for file in sorted(there.path.glob("root*.pem")) if keys.public_of(file).keyid in wanted]


@trust_app.command("refresh")
def refresh(sign: SignWith = None, folder: Folder = None, publish: Publish = True) -> None:
    """Root and delegations as they are, for another term: before they expire."""
    there = _folder(folder)
    signers, now = there.signers(sign or []), datetime.now(UTC)
    lacks = there.next_root(ceremony.next_root(there.roots[-1], ceremony.offline_in(there.roots[-1]), signers, now))
    lacks = max(lacks, there.next_targets(ceremony.roles_in(there.targets), signers, now))
    _done(there, lacks, publish=publish)


@trust_app.command("sign")
def sign_(sign: SignWith = None, folder: Folder = None, publish: Publish = True) -> None:
    """Sign what waits in the folder for the signatures of more keys."""
    there = _folder(folder, changes=False)
    left = there.sign(there.signers(sign or []))
    _done(there, max(left.values()), publish=publish)


@trust_app.command("publish")
def publish_(folder: Folder = None) -> None:
    """Give the coordinator what has all its signatures: nodes follow it from then on."""
    there = _folder(folder, changes=False)
    view = Client.find().send(endpoints.publish_trust(there.metadata))
    say(f"published: root {view.pin}")


@trust_app.command("pull")
def pull(folder: Folder = None) -> None:
    """Take over what the coordinator has published, into the folder of the offline keys."""
    there = TrustFolder(folder or Home.of_caller().trust)
    view = Client.find().send(endpoints.trust())
    there.replace(view.metadata)
    say(f"{there.path}: root {view.pin}")


def _folder(folder: Path | None, *, changes: bool = True) -> TrustFolder:
    """Raises ConfigError: there is no root in it, or something else waits for signatures."""
    there = TrustFolder(folder or Home.of_caller().trust)
    there.roots  # noqa: B018  # it raises if there are none
    if changes:
        there.check_nothing_waits()
    return there


def _public(there: TrustFolder, role: str, key: list[Path] | None) -> list[Key]:
    if key:
        return [keys.public_of(file) for file in key]
    home = Home.of_caller()
    online = role.startswith(ceremony.DIRECTOR) or role == "timestamp"
    is_here = online and not home.tenant and there.path == home.trust and home.identity.exists()
    # On one machine the coordinator's folder is known: the key must lie there before it is named.
    where = TrustFolder(home.identity) if is_here else there
    file, public = where.new_key(role, "" if online else os.environ.get(keys.PASSPHRASE, ""))
    say(f"a new key: {file}")
    return [public]


def _next_targets(
    there: TrustFolder, roles: dict[str, ceremony.Role], sign: list[str] | None, *, publish: bool
) -> None:
    _done(there, there.next_targets(roles, there.signers(sign or []), datetime.now(UTC)), publish=publish)


def _done(there: TrustFolder, lacks: int, *, publish: bool) -> None:
    if lacks:
        say(f"{lacks} more signature(s) needed: fedtide trust sign --folder {there.path} --sign KEY")
    elif publish:
        try:
            publish_(there.path)
        except FedtideError:
            there.undo()  # what the coordinator does not take is not what holds
            raise
    else:
        say(f"ready in {there.path}: fedtide trust publish")
