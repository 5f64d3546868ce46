"""Which of an app's requirements are met by what is installed (PEP 508). Pure but for the list of what is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distributions, requires, version

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from fedtide.fabric.errors import ConfigError

NEVER_INSTALLED = "flwr"
"""As in Flower: an app runs with the installation's own, whichever it asks for."""
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


def name_of(requirement: str) -> str:
    """The normalised name (PEP 503) in a requirement or a file name of a wheel."""
    return canonicalize_name(Requirement(requirement).name)


def installed_version(name: str) -> str | None:
    """The version of a distribution in this process's path, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def installed_requires(name: str) -> Iterable[str]:
    """What an installed distribution requires."""
    return requires(name) or ()


def all_installed() -> dict[str, str]:
    """Name and version of every distribution in this process's path."""
    found: dict[str, str] = {}
    for each in distributions():
        found.setdefault(canonicalize_name(each.name), each.version)
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
    """Those requirements that not every node meets that runs Flower apps.

    Raises:
        ConfigError: as `parsed`.
    """
    return [str(r) for r in parsed(texts) if canonicalize_name(r.name) not in WITH_FLOWER]


def lacking(texts: Iterable[str], installed: Mapping[str, str]) -> list[str]:
    """Those requirements that a machine with these packages does not meet; extras are not looked into."""
    return [str(r) for r in parsed(texts) if not _is_met(r, lambda name: installed.get(canonicalize_name(name)))]


def parsed(texts: Iterable[str]) -> list[Requirement]:
    """The requirements that hold on this machine, without flwr.

    Raises:
        ConfigError: a text is no requirement.
    """
    found = []
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as exc:
            raise ConfigError(
                "project.dependencies", f"{text!r} is no requirement: {exc}", "Write them as for pip (PEP 508)"
            ) from exc
        here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if here and canonicalize_name(requirement.name) != NEVER_INSTALLED:
            found.append(requirement)
    return found


def not_installed(texts: Iterable[str]) -> list[str]:
    """Requirements on flwr that ask for a version that this machine's flwr is not."""
    asked = [Requirement(text) for text in texts if text.lower().lstrip().startswith(NEVER_INSTALLED)]
    mine = installed_version(NEVER_INSTALLED)
    return [
        str(r)
        for r in asked
        if canonicalize_name(r.name) == NEVER_INSTALLED and mine is not None and not r.specifier.contains(mine)
    ]


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
    return found is not None and requirement.url is None and requirement.specifier.contains(found, prereleases=True)


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
