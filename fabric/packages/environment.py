"""Environments of apps: what an app needs and a machine lacks, installed with uv over the machine's own packages.

An environment is a folder named by the digest of what went into it, shared by all apps that need the same. Packages of
the machine stay visible in it below its own, and count as installed there: only what is missing, or is there in
another version, is installed. Nothing that is installed for an app is seen by another, or by the process itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from fedtide.fabric.errors import CapabilityMissing, ConfigError, TransientError
from fedtide.fabric.packages.keeping import CACHE, hold, installing, making, size_of
from fedtide.fabric.packages.requirements import (
    NEVER_INSTALLED,
    all_installed,
    installed_version,
    name_of,
    parsed,
    unmet,
)
from fedtide.fabric.packages.rules import LOCK, THE_MACHINES_OWN, PackageRules, Wanted
from fedtide.fabric.process.python import module_command

INSTALL_WITHIN_S = 1800.0
INSIDE = "FEDTIDE_APP_ENVIRONMENT"
"""Environment variable of a process that runs in an environment made for its app."""
_COMPLETE = ".complete"
_OVER_THE_MACHINES = "fedtide-machine.pth"
_KEPT_OF_METADATA = ("METADATA", "WHEEL", "INSTALLER", "entry_points.txt")

Wheels = Callable[[], Path]
"""Fetches the wheels that travel with an app, and says in which folder they are."""


@dataclass(frozen=True, slots=True)
class Environment:
    """`handle` keeps it from being removed, until it is closed or the process ends."""

    python: Path
    handle: int


def environment_for(wanted: Wanted, fetch: Wheels) -> Environment | None:
    """The environment that has what an app needs; None: this process's own has it.

    A `uv.lock` in the app's folder goes before its dependencies.

    Args:
        fetch: called only if the wheels are wanted.

    Raises:
        ConfigError: a dependency cannot be read.
        CapabilityMissing: it may not be installed here, or cannot be.
        TransientError: there is no room, or no index to be reached.
        OSError: the folder cannot be written.
    """
    rules = wanted.rules
    asked = asked_for(wanted.app_dir, wanted.dependencies)
    missing = unmet(asked)
    if not missing:
        return None
    if os.environ.get(INSIDE):  # it would find another environment lacking, and so on
        raise CapabilityMissing(f"the environment that was made for the app lacks {', '.join(missing)}", "Report this")
    wheels = dict(sorted(wanted.wheels.items())) if rules.wheels else {}
    _check_rules(rules, missing, wheels)
    asked = tuple(_from_where_it_may(each, rules, wheels) for each in asked)
    folder = wanted.root.resolve() / _name(asked, wheels)
    python = folder / "bin" / "python"
    with making(folder):
        if not (folder / _COMPLETE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            try:
                _layer(folder)
                with installing(folder.parent):
                    _install(folder, asked, rules, fetch() if wheels else None)
                _check_size(folder, rules)
                (folder / _COMPLETE).touch()
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        os.utime(folder)
        return Environment(python, hold(python))


def _from_where_it_may(text: str, rules: PackageRules, wheels: Mapping[str, str]) -> str:
    """A requirement on a URL is asked for there only if an index may be asked too; else its wheel must travel."""
    requirement = Requirement(text)
    if requirement.url is None or rules.index:
        return text
    travelling = {name_of(each.partition("-")[0]) for each in wheels}
    if name_of(requirement.name) not in travelling:
        raise CapabilityMissing(
            f"the app needs {text}, and no other machine may be asked here",
            "Send its wheel along (--with-wheels), or name an index (packages.index)",
        )
    requirement.url = None
    return str(requirement)


def asked_for(app_dir: Path, dependencies: tuple[str, ...]) -> tuple[str, ...]:
    """What an app asks for on this machine: what its `uv.lock` says, else its dependencies; never flwr.

    Raises:
        ConfigError: it cannot be read.
    """
    return _locked(app_dir) if (app_dir / LOCK).is_file() else tuple(map(str, parsed(dependencies)))


def _check_rules(rules: PackageRules, missing: list[str], wheels: Mapping[str, str]) -> None:
    if rules.index or wheels:
        return
    named = ", ".join(missing)
    if not rules.wheels:
        raise CapabilityMissing(
            f"the app needs {named}, and nothing may be installed here",
            "Its owner can allow it (packages.wheels, packages.index), or install it",
        )
    raise CapabilityMissing(
        f"the app needs {named}, and no index may be asked here",
        "Give the app its wheels (--with-wheels), name an index (packages.index), or install it",
    )


def _name(wanted: tuple[str, ...], wheels: Mapping[str, str]) -> str:
    what = [sorted(wanted), wheels, _own(), sorted(all_installed().items()), sys.version, sysconfig.get_platform()]
    return hashlib.sha256(json.dumps([*what, _machines_paths()]).encode()).hexdigest()[:32]


def _own() -> list[str]:
    """What this installation itself needs in a process that runs apps: an app's packages must go with it."""
    found = []
    for each in map(Requirement, requires("fedtide") or ()):
        if each.marker is None or each.marker.evaluate({"extra": "train"}):
            each.marker = None
            found.append(str(each))
    return sorted(found)


