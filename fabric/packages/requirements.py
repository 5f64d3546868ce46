"""Which of an app's requirements are met by what is installed (PEP 508). Pure but for the list of what is installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, distributions, requires, version

from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from fedtide.fabric.errors import ConfigError

NEVER_INSTALLED = ("flwr", "fedtide")
"""As in Flower: an app runs with the installation's own, whichever version it asks for."""
WITH_FLOWER = frozenset(
    [
        "alembic",
        "click",
        "cryptography",
        "fastapi",
        "grpcio",
        "grpcio-health-checking",
        "httpx",
        "iterators",
        "nats-py",
        "numpy",
        "packaging",
        "pathspec",
        "prompt-toolkit",
        "protobuf",
        "psutil",
        "pycryptodome",
        "pydantic",
        "pyyaml",
        "requests",
        "rich",
        "sqlalchemy",
        "stamina",
        "starlette",
        "tomli",
        "tomli-w",
        "typer",
        "tzdata",
        "uv",
        "uvicorn",
    ]
)
"""What every node that runs Flower apps has, in some version."""

VersionOf = Callable[[str], str | None]
RequiresOf = Callable[[str], Iterable[str]]
_NOT_READABLE = (InvalidRequirement, InvalidVersion, UndefinedComparison, UndefinedEnvironmentName)


def name_of(requirement: str) -> str:
    """The normalised name (PEP 503) in a requirement or a file name of a wheel.

    Raises:
        ConfigError: it is no requirement.
    """
    return canonicalize_name(_read(requirement).name)


def installed_version(name: str) -> str | None:
    """The version of a distribution in this process's path, or None."""
    try:
        return version(name) or None
    except (PackageNotFoundError, OSError, KeyError, TypeError):  # it is not there, or only its remains are
        return None


def installed_from(name: str) -> str | None:
    """The URL that a distribution was installed from (PEP 610), or None: from an index."""
    try:
        told = distribution(name).read_text("direct_url.json")
        return str(json.loads(told)["url"]) if told is not None else None
    except (PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


def installed_requires(name: str) -> Iterable[str]:
    """What an installed distribution requires."""
    return requires(name) or ()


def all_installed() -> dict[str, str]:
    """Name and version of every distribution in this process's path; what an interrupted installer left is no one."""
    found: dict[str, str] = {}
    for each in distributions():
        with suppress(OSError):  # of the backport of importlib.metadata, where an app has brought it
            told = each.metadata
            if told is not None and "Name" in told and "Version" in told:
                found.setdefault(canonicalize_name(told["Name"]), told["Version"])
    return found


def beside_flower() -> dict[str, str]:
    """Name and version of what is installed beside this installation's own packages and theirs."""
    installed = all_installed()
    open_: list[tuple[str, frozenset[str]]] = [("fedtide", frozenset({"edge", "train"}))]
    own: set[tuple[str, frozenset[str]]] = set()
    while open_:
        name, extras = open_.pop()
        if (name, extras) in own or name not in installed:
            continue
        own.add((name, extras))
        for each in map(Requirement, installed_requires(name)):
            marker = each.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or ("",)):
                open_.append((canonicalize_name(each.name), frozenset(each.extras)))
    names = {name for name, _ in own}
    return {name: version for name, version in sorted(installed.items()) if name not in names}


def worth_naming(texts: Iterable[str]) -> list[str]:
    """Those requirements that hold on every machine, and that not every node meets that runs Flower apps.

    Raises:
        ConfigError: as `parsed`.
    """
    return [str(r) for r in parsed(texts) if r.marker is None and canonicalize_name(r.name) not in WITH_FLOWER]


def lacking(texts: Iterable[str], installed: Mapping[str, str]) -> list[str]:
    """Those requirements that another machine with these packages does not meet: only what is sure.

    Extras are not looked into, and markers are not judged: they hold for the other machine. What cannot be read is left
    to that machine too.
    """
    found = []
    for text in texts:
        try:
            requirement = _read(text)
        except ConfigError:
            continue
        if requirement.marker is None and not _is_met(requirement, lambda name: installed.get(canonicalize_name(name))):
            found.append(text)
    return found


def parsed(texts: Iterable[str]) -> list[Requirement]:
    """The requirements that hold on this machine, without flwr and fedtide.

    Raises:
        ConfigError: a text is no requirement.
    """
    found = []
    for text in texts:
        requirement = _read(text)
        try:
            here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        except _NOT_READABLE as exc:
            raise _no_requirement(text, exc) from exc
        if here and canonicalize_name(requirement.name) not in NEVER_INSTALLED:
            found.append(requirement)
    return found


def _read(text: str) -> Requirement:
    try:
        requirement = Requirement(text)
    except _NOT_READABLE as exc:
        raise _no_requirement(text, exc) from exc
    if requirement.url is not None and any(c.isspace() for c in requirement.url):
        raise _no_requirement(text, ValueError("its URL holds white space"))
    return requirement


def _no_requirement(text: str, why: Exception) -> ConfigError:
    remedy = "Write them as for pip (PEP 508)"
    return ConfigError("project.dependencies", f"{text!r} is no requirement: {str(why).partition(chr(10))[0]}", remedy)


def not_installed(texts: Iterable[str]) -> list[str]:
    """Requirements on flwr or fedtide that ask for another version than this machine's.

    Raises:
        ConfigError: as `parsed`.
    """
    asked = [_read(text) for text in texts]
    own = [r for r in asked if canonicalize_name(r.name) in NEVER_INSTALLED]
    return [str(r) for r in own if installed_version(r.name) is not None and not _is_met(r, installed_version)]


def unmet(
    texts: Iterable[str], version_of: VersionOf = installed_version, requires_of: RequiresOf = installed_requires
) -> list[str]:
    """The requirements that what is installed does not meet, with their extras.

    Raises:
        ConfigError: as `parsed`.
    """
    open_, seen, missing = parsed(texts), set[str](), []
    while open_:
        requirement = open_.pop(0)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        if not _is_met(requirement, version_of):
            missing.append(str(requirement))
        elif requirement.extras:
            open_ += _of_extras(requirement, requires_of)
    return missing


def _is_met(requirement: Requirement, version_of: VersionOf) -> bool:
    found = version_of(requirement.name)
    if found is None:
        return False
    if requirement.url is not None:
        return installed_from(requirement.name) == requirement.url
    try:
        return requirement.specifier.contains(found, prereleases=True)
    except InvalidVersion:
        return False


def _of_extras(requirement: Requirement, requires_of: RequiresOf) -> list[Requirement]:
    found = []
    for each in map(Requirement, requires_of(requirement.name)):
        marker = each.marker
        if marker is None or marker.evaluate({"extra": ""}):
            continue  # it came with the package itself
        if any(marker.evaluate({"extra": extra}) for extra in requirement.extras):
            each.marker = None
            found.append(each)
    return found