def _machines_paths() -> list[str]:
    return [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages") and Path(p).is_dir()]


def _layer(folder: Path) -> None:
    """An environment in which all that this interpreter has is visible, and counts as installed.

    Of each package there is the metadata only, a copy: uv may take it away to put another version there.
    """
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    paths = _machines_paths()
    lines = [f"import site; site.addsitedir({path!r})" for path in paths]
    (packages / _OVER_THE_MACHINES).write_text("".join(f"{line}\n" for line in lines))
    for path in paths:
        for source in Path(path).glob("*.dist-info"):
            if not (packages / source.name).exists():
                _copy_metadata(source, packages / source.name)


def _copy_metadata(source: Path, target: Path) -> None:
    target.mkdir()
    kept = [name for name in _KEPT_OF_METADATA if (source / name).is_file()]
    for name in kept:
        shutil.copyfile(source / name, target / name)
    (target / "RECORD").write_text("".join(f"{target.name}/{name},,\n" for name in [*kept, "RECORD"]))


def _locked(app_dir: Path) -> tuple[str, ...]:
    """What the app's lock file says, as lines of a requirements file; without flwr and what only flwr needs."""
    options = ["--frozen", "--no-dev", "--no-emit-project", "--no-header", "--no-annotate"]
    options += [word for name in NEVER_INSTALLED for word in ("--prune", name)]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)  # uv writes beside what it reads
        for name in ("pyproject.toml", LOCK):
            shutil.copyfile(app_dir / name, copy / name)
        done = _uv(
            ["export", "--project", scratch, "--no-hashes", *options],
            {"UV_OFFLINE": "1", "UV_NO_CONFIG": "1"},
            PackageRules(),
        )
    if done.returncode != 0:
        raise ConfigError(LOCK, f"cannot be read: {_said(done)}", "Make it anew with `uv lock`")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(("-", ".", "/", "file:")):
            raise ConfigError(
                LOCK, f"names a path, {line!r}: only this machine has it", "Publish it, or put it into the app"
            )
    return tuple(lines)


def _install(folder: Path, wanted: tuple[str, ...], rules: PackageRules, wheels: Path | None) -> None:
    environment = {"UV_CACHE_DIR": str(folder.parent / CACHE), "UV_PYTHON_DOWNLOADS": "never"}
    options = ["--python", str(folder / "bin" / "python"), "--no-build", "--no-progress", "--strict"]
    if rules.index != THE_MACHINES_OWN:
        environment["UV_NO_CONFIG"] = "1"
    if not rules.index:
        options.append("--no-index")
    elif rules.index != THE_MACHINES_OWN:
        environment["UV_DEFAULT_INDEX"] = rules.index  # not in the command line: it may hold a password
    if wheels is not None:
        options += ["--find-links", str(wheels)]
    asked, own = folder / "asked.txt", folder / "own.txt"
    asked.write_text("".join(f"{line}\n" for line in wanted))
    own.write_text("".join(f"{line}\n" for line in _own()))
    # An app that brings a fedtide of its own would replace what it is spoken to with.
    (limits := folder / "limits.txt").write_text(f"fedtide=={installed_version('fedtide')}\n")
    done = _uv(["pip", "install", *options, "-r", str(asked), "-r", str(own), "-c", str(limits)], environment, rules)
    if done.returncode != 0:
        _explain(done, rules)


def _uv(arguments: list[str], environment: Mapping[str, str], rules: PackageRules) -> subprocess.CompletedProcess[str]:
    """uv, which hears of the machine's own set-up only if the rules say so."""
    dropped = ("VIRTUAL_ENV", "PYTHONPATH", *(() if rules.index == THE_MACHINES_OWN else ("UV_", "PIP_")))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    command = module_command("uv", *arguments)
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=INSTALL_WITHIN_S, env={**kept, **environment}
        )
    except subprocess.TimeoutExpired as exc:
        raise TransientError(f"installing the app's packages took more than {INSTALL_WITHIN_S:.0f} s") from exc


def _explain(done: subprocess.CompletedProcess[str], rules: PackageRules) -> None:
    said = _said(done).replace(rules.index, "the index") if rules.index else _said(done)
    if "No space left on device" in said:
        raise TransientError(f"no room for the app's packages: {said}", "Free disk space; it is tried again")
    remedy = "Change what the app asks for, or what this machine may use (packages in its configuration)"
    raise CapabilityMissing(f"the app's packages cannot be installed: {said}", remedy)


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Using Python")]
    return " ".join(" ".join(lines).split())[-2000:]


def _check_size(folder: Path, rules: PackageRules) -> None:
    if (size := size_of([folder])) > rules.max_bytes:
        raise CapabilityMissing(
            f"the app's packages need {size / 1e6:.0f} MB, the owner allows {rules.max_bytes / 1e6:.0f} MB",
            "Raise packages.max_bytes on the node",
        )
